"""The same model with factored layers, beside the dense one of `plan`."""

import argparse

from torch import nn

from ..factors import factorize
from ..optim import LowRankAdamW
from .models import model_of
from .text import UserError, user_errors

# Of its row.
NAME = "factored-adamw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The rank of the factors, and the share of entries beside them."""
    what = "beside the others: factorize(model, RANK), trained by AdamW, or in --state"
    parser.add_argument("--factored", type=int, metavar="RANK", help=what)
    share = "of entries, trained beside factors; default: none"
    parser.add_argument("--sparse", type=float, default=0.0, metavar="SHARE", help=share)


def check(args: argparse.Namespace) -> None:
    """Raises UserError if the arguments do not go together."""
    if args.factored is None:
        if args.sparse:
            raise UserError("--sparse is a part of factored layers: name a rank, --factored")
        return
    if args.factored < 1:
        raise UserError(f"--factored must be at least 1, got {args.factored}")
    if args.gpus is not None:
        raise UserError("--factored and --gpus do not go together")


def twin_of(args: argparse.Namespace) -> tuple[nn.Module, LowRankAdamW | None, str]:
    """The model with factored layers, its optimizer, None for torch's AdamW, and what it is.

    Raises:
        UserError: no layer becomes smaller, or the share does not fit.
    """
    module = model_of(args).module
    with user_errors():
        done = factorize(module, args.factored, sparse=args.sparse)
    optimizer = None
    if args.state != "float32":
        optimizer = LowRankAdamW(module.named_parameters(), state=args.state, backend=args.backend)
    beside = f" with {100 * args.sparse:g} % of entries" if args.sparse else ""
    count = sum(param.numel() for param in module.parameters())
    taken = f"{len(done.modules)} of {len(done.rows)} linear layers"
    return module, optimizer, f"rank {args.factored}{beside} in {taken}, {count:,} parameters"
