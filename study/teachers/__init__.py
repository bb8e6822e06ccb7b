"""Kinds of teachers, and the making of a study's teacher.

adapters      our networks and others behind one interface
vitpose       ViTPose from a transformers folder
onnx_model    a pose network in an ONNX file
onnx_files    the files of an ONNX model
identity      names of its folders, from what decides it
online        the teacher, run at every training step
make          train the teacher, store its targets
target_error  error of stored against online targets
"""
