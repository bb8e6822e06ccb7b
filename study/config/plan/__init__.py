"""YAML of each plan of a study: ``plan=NAME``."""
