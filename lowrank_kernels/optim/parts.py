"""The parts that an optimizer is put together of."""

from dataclasses import asdict
from typing import Literal, NamedTuple

from ..subspace import Subspace
from .formats import BASIS_FORMATS, STATE_FORMATS, BasisFormat, MasterBits, StateFormat
from .outside import AMPLIFIED, Outside

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")


class Method(NamedTuple):
    """What every step of an optimizer is taken with; see `LowRankAdamW`."""

    outside: Outside
    corrected: bool
    subspace: Subspace
    rounding: Rounding
    capturable: bool
    monitor: bool
    state: StateFormat
    basis: BasisFormat
    master: MasterBits

    @property
    def counters(self) -> tuple[str, ...]:
        """The 0-d entries of a projected state beside what its subspace keeps."""
        limiter = ("limiter_norm",) if self.outside.is_limited else ()
        return limiter + (("nonfinite", "limited", "norm_sq") if self.monitor else ())

    def described(self) -> str:
        """What makes a state: kept beside it, so that a checkpoint tells what it is of."""
        subspace = asdict(self.subspace)
        if not self.subspace.interpolation:
            del subspace["interpolation"]  # as before there was any
        parts = {
            **self.outside.described(),
            "corrected": self.corrected,
            "rounding": self.rounding,
            **subspace,
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items())

    def check(self) -> None:
        """Raises ValueError if a part is unknown, or does not go with another."""
        residual, subspace = self.outside.residual, self.subspace
        self.outside.check()
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}"
            )
        if self.state not in STATE_FORMATS:
            raise ValueError(f"state must be one of {', '.join(STATE_FORMATS)}, got {self.state!r}")
        if self.basis not in BASIS_FORMATS:
            raise ValueError(f"basis must be one of {', '.join(BASIS_FORMATS)}, got {self.basis!r}")
        if self.master is not None and (type(self.master) is not int or self.master != 24):
            raise ValueError(f"master must be 24 or None, got {self.master!r}")
        if self.master is not None and self.rounding == "stochastic":
            raise ValueError(
                "master=24 keeps what rounding drops, so that there is nothing to round"
                " stochastically: choose one of the two"
            )
        if residual not in (None, "scale") and not subspace.orthonormal:
            raise ValueError(
                f"residual={residual!r} needs an orthonormal basis, which"
                f" range_finder={subspace.range_finder!r} is not"
            )
        if residual in AMPLIFIED and self.basis == "int4":
            raise ValueError(
                f"residual={residual!r} needs a basis that is nearly orthonormal, which 4 bits are"
                " too few for: take basis='int8', or 'weight'"
            )
        moving = (subspace.residual_energy, subspace.criterion, subspace.lazy)
        if self.capturable and (any(x is not None for x in moving) or subspace.moments == "reset"):
            raise ValueError(
                "capturable=True replays one step as it was: it cannot go with a subspace that has"
                " a residual_energy, a criterion, lazy refreshes or moments='reset'"
            )
