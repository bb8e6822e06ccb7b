"""plan_only=true: epochs, hours and disk before anything is computed.

report  the text of the plan
cost    epochs, confirming runs and disk
timing  seconds a step, measured here
"""
