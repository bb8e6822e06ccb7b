"""Heatmaps and their decoding: how a network's output becomes keypoints.

crop_frame     frames of crop, heatmap and grid
gaussian       heatmaps: msra, dark and udp
simcc          two vectors a joint: SimCC
heatmap_peaks  peaks and modes of heatmaps
codec          the interface of all codecs
"""
