"""From annotation files to audited people and augmented crops.

coco_json      records of a COCO-format JSON file
categories     the people's category and its joints' names
annotations    images and annotations as two tables
coordinates    boxes and joints in unmeant units
audit          faults of a data set, listed
audit_notes    oddities that stop nothing
people         people of a file, split for a study
shared_people  people of a file in another one
coco_results   readers of COCO result lists
image_files    image headers: size, damage, orientation
crops          affines between image, stored and crop frames
augmentation   random affines, flips, colors and patches
skeleton_file  a skeleton as YAML, checked
own_skeletons  skeletons of a study, not built in
survey         figures, tables and a contact sheet
synthetic/     the built-in data set, drawn people
"""
