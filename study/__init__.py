"""How the best student and refiner are found: data, training, search, evidence."""

import os

# Ray reads both when ray.tune is first imported. Else Tune prints tables of its own, and ends the
# whole study over a trial that failed before its first report.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
