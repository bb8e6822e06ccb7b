"""Data that are computed once and read by all trials.

study_people     a study's people, audited and split
detected_people  a detector's boxes, compared with labels
prepare          the crop stores of a study's people
crop_store       the crops of one split
crop_parts       part files of crops, raw or JPEG
crop_bucket      crop stores in an object store
teacher_store    the teacher's targets of every person
predictions      poses of other methods, matched to people
arrow_file       one table in a memory-mapped file
"""
