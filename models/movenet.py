"""MoveNet (Google, single pose, version 4; Apache 2.0): its trained files and its own decoding.

The files are TF.js graph models: a JSON with a list of the weights, and beside it a .bin with the
weights themselves, one after another as little-endian numbers. Nothing in them is executed: the
graph is not read, only the numbers, each by the name and the shape that the network of this
project expects. ``mobile_net`` has the network at MoveNet's two sizes, lightning and thunder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.codecs.gaussian import Dark
from models.mobile_net import InvertedResidual, MobileNet
from models.pose_features import PoseFeatures
from models.skeleton import COCO, Skeleton, rows_from
from models.weights import HEAD, SIMCC_HEAD

_GRAPH = "StatefulPartitionedCall"
_NETWORK = f"{_GRAPH}/center_net_mobile_net_v2fpn_feature_extractor/model_1"
_CONSTANTS = {  # of the pixels and of the decoding: MOVENET and MoveNet state the same
    *(f"{_GRAPH}/{name}" for name in ("Reshape", "truediv", "sub_1/y", "add_5/y", "Reshape_13")),
    *(f"{_GRAPH}/{name}" for name in ("strided_slice_3", "strided_slice_4")),
    f"ConstantFolding/{_GRAPH}/truediv_2_recip",
}
_NUMBERS = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}
_NEAR = 1.8
"""Cells that MoveNet adds to a distance before it divides by it; the files round it to half
precision."""
_OWN_PEAK = 2.0
"""Cells from MoveNet's answer within which a peak is the answer's own."""


def weight_files(path: Path) -> list[Path]:
    """A MoveNet's .json and the .bin files that lie beside it.

    Raises:
        ValueError: it is no such .json, or a .bin is missing.
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
    """All tensors of a TF.js graph model by name, in TensorFlow's layout.

    Raises:
        ValueError: no such file, or a .bin that is missing or of another length.
    """
    weight_files(path)
    tensors = {}
    for group in _manifest(path):
        data = b"".join((path.parent / name).read_bytes() for name in group["paths"])
        kinds = [np.dtype(_number_of(path, weight)) for weight in group["weights"]]
        counts = [math.prod(weight["shape"]) for weight in group["weights"]]
        wanted = sum(n * kind.itemsize for n, kind in zip(counts, kinds, strict=True))
        if wanted != len(data):
            raise ValueError(
                f"{', '.join(group['paths'])} must have {wanted} bytes, as {path.name} says, got "
                f"{len(data)}; copy both files of the MoveNet again"
            )
        start = 0
        for weight, kind, count in zip(group["weights"], kinds, counts, strict=True):
            numbers = np.frombuffer(data, kind, count, start)
            tensors[weight["name"]] = numbers.reshape(weight["shape"])
            start += count * kind.itemsize
    return tensors


def load_movenet(network: nn.Module, path: Path, skeleton: Skeleton) -> list[str]:
    """Copies MoveNet's weights into a lightning or thunder; returns the names left at random.

    The heatmap head is of COCO's joints; its rows go to the skeleton's joints as ``rows_from``
    says. Where that leaves a joint without, its row stays random, and the head counts as left. So
    does simcc's head, of which the file has nothing.

    Args:
        path: the .json; the .bin lies beside it.
        skeleton: that of the network's heatmaps.

    Raises:
        ValueError: the file or the network is another one; names the first tensors that differ.
    """
    if not isinstance(network, MobileNet) or not network.is_folded:
        raise ValueError(
            f"{path} holds a MoveNet, which fits mobile_net of the sizes lightning and thunder "
            "alone; change the model's name and size, or init"
        )
    if network.person is not None and skeleton.joints != COCO.joints:
        raise ValueError(
            "MoveNet's own decoding knows COCO's joints alone, got codec movenet and the joints "
            f"of {skeleton.name}; set teacher.skeleton=coco to use it as it comes, or change the "
            "codec and train it on these joints"
        )
    tensors, names = read_tensors(path), _names(network)
    rows = rows_from(COCO, skeleton)
    weights, differing = {}, []
    every = network.state_dict()
    of_simcc = {key: own for key, own in every.items() if key.startswith(SIMCC_HEAD)}
    for key, own in every.items():
        if key in of_simcc:
            continue
        is_by_joint = key.startswith(HEAD)
        wanted = [COCO.num_joints, *own.shape[1:]] if is_by_joint else list(own.shape)
        weight = _as_torch(names[key], tensors)
        if weight is None or list(weight.shape) != wanted:
            came = "no such tensor" if weight is None else list(weight.shape)
            differing.append(f"{names[key]} must be {wanted}, got {came}")
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
    network.load_state_dict(weights | of_simcc)
    return [*((f"{HEAD}weight", f"{HEAD}bias") if None in rows else ()), *of_simcc]


