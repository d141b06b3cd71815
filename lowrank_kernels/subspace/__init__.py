"""Where a basis comes from, its rank, when it changes and what becomes of the moments."""

from .options import Subspace
from .range_finders import RANGE_FINDERS
from .refresh import Due, new_record, refresh_bases, workspace_bytes
from .when import Readback, is_due, is_measured, measure, new_measures

__all__ = [
    "RANGE_FINDERS",
    "Due",
    "Readback",
    "Subspace",
    "is_due",
    "is_measured",
    "measure",
    "new_measures",
    "new_record",
    "refresh_bases",
    "workspace_bytes",
]
