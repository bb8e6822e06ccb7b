"""Pose networks, the refiner and the codecs: what an exported estimator needs, in torch alone.

build            models and codecs by name; exports
candidates       the choice among a joint's peaks
codecs/          keypoints to heatmaps and back
hrnet            HRNet, at any width and depth
igp_gcn          IGP-GCN, the refiner of stage 2
joint_names      joints found by name, however spelled
mobile_net       MobileNetV2 with a feature pyramid
movenet_weights  MoveNet's weights from TF.js files
pose_features    inputs and outputs of pose networks
refined_pose     student, codec and refiner in one
residual         residual blocks of HRNet and SimpleBaseline
simcc_head       the layers that predict SimCC's bins
simple_baseline  a ResNet with transposed convolutions
skeleton         joints, edges, pairs and OKS sigmas
swap_resolver    left-right swaps in given poses
weights          loading files of trained weights

Letters in shapes, here and everywhere: B batch, N people, K joints, E edges, C channels,
H W heatmap, h w crop. Sizes are ``(height, width)``; keypoints are ``(x, y)``.
"""