@dataclasses.dataclass(frozen=True)
class MoveNet(Dark):
    """MoveNet's own decoding: of several peaks, the one where the person's center expects it.

    For a network that carries the person heads. In MoveNet's maps a joint's peak is the cell that
    it lies in, cell i reaching from crop pixel stride * i to the next cell's; ``dark``, whose
    cell i lies at that pixel, would read them half a cell too low.
    """

    def decode_features(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """Each joint by the official rule.

        The center is the cell of the highest center map, weighed down away from the middle; a
        joint the cell of the highest heatmap, weighed down away from where ``regression`` at the
        center expects it; its place is the cell plus ``offsets`` there.

        Returns:
            keypoints_crop (B, K, 2) and scores (B, K), the heatmaps' values at those cells.
        """
        heatmaps, person = self._checked(features.heatmaps), features.person
        if person is None:
            raise ValueError(
                "codec movenet must have a MoveNet with all its heads, got heatmaps alone; "
                "change the codec"
            )
        height, width = self.heatmap_size
        rows = torch.arange(height, device=heatmaps.device, dtype=heatmaps.dtype)[:, None]
        columns = torch.arange(width, device=heatmaps.device, dtype=heatmaps.dtype)
        nearness = 1 / (torch.hypot(rows - height // 2, columns - width // 2) + _NEAR)
        centers = (person.center[:, 0].float().sigmoid() * nearness).flatten(1).argmax(dim=1)
        expected = _pairs_at(person.regression, centers[:, None].expand(heatmaps.shape[:2]))
        y = expected[..., 0] + (centers // width)[:, None]  # (B, K)
        x = expected[..., 1] + (centers % width)[:, None]
        away = torch.hypot(rows - y[..., None, None], columns - x[..., None, None])
        cells = (heatmaps / (away + _NEAR)).flatten(2).argmax(dim=2)
        offset_y, offset_x = _pairs_at(person.offsets, cells).unbind(dim=-1)
        places = torch.stack((cells % width + offset_x, cells // width + offset_y), dim=-1)
        scores = heatmaps.flatten(2).gather(2, cells[..., None])[..., 0]
        return places * self._stride(places), scores

    def decode_feature_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """The official answer as first mode, then the heatmaps' other peaks, highest first.

        A peak near the answer is the answer's own: it gives it its width and is no other mode.

        Returns:
            Modes (B, K, count, 4), as those of ``decode_modes``.
        """
        places, scores = self.decode_features(features)
        stride = self._stride(places)
        peaks = self.decode_modes(features.heatmaps, count)
        half_a_cell = torch.cat((stride / 2, stride.new_zeros(2)))
        peaks = torch.where(peaks[..., 2:3] > 0, peaks + half_a_cell, peaks)
        away = ((peaks[..., :2] - places[:, :, None]) / stride).norm(dim=-1)
        is_own = (away <= _OWN_PEAK) & (peaks[..., 2] > 0)
        widths = torch.where(is_own, peaks[..., 3], 0.0).amax(dim=-1)
        widths = torch.where(is_own.any(dim=-1), widths, 1.0)
        first = torch.stack((*places.unbind(dim=-1), scores, widths), dim=-1)
        nothing = peaks.new_tensor((0.0, 0.0, 0.0, 1.0))
        others = torch.where(is_own[..., None], nothing, peaks)
        order = others[..., 2].argsort(dim=-1, descending=True, stable=True)[..., : count - 1]
        others = others.gather(2, order[..., None].expand(*order.shape, 4))
        return torch.cat((first[:, :, None], others), dim=2)


def _pairs_at(maps: Tensor, cells: Tensor) -> Tensor:
    """The (y, x) of each joint, (B, K, 2), that maps (B, 2 K, H, W) hold at its cell, (B, K)."""
    pairs = maps.detach().float().flatten(2).unflatten(1, (-1, 2))  # (B, K, 2, H W)
    return pairs.gather(3, cells[:, :, None, None].expand(-1, -1, 2, 1))[..., 0]


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
            "files beside it that hold them"
        )
    return list(groups)


def _number_of(path: Path, weight: dict[str, Any]) -> str:
    stored = weight.get("quantization", weight)["dtype"]
    if stored not in _NUMBERS:
        raise ValueError(
            f"the weights of {path} must be stored as {', '.join(_NUMBERS)}, got {stored} for "
            f"{weight['name']}; use MoveNet's files in half precision"
        )
    return _NUMBERS[stored]


def _names(network: MobileNet) -> dict[str, str]:
    """The file's name of each parameter of a network with all heads."""
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


def _as_torch(name: str, tensors: Mapping[str, NDArray[Any]]) -> Tensor | None:
    """The tensor in torch's layout, None if there is none."""
    if name not in tensors:
        return None
    tensor = torch.from_numpy(tensors[name].astype(np.float32))
    if tensor.ndim != 4:
        return tensor
    is_depthwise = name.endswith(("depthwise_weights", "separable_conv2d/ReadVariableOp"))
    return tensor.permute(2, 3, 0, 1) if is_depthwise else tensor.permute(3, 2, 0, 1)
