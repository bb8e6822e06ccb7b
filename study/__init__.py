"""How the best student and refiner are found: data, training, search, evidence."""

import os

# Ray reads both when ray.tune is first imported. Else Tune prints tables of its own, and ends the
# whole study over a trial that failed before its first report.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Ray Train hears that its workers are done when it next looks: at first every 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# And has a process for each trial that would tell it of nodes to be taken away; epochs are kept
# anyhow.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Read when torch is first imported. Else threads that wait for one another burn the very cores
# that they wait for, wherever these are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
