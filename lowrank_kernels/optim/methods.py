"""GaLore, Fira, APOLLO, AdaRankGrad and OrthoFira: choices of parts over one low-rank AdamW."""

from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..subspace import Subspace
from .formats import BasisFormat, MasterBits, StateFormat
from .lowrank_adamw import LowRankAdamW
from .outside import Per
from .parts import Rounding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options(TypedDict, total=False):
    """What every method takes beside the options of AdamW and its own; see `LowRankAdamW`."""

    backend: str
    maximize: bool
    rounding: Rounding
    monitor: bool
    state: StateFormat
    basis: BasisFormat
    master: MasterBits
    process_group: "ProcessGroup | None"


class SubspaceOptions(Options, total=False):
    """The same of a method that takes any subspace."""

    subspace: Subspace | str
    capturable: bool


class GaLoreAdamW(LowRankAdamW):
    """GaLore: AdamW on the projected gradient, what the basis does not span is dropped.

    Arguments, `state`, `basis` and `master` among them, group keys and errors as in `LowRankAdamW`.
    Drop-in for `galore_torch.GaLoreAdamW`; groups without a rank are torch's AdamW here.

    Source: GaLore (arXiv 2403.03507), algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Unpack[SubspaceOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, residual=None, **options)


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with `state="int8"`, under the name that it has in `galore-torch`.

    There, eps is 1e-8 and weight_decay 1e-2 by default, moments are in blocks of 256 entries and
    rounded to the nearest, and those of small matrices stay wide. Its arguments that concern
    bitsandbytes (`optim_bits`, `min_8bit_size` and so on) are refused by name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Unpack[SubspaceOptions],
    ) -> None:
        options.setdefault("state", "int8")
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class FiraAdamW(LowRankAdamW):
    """Fira: GaLore plus the rest of the gradient, scaled a channel at a time and limited in growth.

    Arguments, `state`, `basis` and `master` among them, group keys and errors as in `LowRankAdamW`.
    Drop-in for `fira.FiraAdamW`; groups without a rank are torch's AdamW here.
    `residual="official"` follows the published code, which gave the published results;
    `residual="paper"` follows algorithm 1. They differ unless `scale` is 1, and in the place of the
    bias correction.

    Source: Fira (arXiv 2410.01623), algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: Literal["official", "paper"] = "official",
        **options: Unpack[SubspaceOptions],
    ) -> None:
        if residual not in ("official", "paper"):
            raise ValueError(
                f"residual must be one of official, paper, got {residual!r}; use GaLoreAdamW for"
                " none, LowRankAdamW for every form"
            )
        super().__init__(params, lr, betas, eps, weight_decay, residual=residual, **options)


class ApolloAdamW(LowRankAdamW):
    """APOLLO: the gradient itself, each channel scaled as Adam would scale its random projection.

        phi_j = |N_j| / |R_j|;   W <- (1 - lr wd) (W - lr alpha phi (x) G), limited as Fira's

    N are Adam's directions of R, which is G multiplied by Gaussian numbers; nothing is projected
    back, and the update has the rank of G. alpha is a group's `scale`, for which the paper has 1:
    `param_groups(model, rank=256, scale=1.0)`. APOLLO-Mini compares norms of whole matrices at rank
    1: `ApolloAdamW(param_groups(model, rank=1, scale=128**0.5), per="matrix")`.

    Arguments, group keys and errors as in `LowRankAdamW`. Written from the paper's equations alone.
    Moments are corrected for their bias, as there.

    Source: APOLLO (arXiv 2412.05270), algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        per: Per = "channel",
        **options: Unpack[SubspaceOptions],
    ) -> None:
        options.setdefault("subspace", "gaussian")
        super().__init__(params, lr, betas, eps, weight_decay, residual="scale", per=per, **options)


class OrthoFiraAdamW(LowRankAdamW):
    """Fira with an orthogonal residual: Adam inside of the subspace, and outside, where Fira scales
    what is left channel by channel, its orthogonal factor, as Muon takes it of the whole.

        W <- (1 - lr wd) (W - lr (alpha back(N) + s sqrt(max(rows, cols)) NS(G - back(R))))

    N are Adam's directions of R, alpha is a group's `scale`, and NS are five Newton-Schulz
    iterations, which cost as much as forward and backward of some thousand tokens. Outside there is
    no state. With `residual_momentum`, at a byte a weight, NS is of a mean of several steps, which
    large batches want. For rates see docs/orthogonal-residual.md.

    Args:
        residual_scale: s; None: 0.4. It and the learning rate are two numbers to be found.
        residual_momentum: the mean's decay rate, up to 0.98; 0 for none.

    Other arguments, `state`, `basis` ("weight" or "int8") and `master` among them, group keys and
    errors as in `LowRankAdamW`, which this is with residual="orthogonal". Moments are corrected for
    their bias.

    Source: this package; see docs/orthogonal-residual.md for what it comes from.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual_scale: float | None = None,
        residual_momentum: float = 0.0,
        **options: Unpack[SubspaceOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            residual="orthogonal",
            residual_scale=residual_scale,
            residual_momentum=residual_momentum,
            **options,
        )


class AdaRankGradAdamW(LowRankAdamW):
    """AdaRankGrad: a rank for every layer, no larger than its gradient needs at the time.

    Gradients lose rank as training goes on. Each refresh takes the smallest rank, up to the group's
    `rank`, that leaves at most `residual_energy` of |G|^2 outside; the moments follow the basis;
    and a basis is renewed as soon as it has done its work, at the latest after `update_proj_gap`
    steps. State is allocated anew, so what a smaller rank saves is free for others.

    There is no published code. Ours are these choices, where the paper could not be followed:

    - the rank rule takes the smallest rank, since the printed one always takes the largest, and all
      ranks are judged by one sketch;
    - `residual_energy` is the share outside, not inside;
    - the second moment is carried by (C o C) V, since the printed C V becomes negative;
      `moments="carry_absolute"` takes |C V|;
    - a basis has done its work when |R| has fallen to `threshold` times its value at the first step
      with this basis, which has no unit; `criterion="norm"` is the published |R| <= threshold. The
      noise of small batches keeps |R| up, and then the interval decides;
    - `scale` has GaLore's default 0.25; only its product with the learning rate matters.

    Arguments, `state`, `basis` and `master` among them, group keys and errors as in `LowRankAdamW`,
    and as in `Subspace` for those of the method. The moments are corrected for their bias, as in
    `torch.optim.AdamW`. With another range finder it is
    `LowRankAdamW(params, corrected=True, subspace=Subspace("svd", ...))`.

    Source: AdaRankGrad (arXiv 2410.17881), from its abstract and secondary sources.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual_energy: float | None = 0.01,
        criterion: str | None = "relative_norm",
        threshold: float = 0.1,
        moments: str = "carry",
        power_iterations: int = 1,
        stagger: bool | int = True,
        min_rank: int = 1,
        rank_multiple: int = 1,
        check_gap: int = 50,
        **options: Unpack[Options],
    ) -> None:
        subspace = Subspace(
            residual_energy=residual_energy,
            criterion=criterion,
            threshold=0.0 if criterion is None else threshold,
            moments=moments,
            power_iterations=power_iterations,
            stagger=stagger,
            min_rank=min_rank,
            rank_multiple=rank_multiple,
            check_gap=check_gap,
        )
        super().__init__(
            params, lr, betas, eps, weight_decay, corrected=True, subspace=subspace, **options
        )
