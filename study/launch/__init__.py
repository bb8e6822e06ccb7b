"""Trials as Ray jobs: inline, or under Ray Train.

context       what trials share; link to the owner
trials        run a trial or the teacher's training
ray_train     workers under Ray Train, resources released
tune_adapter  what Ray Tune sees of a study
cluster       start or join Ray; trials that fit
watchdog      exit when a trial stalls
crop_tasks    cut crops on all nodes
"""
