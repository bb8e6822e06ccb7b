"""plan_only=true: report epochs, hours and disk space, compute nothing.

report  the report, section by section
cost    epochs, hours, disk space, and warnings
timing  seconds of a step, measured here
"""
