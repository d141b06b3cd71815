"""Where a basis comes from, its rank, when it changes and what becomes of the moments."""

from .options import Subspace
from .range_finders import RANGE_FINDERS
from .refresh import (
    Due,
    Result,
    batch_size,
    found_bases,
    new_record,
    refresh_bases,
    take,
    tell,
)
from .when import Readback, is_due, is_measured, measure, measures_at, new_measures, next_look

__all__ = [
    "RANGE_FINDERS",
    "Due",
    "Readback",
    "Result",
    "Subspace",
    "batch_size",
    "found_bases",
    "is_due",
    "is_measured",
    "measure",
    "measures_at",
    "new_measures",
    "new_record",
    "next_look",
    "refresh_bases",
    "take",
    "tell",
]
