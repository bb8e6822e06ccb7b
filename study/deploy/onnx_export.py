"""Export of a pose estimator to one ONNX graph, from crops to keypoints and scores."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.errors import InputError

OPSET = 18
MAX_SHIFT_PX = 1e-2
"""Largest distance of a joint from torch's prediction, crop pixels."""
MAX_SCORE_SHIFT = 1e-4
"""Largest difference of a score, 0 to 1, from torch's."""
TIE = 1e-5
"""If a heatmap's two highest cells differ by less, rounding may select either."""
LOGGERS = ("torch.onnx", "onnx_ir", "onnxscript")


class OnnxShift(NamedTuple):
    """Largest differences between an ONNX file and torch."""

    keypoints_px: float
    """Of a keypoint, crop pixels."""
    scores: float
    """Of a score, 0 to 1."""


def require_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        InputError: a package is missing; the message has the command that installs all.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--onnx needs onnx, onnxscript and onnxruntime, got: {error}; "
            "pip install 'pose-distillation-study[onnx]', or -e '.[onnx]' in a checkout"
        ) from None


def write_onnx(estimator: RefinedPose, path: Path, skeleton: Skeleton) -> None:
    """Write an estimator as an ONNX file.

    Its input is ``crops`` (B, 3, h, w), float32, RGB in 0..255, for any B; its outputs are
    ``keypoints_crop`` (B, K, 2) and ``scores`` (B, K). Its metadata have the names of the joints
    and the limbs' joints, from 0, as JSON lists.

    Args:
        estimator: in eval mode, on the CPU.
    """
    crops = torch.zeros(2, 3, *estimator.codec.input_size)
    with _quiet():
        program = torch.onnx.export(
            estimator,
            (crops,),
            input_names=["crops"],
            output_names=["keypoints_crop", "scores"],
            dynamic_shapes={"crops": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for key, value in (("joints", skeleton.joints), ("edges", skeleton.edges)):
        program.model.metadata_props[key] = json.dumps(value)
    program.save(path, external_data=False)


def check_onnx(estimator: RefinedPose, path: Path, crops: Tensor) -> OnnxShift:
    """Return how much an ONNX file differs from the estimator on these crops.

    The first crop is one batch, all others are another. Keypoints of a person are left out if two
    cells of a heatmap tie for the highest: rounding then selects the peak.

    Raises:
        InputError: a difference exceeds MAX_SHIFT_PX or MAX_SCORE_SHIFT.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    keypoint_shift = score_shift = 0.0
    for part in (crops[:1], crops[1:]):
        if not len(part):
            continue
        keypoints, scores = map(
            torch.from_numpy, session.run(None, {"crops": part.contiguous().numpy()})
        )
        with torch.inference_mode():
            expected_keypoints, expected_scores = estimator(part)
            heatmaps = estimator.student.predict(part).heatmaps
        highest = heatmaps.flatten(2).topk(2).values  # (B, K, 2)
        is_clear = ((highest[..., 0] - highest[..., 1]) > TIE).all(dim=1)
        shifts = (keypoints - expected_keypoints).abs().flatten(1).amax(dim=1)  # (B,)
        keypoint_shift = max(keypoint_shift, float(torch.where(is_clear, shifts, 0.0).max()))
        score_shift = max(score_shift, float((scores - expected_scores).abs().max()))
    if not (keypoint_shift <= MAX_SHIFT_PX and score_shift <= MAX_SCORE_SHIFT):
        raise InputError(
            f"{path.name} must agree with the estimator to {MAX_SHIFT_PX:g} px and "
            f"{MAX_SCORE_SHIFT:g} in score, got {keypoint_shift:.3g} px and {score_shift:.3g}; "
            "nothing was exported. Export without --onnx"
        )
    return OnnxShift(keypoint_shift, score_shift)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own code."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13's exporter uses a class that torch has deprecated
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
