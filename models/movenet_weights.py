"""Reads MoveNet's trained weights (Google, single pose, version 4; Apache 2.0) from TF.js files.

The files are TF.js graph models: a JSON that lists the weights, and beside it a .bin with their
values one after another as little-endian numbers. The graph is not read and nothing is executed:
only the numbers are used, by the names and shapes that ``mobile_net`` expects at MoveNet's two
sizes, lightning and thunder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.mobile_net import InvertedResidual, MobileNet
from models.skeleton import COCO, Skeleton, rows_from
from models.weights import HEAD, SIMCC_HEAD

_GRAPH = "StatefulPartitionedCall"
_NETWORK = f"{_GRAPH}/center_net_mobile_net_v2fpn_feature_extractor/model_1"
_CONSTANTS = {
    f"{_GRAPH}/Reshape",
    f"{_GRAPH}/truediv",
    f"{_GRAPH}/sub_1/y",
    f"{_GRAPH}/add_5/y",
    f"{_GRAPH}/Reshape_13",
    f"{_GRAPH}/strided_slice_3",
    f"{_GRAPH}/strided_slice_4",
    f"ConstantFolding/{_GRAPH}/truediv_2_recip",
}
"""Constants of the normalization and the decoding, which ``pose_features.MOVENET`` and
``codecs/movenet.py`` have as code."""
_NUMPY_TYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}
"""Little-endian NumPy types by the names in the files."""


def weight_files(path: Path) -> list[Path]:
    """List a MoveNet's .json and the .bin files beside it.

    Raises:
        ValueError: ``path`` is not such a .json, or a .bin is missing.
    """
    files = [path, *(path.parent / name for group in _manifest(path) for name in group["paths"])]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"the weights of {path.name} must lie beside it in {file.name}, got no such file "
                f"in {path.parent}; put both files of the MoveNet into one folder"
            )
    return files


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read all tensors of a TF.js graph model by name, in TensorFlow's layout.

    Raises:
        ValueError: a file is missing or unreadable, or a .bin has the wrong length.
    """
    weight_files(path)
    tensors = {}
    for group in _manifest(path):
        data = b"".join((path.parent / name).read_bytes() for name in group["paths"])
        types = [np.dtype(_numpy_type(path, weight)) for weight in group["weights"]]
        counts = [math.prod(weight["shape"]) for weight in group["weights"]]
        expected = sum(n * dtype.itemsize for n, dtype in zip(counts, types, strict=True))
        if expected != len(data):
            raise ValueError(
                f"{', '.join(group['paths'])} must have {expected} bytes according to "
                f"{path.name}, got {len(data)}; copy both files of the MoveNet again"
            )
        start = 0
        for weight, dtype, count in zip(group["weights"], types, counts, strict=True):
            numbers = np.frombuffer(data, dtype, count, start)
            tensors[weight["name"]] = numbers.reshape(weight["shape"])
            start += count * dtype.itemsize
    return tensors


def load_movenet(network: nn.Module, path: Path, skeleton: Skeleton) -> list[str]:
    """Copy MoveNet's weights into a lightning or thunder; return the parameters left random.

    The heatmap head has COCO's joints; ``rows_from`` assigns its rows to the skeleton's joints. A
    joint without a row keeps its random weights, and the head's parameters are returned as random.
    The files have no SimCC head, so its parameters are always returned.

    Args:
        network: must have one of the two sizes.
        path: the .json; the .bin lies beside it.
        skeleton: the joints of the network's heatmaps.

    Raises:
        ValueError: the network is not a MoveNet, or the file is not of its size; the message
            names the first tensors that differ.
    """
    if not isinstance(network, MobileNet) or not network.is_folded:
        raise ValueError(
            f"{path} holds a MoveNet, which only fits mobile_net of the sizes lightning and "
            "thunder; change the model's name and size, or init"
        )
    if network.person is not None and skeleton.joints != COCO.joints:
        raise ValueError(
            "codec movenet must have COCO's joints, which are the only ones that MoveNet's person "
            f"heads know, got those of {skeleton.name}; set teacher.skeleton=coco to use MoveNet "
            "without training, or change the codec and train it on these joints"
        )
    tensors, names = read_tensors(path), _names_in_file(network)
    rows = rows_from(COCO, skeleton)
    weights, differing = {}, []
    own_weights = network.state_dict()
    simcc_head = {key: own for key, own in own_weights.items() if key.startswith(SIMCC_HEAD)}
    for key, own in own_weights.items():
        if key in simcc_head:
            continue
        is_by_joint = key.startswith(HEAD)
        expected = [COCO.num_joints, *own.shape[1:]] if is_by_joint else list(own.shape)
        weight = _torch_tensor(names[key], tensors)
        if weight is None or list(weight.shape) != expected:
            found = "no such tensor" if weight is None else list(weight.shape)
            differing.append(f"{names[key]} must be {expected}, got {found}")
        elif is_by_joint:
            copied = [weight[row] if row is not None else own[i] for i, row in enumerate(rows)]
            weights[key] = torch.stack(copied)
        else:
            weights[key] = weight
    floats = {name for name, tensor in tensors.items() if tensor.dtype.kind == "f"}
    unknown = floats - _CONSTANTS - set(names.values())
    differing += [f"{name} is unknown" for name in sorted(unknown)]
    if differing:
        raise ValueError(
            f"{path} must hold the MoveNet of the model's size; {len(differing)} tensors differ: "
            f"{'; '.join(differing[:3])}; change the model's size, or the file"
        )
    network.load_state_dict(weights | simcc_head)
    random_head = [f"{HEAD}weight", f"{HEAD}bias"] if None in rows else []
    return random_head + list(simcc_head)


