"""Choose, prove and package a trial; read what it runs on.

select_trial      the trial to export
model_card        the exported model's card
onnx_export       ONNX files, checked against torch
inputs            images of a user, found and read
image_records     a user's images in a file
person_boxes      boxes of people from a file
detector          people's boxes by an ONNX file
detector_outputs  layouts of detectors' outputs
estimation        poses of boxes in one image
drawing           poses drawn on their image
video             frames in, poses and video out
given_poses       poses of other methods to refine
outputs           drawings, results and problems of images
"""
