"""A study's folder: paths, atomic files, tables and checkpoints.

paths       every path of a study's folder
files       atomic writes, fingerprints, full disks
locks       locks between drivers, also without flock
tables      the Parquet tables: columns, writer, reader
checkpoint  epochs of a training on disk
study_file  study.yaml: written, read, compared
trackers    copies of reports for TensorBoard and MLflow
failpoints  points at which tests kill a process
"""
