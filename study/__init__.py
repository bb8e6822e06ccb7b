"""How the best student and refiner are found: data, training, search, evidence."""

import os

# Ray reads it when ray.tune is first imported: else Tune prints tables of its own.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
