"""What an exported pose estimator needs at inference, in torch alone.

Letters in shapes, here and everywhere: B batch, N people, K joints, E edges, C channels,
H W heatmap, h w crop. Sizes are ``(height, width)``; keypoints are ``(x, y)``.
"""
