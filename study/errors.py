"""Errors that a study raises on purpose: wrong input, and a training that diverged."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, file or argument that its user can mend; the message says how."""


class TrainingDiverged(RuntimeError):
    """The loss is no number any more; another try would only repeat it."""
