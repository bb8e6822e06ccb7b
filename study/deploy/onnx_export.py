"""A pose estimator as one ONNX file: crops in, keypoints and scores out, decoding and all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.refined_pose import RefinedPose
from study.errors import InputError

OPSET = 18
MAX_SHIFT_PX = 1e-2
"""A joint may lie so far from where torch puts it, crop pixels."""
MAX_SCORE_SHIFT = 1e-4
TIE = 1e-5
"""Where a map's two highest cells differ by less, rounding may choose either."""
LOGGERS = ("torch.onnx", "onnx_ir", "onnxscript")


def require_onnx() -> None:
    """Returns if what the export needs is installed.

    Raises:
        InputError: it is not; says how to install it.
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


def write_onnx(estimator: RefinedPose, path: Path) -> None:
    """The estimator, which is in eval mode on the CPU, is in the file ``path``.

    Input ``crops`` (B, 3, h, w), float32, RGB in 0..255, for any B; outputs ``keypoints_crop``
    (B, K, 2) and ``scores`` (B, K).
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
    program.save(path, external_data=False)


def prove_onnx(estimator: RefinedPose, path: Path, crops: Tensor) -> tuple[float, float]:
    """How far the file's keypoints (px) and scores are from the estimator's on crops, at most.

    The crops are fed one alone and all others together. A person one of whose maps has two
    highest cells is left out: there the answer is a matter of rounding.

    Raises:
        InputError: farther than MAX_SHIFT_PX or MAX_SCORE_SHIFT.
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
        rivals = heatmaps.flatten(2).topk(2).values
        is_clear = ((rivals[..., 0] - rivals[..., 1]) > TIE).all(dim=1)
        away = (keypoints - expected_keypoints).abs().flatten(1).amax(dim=1)
        keypoint_shift = max(keypoint_shift, float(torch.where(is_clear, away, 0.0).max()))
        score_shift = max(score_shift, float((scores - expected_scores).abs().max()))
    if not (keypoint_shift <= MAX_SHIFT_PX and score_shift <= MAX_SCORE_SHIFT):
        raise InputError(
            f"{path.name} must agree with the estimator to {MAX_SHIFT_PX:g} px and "
            f"{MAX_SCORE_SHIFT:g} in score, got {keypoint_shift:.3g} px and {score_shift:.3g}; "
            "nothing was exported. Export without --onnx"
        )
    return keypoint_shift, score_shift


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own insides."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch's exporter of 2.13 uses what torch has deprecated
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
