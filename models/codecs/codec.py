"""The codecs by name, and the interface that all of them share.

A codec converts between keypoints and a network's output. Two levels, each with keypoints and
scores, or with all modes of a joint:

    from                     one keypoint per joint      ``count`` modes per joint
    a network's features     ``decode_features``         ``decode_feature_modes``
    heatmaps                 ``decode``                  ``decode_modes``

For Gaussian codecs both levels are the same, since they read nothing but the heatmaps. ``simcc``
and ``movenet`` decode a network's output by its bins or person heads; their ``decode`` is that of
``dark``, for the heatmaps that such networks predict as well.

The other direction is ``encode``, from labels to training targets, and ``render``, from modes to
heatmaps. ``frame`` defines how crops are cut, and ``flip_back`` mirrors a network's output for a
mirrored crop. ``models.build.build_codec`` builds a codec by name, ``movenet`` included.
"""

from __future__ import annotations

from models.codecs.gaussian import Dark, Msra, Udp
from models.codecs.simcc import SimCC

HeatmapCodec = Msra | Dark | Udp | SimCC

CODECS: dict[str, type[Msra] | type[Dark] | type[Udp] | type[SimCC]] = {
    "msra": Msra,
    "dark": Dark,
    "udp": Udp,
    "simcc": SimCC,
}
"""All codecs that fit every network."""
