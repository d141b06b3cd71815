"""Where a basis comes from, its rank, when it changes and what becomes of the moments."""

from .options import Subspace
from .range_finders import RANGE_FINDERS
from .refresh import Due, batch_size, new_record, refresh_bases
from .when import Readback, is_due, is_measured, measure, new_measures, next_look

__all__ = [
    "RANGE_FINDERS",
    "Due",
    "Readback",
    "Subspace",
    "batch_size",
    "is_due",
    "is_measured",
    "measure",
    "new_measures",
    "new_record",
    "next_look",
    "refresh_bases",
]
