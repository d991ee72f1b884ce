"""Errors of this floor that a caller may want to tell apart."""


class UnsupportedModelError(ValueError):
    """The model cannot be taken apart exactly, and the message says why."""
