"""The choices that make up a subspace."""

from dataclasses import dataclass, fields

from .moments import MOMENTS
from .range_finders import RANGE_FINDERS

CRITERIA = ("norm", "relative_norm", "displacement")
ITERATED = ("randomized", "power")
# Options that do nothing unless another one is given.
SWITCHES = {
    "min_rank": "residual_energy",
    "rank_multiple": "residual_energy",
    "threshold": "criterion",
    "check_gap": "criterion",
}


@dataclass(frozen=True)
class Subspace:
    """Where a basis comes from, its rank, when it changes and what becomes of the moments.

    The defaults are GaLore's with a randomized range finder and with refreshes spread over the
    steps. `Subspace.named("svd")` is what the official packages do.

    Attributes:
        range_finder: "svd": exact singular vectors. "randomized": a sketch and power iterations, an
            order of magnitude faster. "power": the same from the previous basis. "random":
            orthonormal, without a look at the gradient. "gaussian": N(0, 1/r), not orthonormal;
            without a residual only.
        power_iterations: of "randomized" and "power".
        stagger: spreads the matrices' refreshes evenly over `update_proj_gap` steps, instead of all
            at once. An int k, of at least 2, puts them into every k-th step, so that on many GPUs
            several matrices are due together and their owners work side by side; k has to be the
            same after a resume. The first step computes all bases in any case.
        moments: "keep" (GaLore), "reset", "carry", "carry_ldadam" or "carry_absolute": see
            `lowrank_kernels.subspace.moments`.
        residual_energy: eta: each refresh takes the smallest rank that leaves at most this share of
            the gradient's energy |G|^2 outside; the group's `rank` is then the largest. None keeps
            the rank. State is allocated anew, so a smaller rank frees memory.
        min_rank: the smallest rank; with `residual_energy`.
        rank_multiple: ranks are rounded up to a multiple of this; with `residual_energy`.
        criterion: refreshes before `update_proj_gap` steps are over, as soon as a measure falls to
            `threshold`: "norm", |R| (AdaRankGrad); "relative_norm", |R| as a share of its value at
            the first step with this basis; "displacement", how far R / |R| has moved since then, a
            step (Lotus), which keeps one more matrix of R's size. None looks at nothing.
        threshold: of the criterion, above 0; there is no default that suits every model.
        check_gap: steps between two looks at the criterion. A measure taken at one step decides
            about the next one, so that no step waits for the device.
        lazy: Q-GaLore: if the mean overlap |P_new^T P_old|^2 / r of the last five refreshes is at
            least this, the matrix' interval doubles. None keeps the interval.
        interpolation: rho of LDAdam, in [0, 1): "power" iterates on rho P_old M / c1 + (1 - rho) G,
            from the previous basis and its first moment before they change, with c1 = 1 - beta1^t.
            A refresh then holds one more matrix of the gradient's size, in at least float32. Needs
            moments that are reset or follow the basis: of kept ones P_old M is no mean of
            gradients. 0, the default, is the gradient alone.

    Raises:
        ValueError: a value does not fit, or does nothing beside the others; the text names it.

    Sources: GaLore (arXiv 2403.03507), AdaRankGrad (arXiv 2410.17881), LDAdam (arXiv 2410.16103),
    Lotus (arXiv 2602.01233), Q-GaLore (arXiv 2407.08296).
    """

    range_finder: str = "randomized"
    power_iterations: int = 1
    stagger: bool | int = True
    moments: str = "keep"
    residual_energy: float | None = None
    min_rank: int = 1
    rank_multiple: int = 1
    criterion: str | None = None
    threshold: float = 0.0
    check_gap: int = 50
    lazy: float | None = None
    interpolation: float = 0.0

    def __post_init__(self) -> None:
        choices = {"range_finder": tuple(RANGE_FINDERS), "moments": MOMENTS}
        if self.criterion is not None:
            choices["criterion"] = CRITERIA
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"subspace: {name} must be one of {', '.join(known)}, got {value!r}"
                )
        for name in ("power_iterations", "min_rank", "rank_multiple", "check_gap"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"subspace: {name} must be an int of at least 1, got {value!r}")
        if not isinstance(self.stagger, int) or self.stagger < 0:
            raise ValueError(
                f"subspace: stagger must be True, False or an int of steps, got {self.stagger!r}"
            )
        for name in ("residual_energy", "lazy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"subspace: {name} must be in [0, 1] or None, got {value}")
        if self.residual_energy is not None and self.range_finder in ("random", "gaussian"):
            raise ValueError(
                f"subspace: residual_energy needs directions in the order of their energy, which"
                f" range_finder={self.range_finder!r} does not find"
            )
        if not self.orthonormal and self.moments.startswith("carry"):
            raise ValueError(f"subspace: moments={self.moments!r} needs an orthonormal basis")
        if self.criterion is not None and not self.threshold > 0:
            raise ValueError(
                f"subspace: criterion={self.criterion!r} needs a threshold above 0, to which its"
                f" measure can fall, got {self.threshold}"
            )
        self._check_interpolation()
        changed = self.changed()
        for name, switch in SWITCHES.items():
            if name in changed and switch not in changed:
                raise ValueError(
                    f"subspace: {name}={changed[name]!r} does nothing without {switch}"
                )
        if "power_iterations" in changed and self.range_finder not in ITERATED:
            raise ValueError(
                f"subspace: power_iterations={self.power_iterations} does nothing with"
                f" range_finder={self.range_finder!r}, only with {' or '.join(ITERATED)}"
            )

    def _check_interpolation(self) -> None:
        rho = self.interpolation
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho < 1:
            raise ValueError(f"subspace: interpolation must be in [0, 1), got {rho!r}")
        if not rho:
            return
        if self.range_finder != "power":
            raise ValueError(
                f"subspace: interpolation={rho} does nothing with"
                f" range_finder={self.range_finder!r}, only with power"
            )
        if self.moments == "keep":
            raise ValueError(
                f"subspace: interpolation={rho} needs moments that follow the basis, as"
                " moments='carry_ldadam'"
            )
        if self.residual_energy is not None:
            raise ValueError(
                "subspace: residual_energy needs directions in the order of the gradient's energy,"
                f" which interpolation={rho} does not find"
            )

    @classmethod
    def named(cls, choice: "str | Subspace", *, stagger: bool | int = True) -> "Subspace":
        """The subspace of a range finder's name; "svd" is the official one, never staggered."""
        if isinstance(choice, cls):
            return choice
        return cls(range_finder=str(choice), stagger=stagger and choice != "svd")

    @property
    def orthonormal(self) -> bool:
        return self.range_finder != "gaussian"

    def changed(self) -> dict[str, object]:
        """The choices that are not the default."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
