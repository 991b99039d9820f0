"""Thresholds found on a model's own attention, for a budget of error or density."""

from .run import Found, calibrate
from .search import Budget, CalibrationError

__all__ = ["Budget", "CalibrationError", "Found", "calibrate"]
