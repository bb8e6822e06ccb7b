"""YAML of each kind of data: ``data=NAME``."""
