"""Trials as Ray jobs: inline, or under Ray Train.

context       values that all jobs share
jobs          train a trial as a Ray job
trials        jobs of the search and the teacher
ray_train     workers under Ray Train, resources released
tune_adapter  what Ray Tune sees of a study
ray_start     check, start or join Ray
cluster       resources; trials that fit
watchdog      exit when a trial stalls
crop_tasks    cut crops on all nodes
"""
