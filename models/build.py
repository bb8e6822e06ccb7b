"""From a name to a model, and from an exported folder to a pose estimator that is ready to use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from models import hrnet, mobile_net, simple_baseline
from models.codecs.codec import CODECS, HeatmapCodec
from models.codecs.movenet import MoveNet
from models.codecs.simcc import SimCC
from models.hrnet import HRNet
from models.igp_gcn import IgpGcn
from models.mobile_net import MobileNet
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.simcc_head import SimccHead
from models.simple_baseline import SimpleBaseline
from models.skeleton import SKELETONS, Skeleton

MODELS: dict[str, tuple[Callable[[int, Any], PoseNetwork], Mapping[str, Any]]] = {
    "mobile_net": (MobileNet, mobile_net.SIZES),
    "hrnet": (HRNet, hrnet.SIZES),
    "simple_baseline": (SimpleBaseline, simple_baseline.SIZES),
}
"""What takes a number of joints and a size, and the sizes by name."""
MOVENET = "movenet"
STRIDE = 4


def build_model(
    name: str, size: str, skeleton: Skeleton, codec: HeatmapCodec | None = None
) -> PoseNetwork:
    """A model with random weights that puts out one heatmap a joint, and what the codec reads."""
    if isinstance(codec, MoveNet):
        return MobileNet(skeleton.num_joints, mobile_net.SIZES[size], has_person_heads=True)
    network, sizes = MODELS[name]
    model = network(skeleton.num_joints, sizes[size])
    if isinstance(codec, SimCC):
        model.simcc_head = SimccHead(
            model.pyramid_channels[-1], skeleton.num_joints, codec.heatmap_size, codec.num_bins
        )
    return model


def build_codec(name: str, input_size: tuple[int, int], sigma: float) -> HeatmapCodec:
    """The codec of heatmaps a quarter of ``input_size``, (height, width)."""
    height, width = input_size
    codec = MoveNet if name == MOVENET else CODECS[name]
    return codec(
        input_size=(height, width), heatmap_size=(height // STRIDE, width // STRIDE), sigma=sigma
    )


def build_refined_pose(info: Mapping[str, Any]) -> RefinedPose:
    """The pose estimator that an export's ``config.json`` describes, weights at random."""
    skeleton = SKELETONS[info["skeleton"]]
    height, width = info["input_size"]
    codec = build_codec(info["codec"]["name"], (height, width), info["codec"]["sigma"])
    student = build_model(info["student"]["name"], info["student"]["size"], skeleton, codec)
    refiner = None
    if info["refiner"] is not None:
        refiner = IgpGcn(skeleton, student.pyramid_channels, **info["refiner"])
    flip_order = skeleton.flip_order if info.get("flip_test") else None
    return RefinedPose(student, codec, refiner, flip_order)


def load_export(folder: Path) -> tuple[RefinedPose, dict[str, Any]]:
    """The exported pose estimator in eval mode, and its ``config.json``.

    Raises:
        ValueError: the folder is no export, or one whose files do not fit together.
    """
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = build_refined_pose(info)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder} must be an export, with config.json and model.safetensors that fit; "
            f"make one by python study/export.py STUDY ({reason[:300]})"
        ) from None
    return model.eval(), info
