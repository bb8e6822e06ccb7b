"""Builds models and codecs by name, and loads exported pose estimators."""

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
"""Each model's class, which takes a number of joints and a size, and its sizes by name."""
MOVENET = "movenet"
"""The codec that is not in CODECS, since it needs MoveNet's person heads."""
STRIDE = 4
"""Crop pixels per heatmap cell."""


def build_model(
    name: str, size: str, skeleton: Skeleton, codec: HeatmapCodec | None = None
) -> PoseNetwork:
    """Build a model with random weights: one heatmap per joint, and any heads the codec needs."""
    if isinstance(codec, MoveNet):
        return MobileNet(skeleton.num_joints, mobile_net.SIZES[size], has_person_heads=True)
    model_class, sizes = MODELS[name]
    model = model_class(skeleton.num_joints, sizes[size])
    if isinstance(codec, SimCC):
        model.simcc_head = SimccHead(
            model.pyramid_channels[-1], skeleton.num_joints, codec.heatmap_size, codec.num_bins
        )
    return model


def build_codec(name: str, input_size: tuple[int, int], sigma: float) -> HeatmapCodec:
    """Build the codec for crops of ``input_size``, (height, width), and heatmaps at STRIDE."""
    height, width = input_size
    codec_class = MoveNet if name == MOVENET else CODECS[name]
    return codec_class(
        input_size=(height, width), heatmap_size=(height // STRIDE, width // STRIDE), sigma=sigma
    )


def exported_skeleton(info: Mapping[str, Any]) -> Skeleton:
    """Return the skeleton described by an export's ``config.json``.

    Exports of earlier versions have the name of one that is built in, without pairs and sigmas.
    """
    if "flip_pairs" not in info:
        return SKELETONS[info["skeleton"]]
    return Skeleton(
        name=info["skeleton"],
        joints=tuple(info["joints"]),
        edges=tuple((start, end) for start, end in info["edges"]),
        flip_pairs=tuple((left, right) for left, right in info["flip_pairs"]),
        oks_sigmas=tuple(info["oks_sigmas"]),
        upper_body=(),
    )


def build_refined_pose(info: Mapping[str, Any]) -> RefinedPose:
    """Build the estimator described by an export's ``config.json``, with random weights."""
    skeleton = exported_skeleton(info)
    height, width = info["input_size"]
    codec = build_codec(info["codec"]["name"], (height, width), info["codec"]["sigma"])
    student = build_model(info["student"]["name"], info["student"]["size"], skeleton, codec)
    refiner = None
    if info["refiner"] is not None:
        refiner = IgpGcn(skeleton, student.pyramid_channels, **info["refiner"])
    flip_order = skeleton.flip_order if info.get("flip_test") else None
    return RefinedPose(student, codec, refiner, flip_order)


def load_export(folder: Path) -> tuple[RefinedPose, dict[str, Any]]:
    """Load an exported estimator, in eval mode, and its ``config.json``.

    Raises:
        ValueError: the folder is not an export, or its files do not match.
    """
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = build_refined_pose(info)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder} must be an export, with config.json and model.safetensors that match; "
            f"make one by python study/export.py STUDY ({reason[:300]})"
        ) from None
    return model.eval(), info
