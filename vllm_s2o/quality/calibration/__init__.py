"""Thresholds found on a model's own attention, for a budget of error or density."""

from .run import CalibrationError, Found, calibrate
from .search import Budget

__all__ = ["Budget", "CalibrationError", "Found", "calibrate"]
