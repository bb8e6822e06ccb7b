"""The codecs by name. Each encodes keypoints for training and reads a network's answer.

``decode_features(features)`` returns keypoints and scores; ``decode_feature_modes(features,
count)`` returns the several places of a joint. ``frame`` says how the crop is cut;
``flip_back`` mirrors the heatmaps of a mirrored crop back.
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
