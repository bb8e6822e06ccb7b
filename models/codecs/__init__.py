"""Heatmaps and their decoding: how a network's output becomes keypoints.

codec          the codecs by name, and their interface
crop_frame     a crop's frame: size, center, length
gaussian       Gaussian heatmaps: msra, dark and udp
heatmap_peaks  peaks of heatmaps, refined below the cell
movenet        MoveNet's decoding, by a person's center
simcc          a joint's x and y among bins
"""
