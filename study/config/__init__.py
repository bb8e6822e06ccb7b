"""Every setting: its type, meaning, value and check.

schema       types and meanings of all settings
compose      settings from YAML and command-line overrides
checks       which values are possible, alone and together
typed_paths  paths as people type them
study_paths  the paths of the settings
derived      skeletons, sizes and seeds that follow
data/        YAML of each kind of data
plan/        YAML of each plan of a study
study.yaml   the values of a study
"""
