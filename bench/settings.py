"""The arguments of the pre-training bench, with the preset's values filled in."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from bench.models import MODELS, PRESETS
from bench.optimizers import METHODS, named, present
from bench.peers import Recipe

ALPHA = 0.25
TRAINABLE = [name for name, method in METHODS.items() if method.train]


@dataclass(frozen=True)
class Settings:
    """Everything that decides a comparison's numbers; plain values only, so that JSON holds it."""

    model: str
    data: str | None
    tokenizer: str
    vocab_size: int
    lrs: dict[str, list[float]]
    seeds: list[int]
    steps: int
    warmup: int
    seq_len: int
    batch_size: int
    micro_batch: int
    rank: int
    scale: float
    update_proj_gap: int
    weight_decay: float
    backend: str
    residual: str
    residual_energy: float
    clip: float
    dtype: str
    device: str
    eval_every: int
    eval_tokens: int
    checkpoint_every: int
    scales: dict[str, list[float]] = field(default_factory=dict)
    weights: str | None = None
    keep_weights: bool = False
    autocast: bool = False

    @property
    def recipe(self) -> Recipe:
        own = {each.name for each in fields(self)}
        shared = [each.name for each in fields(Recipe) if each.name in own]
        return Recipe(**{name: getattr(self, name) for name in shared})

    def recipe_of(self, job: Job) -> Recipe:
        """With what the job and the options in its optimizer's name change."""
        method, options = named(job.optimizer)
        recipe = replace(self.recipe, beta=options.get("beta"))
        if job.scale is None or method.tunes is None:
            return recipe
        return replace(recipe, **{method.tunes: job.scale})

    def differences(self, saved: dict) -> list[str]:
        """Says for each argument that is not as in `saved` what it was and what it is.

        What older comparisons do not tell had the value that it has by default.
        """
        mine, usual = asdict(self), {each.name: each.default for each in fields(self)}
        was = {name: saved.get(name, usual[name]) for name in mine}
        return [
            f"{name} was {was[name]}, is {mine[name]}" for name in mine if was[name] != mine[name]
        ]


@dataclass(frozen=True)
class Job:
    """One run of a comparison; the scale is that of `--scale NAME=...`, None of what has none."""

    optimizer: str
    lr: float
    seed: int
    scale: float | None = None

    @property
    def name(self) -> str:
        scale = "" if self.scale is None else f"-scale{self.scale:g}"
        return f"{self.optimizer}-lr{self.lr:g}{scale}-seed{self.seed}"


def plan(
    lrs: dict[str, list[float]], seeds: list[int], scales: dict[str, list[float]] | None = None
) -> list[Job]:
    """Lists the runs of a comparison in the order in which they are made: pairs before seeds."""
    return [
        Job(name, lr, seed, scale)
        for seed in seeds
        for name, rates in lrs.items()
        for lr in rates
        for scale in (scales or {}).get(name, [None])
    ]


@dataclass(frozen=True)
class Command:
    """What to compare, where to leave it, and what to do about an earlier comparison there."""

    settings: Settings
    out: Path
    resume: bool
    overwrite: bool


