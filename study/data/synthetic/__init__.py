"""Drawn people, labeled like COCO.

dataset     a drawn data set, resumable
scene       people, occluders and labels of one image
body        poses and proportions of one person
geometry    capsules, polygons and their visibility
appearance  colors and textures
render      pixels of a scene
"""
