"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and real pictures; skips the test where it is missing."""
    folder = Path(os.environ.get("POSE_STUDY_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it holds the reference numbers and real pictures")
    return folder