def _manifest(path: Path) -> list[dict[str, Any]]:
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["weightsManifest"]
        names = [name for group in groups for name in group["paths"]]
        weights = [weight for group in groups for weight in group["weights"]]
        is_listed = all({"name", "shape", "dtype"} <= set(weight) for weight in weights)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} must be the .json of a MoveNet for TF.js: {error}") from None
    if not is_listed or not names or any(Path(name).name != name for name in names):
        raise ValueError(
            f"{path} must be the .json of a MoveNet for TF.js, which lists its weights and the "
            "files beside it that hold them, got a JSON without such lists; check the path"
        )
    return list(groups)


def _numpy_type(path: Path, weight: dict[str, Any]) -> str:
    stored = weight.get("quantization", weight)["dtype"]
    if stored not in _NUMPY_TYPES:
        raise ValueError(
            f"the weights of {path} must be stored as {', '.join(_NUMPY_TYPES)}, got {stored} for "
            f"{weight['name']}; use MoveNet's files in half precision"
        )
    return _NUMPY_TYPES[stored]


def _names_in_file(network: MobileNet) -> dict[str, str]:
    """Map each parameter of a network with all heads to its name in the file."""
    names = {}

    def folded(own: str, file: str, kind: str = "Conv2D") -> None:
        names[f"{own}.0.weight"] = f"{_NETWORK}/model/{file}/{kind}_weights"
        names[f"{own}.0.bias"] = f"{_NETWORK}/model/{file}/{kind}_bn_offset"

    def plain(own: str, file: str) -> None:
        names[f"{own}.weight"] = f"{file}/Conv2D/ReadVariableOp"
        names[f"{own}.bias"] = f"{file}/BiasAdd/ReadVariableOp"

    folded("stem", "Conv1")
    residuals = [(n, m) for n, m in network.named_modules() if isinstance(m, InvertedResidual)]
    for number, (own, residual) in enumerate(residuals):
        file = f"block_{number}" if number else "expanded_conv"
        parts = ("expand", "depthwise", "project")[-len(residual.conv) :]
        for place, part in enumerate(parts):
            kind = part if part == "depthwise" else "Conv2D"
            folded(f"{own}.conv.{place}", f"{file}_{part}", kind)
    folded("last", "Conv_1")
    plain("top", f"{_NETWORK}/conv2d")
    for index, suffix in enumerate(("", "_1", "_2")):
        plain(f"laterals.{index}", f"{_NETWORK}/conv2d_{3 - index}")
        file = f"{_NETWORK}/separable_conv2d{suffix}/separable_conv2d"
        names[f"smooth.{index}.0.weight"] = f"{file}/ReadVariableOp"
        names[f"smooth.{index}.1.weight"] = f"{file}_weights"
        names[f"smooth.{index}.1.bias"] = f"{file}_bn_offset"
    for first, second, file, number in (
        ("head", "final_layer", "kpt_heatmap_0", 4),
        ("person.center.0", "person.center.1", "center_0", 3),
        ("person.regression.0", "person.regression.1", "kpt_regress_0", 5),
        ("person.offsets.0", "person.offsets.1", "kpt_offset_0", 6),
    ):
        separable = f"{_GRAPH}/{file}/separable_conv2d_{number}"
        names[f"{first}.0.weight"] = f"{separable}/separable_conv2d/ReadVariableOp"
        names[f"{first}.1.weight"] = f"{separable}/separable_conv2d/ReadVariableOp_1"
        names[f"{first}.1.bias"] = f"{separable}/BiasAdd/ReadVariableOp"
        plain(second, f"{_GRAPH}/{file}/conv2d_{number + 1}")
    return names


def _torch_tensor(name: str, tensors: Mapping[str, NDArray[Any]]) -> Tensor | None:
    """Convert the tensor to torch's layout; None if there is none of that name."""
    if name not in tensors:
        return None
    tensor = torch.from_numpy(tensors[name].astype(np.float32))
    if tensor.ndim != 4:
        return tensor
    is_depthwise = name.endswith(("depthwise_weights", "separable_conv2d/ReadVariableOp"))
    return tensor.permute(2, 3, 0, 1) if is_depthwise else tensor.permute(3, 2, 0, 1)
