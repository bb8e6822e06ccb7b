"""Search for the best student and refiner: data, training, search, validation."""

import os
import sys

# Checked before torch is imported, which ends the process otherwise.
try:
    os.getcwd()
except FileNotFoundError:
    sys.exit("error: the working folder must exist, but was deleted; change to another one by cd")

# Ray reads both when ray.tune is first imported. By default Tune prints its own tables, and ends
# the whole study if a trial fails before its first report.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Ray Train polls whether its workers are done: by default every 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# It also starts a process per trial that watches for preempted nodes; every epoch is kept anyway.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# OpenMP reads it when torch is first imported. By default waiting threads spin and so occupy the
# cores that they wait for, if cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray needs a home when it is imported. The user of a container may have none.
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = "/"
