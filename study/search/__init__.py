"""The Optuna study and the actor that owns it.

owner       the actor that decides and records
stage       one Optuna study of one stage
samplers    Optuna samplers and pruners by setting
objectives  constraints, costs and the Pareto front
staged      plan=staged: parents and their refiners
controls    control trials; settings of any trial
warm_start  trials of older studies
forecast    epochs that are still to come
"""
