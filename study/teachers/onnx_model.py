"""A pose network in an ONNX file as a teacher, with heatmaps or SimCC's column and row scores.

Sizes are read from the model: from its input's shape and its outputs for one black crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.pose_features import IMAGENET, Pixels, PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.errors import InputError
from study.teachers.onnx_files import onnx_files

ONNX_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
PIXELS = {"imagenet": IMAGENET, "unit": Pixels((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))}


class OnnxHeatmaps(PoseNetwork):
    """A network in an ONNX file that outputs heatmaps; it has no features."""

    def __init__(self, session: Any, pixels: str, heatmap_size: tuple[int, int]) -> None:
        super().__init__()
        self.session = session
        self.pixels = PIXELS[pixels]
        self.heatmap_size = heatmap_size

    def forward(self, crops: Tensor) -> PoseFeatures:
        return PoseFeatures(_run(self.session, crops)[0], ())


class OnnxSimcc(nn.Module):
    """A network in an ONNX file that outputs SimCC's scores.

    For crops (B, 3, h, w), RGB in 0..255, and r bins per pixel it returns scores of the columns
    (B, K, w * r) and of the rows (B, K, h * r).
    """

    def __init__(self, session: Any, pixels: str) -> None:
        super().__init__()
        self.session = session
        self.pixels = PIXELS[pixels]

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        columns, rows = _run(self.session, self.pixels.normalize(crops))
        return columns, rows


def open_onnx(
    path: Path, skeleton: Skeleton, input_size: tuple[int, int], pixels: str
) -> OnnxHeatmaps | OnnxSimcc:
    """Open an ONNX file, and decide by its output shapes which kind of network it is.

    Raises:
        InputError: the file can't be opened, or its inputs or outputs don't fit.
    """
    session = open_session(path, "teacher.name=onnx", "teacher.init", ONNX_PROVIDERS)
    _check_input(session, path, input_size)
    outputs = _run(session, torch.zeros(1, 3, *input_size))
    shapes = [tuple(output.shape) for output in outputs]
    ranks = [len(shape) for shape in shapes]
    if ranks not in ([4], [3, 3]):
        raise InputError(
            f"{path} must output heatmaps (B, K, H, W), or SimCC's columns (B, K, W) and rows "
            f"(B, K, H), got {shapes}; export it without decoding and without other outputs"
        )
    joints = {shape[1] for shape in shapes}
    if joints != {skeleton.num_joints}:
        raise InputError(
            f"the teacher must have {skeleton.num_joints} joints ({skeleton.name}), got "
            f"outputs of {shapes} from {path}; change teacher.skeleton or teacher.init"
        )
    if ranks == [4]:
        return OnnxHeatmaps(session, pixels, (shapes[0][2], shapes[0][3]))
    height, width = input_size
    if shapes[0][2] * height != shapes[1][2] * width:
        raise InputError(
            f"{path} must output as many columns per pixel as rows, columns first, got {shapes} "
            f"for crops of {list(input_size)}; change the order of its outputs, or teacher.init"
        )
    return OnnxSimcc(session, pixels)


def _check_complete(path: Path, setting: str) -> None:
    if missing := [file for file in onnx_files(path)[1:] if not file.is_file()]:
        name = missing[0].relative_to(path.parent)
        raise InputError(
            f"{setting}={path} keeps weights in {name} beside it, got no such file; copy it "
            f"to {missing[0].parent}, too"
        )


def open_session(path: Path, user: str, setting: str, providers: Sequence[Any]) -> Any:
    """Open an ONNX file with onnxruntime.

    Args:
        user: what needs the library, for messages.
        setting: what names the file, for messages.
        providers: names of onnxruntime's providers, or (name, options), best first; those that
            are not installed are left out.

    Raises:
        InputError: onnxruntime is not installed or cannot open the file, or weights beside it are
            missing.
    """
    _check_complete(path, setting)
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            f"{user} needs the library onnxruntime, which is not installed; "
            "pip install -e '.[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    installed = onnxruntime.get_available_providers()
    usable = [one for one in providers if (one if isinstance(one, str) else one[0]) in installed]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=usable)
    except Exception as error:  # the library has an exception for each cause
        raise InputError(
            f"{setting} must be an ONNX file that onnxruntime opens with its own operators, got "
            f"{setting}={path} ({' '.join(str(error).split())[:300]})"
        ) from None


def _check_input(session: Any, path: Path, input_size: tuple[int, int]) -> None:
    inputs = session.get_inputs()
    taken = [(one.type, one.shape) for one in inputs]
    is_crops = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4
    if not is_crops or (_is_fixed(inputs[0].shape[1]) and inputs[0].shape[1] != 3):
        raise InputError(
            f"{path} must take one input, float crops (B, 3, h, w), got {taken}; export it again"
        )
    sides = inputs[0].shape[2:]
    if any(_is_fixed(side) and side != own for side, own in zip(sides, input_size, strict=True)):
        raise InputError(
            f"{path} takes crops of {sides}, got teacher crops of {list(input_size)}; change to "
            f"teacher.input_size=[{sides[0]},{sides[1]}]"
        )
    if _is_fixed(inputs[0].shape[0]) and inputs[0].shape[0] != 1:
        raise InputError(
            f"{path} must take one crop at a time or any number, got {taken}; export it with a "
            "free batch"
        )


def _is_fixed(size: Any) -> bool:
    """Return whether the model allows only this size; a free size is a name or None."""
    return isinstance(size, int)


def _run(session: Any, crops: Tensor) -> list[Tensor]:
    """Outputs for normalized crops (B, 3, h, w), on the crops' device."""
    entry = session.get_inputs()[0]
    pixels = crops.contiguous().cpu().numpy()
    parts = np.split(pixels, len(pixels)) if _is_fixed(entry.shape[0]) else [pixels]
    outputs = [session.run(None, {entry.name: part}) for part in parts]
    return [
        torch.from_numpy(np.concatenate(column)).to(crops.device)
        for column in zip(*outputs, strict=True)
    ]