def parse(arguments: list[str] | None = None) -> Command:
    """Reads the command line; a mistake ends the program with a message, as argparse does."""
    parser = _parser()
    args = parser.parse_args(arguments)
    preset = MODELS[args.model]
    if args.tokens_per_batch is not None:
        length = args.seq_len or preset.seq_len
        if args.tokens_per_batch % length:
            parser.error(f"--tokens-per-batch must be a multiple of {length}, a sequence's length")
        args.batch_size = args.tokens_per_batch // length
    for name in ("steps", "seq_len", "batch_size", "rank", "update_proj_gap"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    if args.micro_batch is None:
        args.micro_batch = min(preset.micro_batch, args.batch_size)
    if args.weights is not None and not Path(args.weights).is_file():
        parser.error(f"--weights {args.weights} is no file")
    if args.batch_size % args.micro_batch:
        parser.error(f"--micro-batch {args.micro_batch} must divide the batch, {args.batch_size}")
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.device = _device(args.device)
    try:
        names = _names(args.optimizers, args.device)
        args.lrs = parse_lrs(args.lr, names, nano=args.model not in PRESETS or args.model == "nano")
        args.scale, args.scales = parse_scales(args.scale, names)
    except ValueError as error:
        parser.error(str(error))
    settings = Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
    out = Path(args.out or Path(__file__).parent / "results" / f"pretrain-{args.model}")
    return Command(settings, out, args.resume, args.overwrite)


def parse_lrs(words: list[str], optimizers: list[str], nano: bool) -> dict[str, list[float]]:
    """Reads `1e-3,3e-3` (for every optimizer) and `galore=1e-2` (for one, which then goes first).

    Raises:
        ValueError: A word is not of either form, or names an optimizer that is not compared.
    """
    common, own = None, {}
    for word in words:
        name, values = _numbers(word, "--lr", "RATE", optimizers)
        if name:
            own[name] = values
        else:
            common = values
    methods = {name: named(name)[0] for name in optimizers}
    defaults = {name: [each.nano_lr if nano else each.lr] for name, each in methods.items()}
    return {name: own.get(name) or common or defaults[name] for name in optimizers}


def parse_scales(words: list[str], optimizers: list[str]) -> tuple[float, dict[str, list[float]]]:
    """Reads `0.25`, alpha of all that have no other, and `muon=0.2,0.4`, one method's own.

    Who has a scale of its own gets its usual one if none is given.

    Raises:
        ValueError: A word is not of either form, or names an optimizer that has no scale or is not
            compared.
    """
    usual = {name: named(name)[0].own_scale for name in optimizers}
    scales = {name: [scale] for name, scale in usual.items() if scale is not None}
    alpha = ALPHA
    for word in words:
        name, values = _numbers(word, "--scale", "SCALE", optimizers)
        if name and named(name)[0].tunes is None:
            raise ValueError(f"--scale {word}: {name} has no scale")
        if name:
            scales[name] = values
        elif len(values) == 1:
            (alpha,) = values
        else:
            raise ValueError(f"--scale {word}: there is one alpha; or give NAME={word}")
    return alpha, scales


def _numbers(word: str, option: str, what: str, optimizers: list[str]) -> tuple[str, list[float]]:
    name, equals, numbers = word.rpartition("=")
    if equals and name not in optimizers:
        raise ValueError(f"{option} {word}: {name!r} is not among {', '.join(optimizers)}")
    try:
        return name, [float(number) for number in numbers.split(",")]
    except ValueError:
        form = f"give {what}[,{what}...] or NAME={what}[,{what}...]"
        raise ValueError(f"{option} {word}: {form}") from None


def _names(text: str, device: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name.partition("@")[0] not in TRAINABLE:
            known = ", ".join(TRAINABLE)
            raise ValueError(f"unknown optimizer {name!r}: the known ones are {known}")
        named(name)
    _, missing = present(names, device)
    if missing:
        absent = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise ValueError(f"--optimizers: {absent}")
    return names


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pretrain",
        usage="%(prog)s [options]",
        description="Pre-train a LLaMA with several optimizers side by side, and compare them.",
    )
    what = parser.add_argument_group("what is compared")
    usual = ",".join(name for name, method in METHODS.items() if not method.variant)
    names = (
        f"of {', '.join(TRAINABLE)}; fira@16 has rank 16, muon@b0.9 a beta; default: %(default)s"
    )
    what.add_argument("--optimizers", default=usual, help=names)
    rates = "1e-3,3e-3 for all, fira=1e-2 for one, or both; default: one good rate each"
    what.add_argument("--lr", nargs="+", default=[], metavar="RATES", help=rates)
    what.add_argument("--seeds", type=_integers, default=[0], help="of weights and batches: 0,1,2")
    what.add_argument("--model", choices=MODELS, default="nano", help="default: %(default)s")

    text = parser.add_argument_group("text")
    text.add_argument("--data", help="file or folder; default: the Python standard library")
    text.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes")
    text.add_argument("--vocab-size", type=_positive, default=4096, help="of bpe: %(default)s")

    recipe = parser.add_argument_group("recipe; the first six are the model's if not given")
    for name in ("--steps", "--seq-len", "--batch-size", "--rank", "--update-proj-gap"):
        recipe.add_argument(name, type=_positive, metavar="N")
    recipe.add_argument("--micro-batch", type=_positive, metavar="N", help="sequences at a time")
    recipe.add_argument("--warmup", type=int, metavar="N", help="steps; default: a tenth")
    tokens = "instead of --batch-size"
    recipe.add_argument("--tokens-per-batch", type=_positive, metavar="N", help=tokens)
    scales = f"alpha of all, {ALPHA} by default; or muon=0.2,0.4 for the scale of one"
    recipe.add_argument("--scale", nargs="+", default=[], metavar="SCALES", help=scales)
    recipe.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    recipe.add_argument("--clip", type=float, default=1.0, help="gradient norm; 0: off")
    recipe.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights")
    autocast = "forward and backward in bfloat16 by torch.autocast"
    recipe.add_argument("--autocast", action="store_true", help=autocast)
    weights = "weights.pt of an earlier run, to begin with; default: random ones"
    recipe.add_argument("--weights", metavar="FILE", help=weights)
    recipe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    recipe.add_argument("--backend", default="auto", help="of galore and fira")
    recipe.add_argument("--residual", choices=("official", "paper"), default="official")
    share = "of the gradient that adarankgrad leaves outside; default: %(default)s"
    recipe.add_argument("--residual-energy", type=float, default=0.01, metavar="SHARE", help=share)

    record = parser.add_argument_group("records")
    record.add_argument("--out", help="folder; default: bench/results/pretrain-MODEL")
    record.add_argument("--eval-every", type=_positive, metavar="N", help="default: a tenth")
    record.add_argument("--eval-tokens", type=_positive, metavar="N", default=32_768)
    record.add_argument("--checkpoint-every", type=_positive, metavar="N", default=100)
    record.add_argument("--keep-weights", action="store_true", help="a run leaves weights.pt")
    earlier = record.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on where it stopped")
    earlier.add_argument("--overwrite", action="store_true", help="drop an unfinished comparison")
    return parser
