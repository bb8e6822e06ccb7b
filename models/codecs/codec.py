"""The codecs by name. Each encodes keypoints for training and reads a network's answer.

``read(features)`` gives keypoints and scores, ``read_modes(features, count)`` a joint's several
places; ``frame`` says how the crop is cut, ``flip_back`` turns the answer to its mirror round.
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
