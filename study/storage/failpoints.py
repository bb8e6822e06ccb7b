"""Points at which tests kill this process, to prove that a crash there loses nothing.

A point does nothing unless the environment variable ``POSE_STUDY_FAULTS`` names a folder that
holds a file of the point's name. The number in the file is how often the point is passed first;
then it kills once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

FOLDER = "POSE_STUDY_FAULTS"


def point(name: str) -> None:
    """Kill this process (SIGKILL) if a test armed the point."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    armed = Path(folder) / name
    try:
        remaining = int(armed.read_text())
    except FileNotFoundError:
        return
    if remaining:
        armed.write_text(str(remaining - 1))
        return
    armed.rename(armed.with_suffix(".done"))
    os.kill(os.getpid(), signal.SIGKILL)
