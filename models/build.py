"""From a name to a model, and from an exported folder to a pose estimator that is ready to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.codec import CODECS, HeatmapCodec
from models.igp_gcn import IgpGcn
from models.mobile_net import SIZES, MobileNet
from models.movenet import MoveNet
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import SKELETONS, Skeleton

MODELS = {"mobile_net": MobileNet}
MOVENET = "movenet"
STRIDE = 4


def build_model(
    name: str, size: str, skeleton: Skeleton, codec: HeatmapCodec | None = None
) -> PoseNetwork:
    """A model with random weights that puts out one heatmap a joint, and what the codec reads."""
    if isinstance(codec, MoveNet):
        return MobileNet(skeleton.num_joints, SIZES[size], has_person_heads=True)
    return MODELS[name](skeleton.num_joints, SIZES[size])


def build_codec(name: str, input_size: tuple[int, int], sigma: float) -> HeatmapCodec:
    """The codec of heatmaps a quarter of ``input_size``, (height, width)."""
    height, width = input_size
    codec = MoveNet if name == MOVENET else CODECS[name]
    return codec(
        input_size=(height, width), heatmap_size=(height // STRIDE, width // STRIDE), sigma=sigma
    )


def load_weights(model: torch.nn.Module, path: Path) -> list[str]:
    """Copies the weights of a safetensors file; returns the keys that were left at random.

    Only a head of another joint count may differ; everything else must agree by name and shape.

    Raises:
        ValueError: other keys or shapes differ; names the first of them.
    """
    try:
        loaded = load_file(path)
    except Exception as error:  # safetensors has no exported exception type
        raise ValueError(f"{path} must be a safetensors file of weights: {error}") from None
    own = model.state_dict()
    head = [k for k in own if k.startswith("final_layer.") and k in loaded]
    head = [key for key in head if loaded[key].shape[1:] == own[key].shape[1:]]
    dropped = [key for key in head if loaded[key].shape[:1] != own[key].shape[:1]]
    kept = {key: value for key, value in loaded.items() if key not in dropped}
    differing = sorted(set(own) - set(loaded)) + sorted(set(loaded) - set(own))
    differing += [k for k in kept if k in own and own[k].shape != kept[k].shape]
    if differing:
        raise ValueError(
            f"{path} must hold this model's weights by name and shape; {len(differing)} differ, "
            f"the first are {differing[:5]}; change the model's name and size, or the file"
        )
    model.load_state_dict(kept, strict=False)
    return dropped


def build_refined_pose(info: Mapping[str, Any]) -> RefinedPose:
    """The pose estimator that an export's ``config.json`` describes, weights at random."""
    skeleton = SKELETONS[info["skeleton"]]
    height, width = info["input_size"]
    student = build_model(info["student"]["name"], info["student"]["size"], skeleton)
    codec = build_codec(info["codec"]["name"], (height, width), info["codec"]["sigma"])
    refiner = None
    if info["refiner"] is not None:
        refiner = IgpGcn(skeleton, student.pyramid_channels, **info["refiner"])
    return RefinedPose(student, codec, refiner)


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
