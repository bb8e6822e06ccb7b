"""Errors that a study raises on purpose: wrong input, and diverged training."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, file or argument that the user can fix; the message says how."""


class TrainingDiverged(RuntimeError):
    """A loss or prediction that is not finite; another attempt would only repeat it."""
