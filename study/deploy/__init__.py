"""Choose, prove and package a trial; read what it runs on.

select_trial      the trial to export
model_card        the exported model's card
onnx_export       ONNX files, checked against torch
inputs            images and boxes to predict on
detector          people's boxes by an ONNX file
detector_outputs  layouts of detectors' outputs
estimation        poses of boxes in one image
drawing           poses drawn on their image
video             frames in, poses and video out
given_poses       poses of other methods to refine
"""
