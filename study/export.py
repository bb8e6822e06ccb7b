"""Export a trained pose estimator from a study: ``python study/export.py studies/NAME``.

An export needs neither the study nor the teacher: it holds the student, after stage 2 also the
refiner, as safetensors, the values that ``models/build.py`` builds them from as JSON, and a model
card. The written files are loaded again and must reach the AP that the trial recorded.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # Inside a checkout: its root on the path in place of study/, whose file names would shadow
    # others.
    sys.path[0] = os.path.dirname(HERE)
import study  # noqa: F401  (checks the working folder before torch is imported)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages load

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from models.build import load_export
from models.pose_features import computes_in_bf16
from models.refined_pose import RefinedPose
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.predictions import START, Predictions, stored_starts
from study.cache.prepare import PreparedData, prepare_data
from study.config.compose import from_plain
from study.config.schema import JITTER, STUDENT
from study.config.typed_paths import typed_path
from study.data.crops import BOX_PADDING
from study.deploy.model_card import BOX_CENTER, model_card
from study.deploy.onnx_export import OnnxShift, check_onnx, require_onnx, write_onnx
from study.deploy.select_trial import SelectedTrial, relocate, select_trial
from study.display import Display, escape_unprintable, percent
from study.errors import InputError, TrainingDiverged
from study.interrupts import ends_in_one_line
from study.storage.files import sync
from study.storage.paths import export_folder
from study.storage.study_file import read_settings
from study.storage.tables import AVERAGE_PRECISION, VAL, read_final
from study.training.batches import plain_batch
from study.training.evaluation import BATCH_SIZE, evaluate, predict_crops
from study.training.refine import RefineTask
from study.workers import Workers

FORMAT = 2
"""Raised whenever a key of ``config.json`` changes its meaning or its name."""
TOLERANCE = 1e-6
"""Largest difference of AP, 0 to 1; on the trial's own machine there is none."""
MAX_SHIFT_PX = 1e-4
"""Largest distance of a joint from the checkpoint's own prediction, crop pixels."""
REFINER = ("levels", "depth", "width", "dropout", "gate", "candidates")
EXPLANATION = """\
writes to STUDY/export:
  model.safetensors   weights of the student and the refiner, without the teacher
  config.json         how to build the estimator and feed it, and where it comes from
  README.md           the model card
  model.onnx          with --onnx: one graph from crops to keypoints

The new files are loaded and scored: their AP must be the trial's. Only then do they replace an
earlier export.

examples:
  python study/export.py studies/drawn-joint-joint
  python study/export.py studies/drawn-joint-joint --trial 3
  python study/export.py studies/drawn-joint-joint --onnx
  python study/export.py studies/coco-joint-joint --refined
"""


class ExportedAp(NamedTuple):
    """AP of an export on the search slice, 0 to 1."""

    as_trained: float
    """In the trial's precision."""
    in_fp32: float | None
    """In fp32; None if that is the trial's precision."""


def export_study(
    folder: Path,
    number: int | None,
    display: Display,
    tolerance: float = TOLERANCE,
    *,
    is_refined: bool = False,
    has_onnx: bool = False,
) -> Path:
    """Write a trial, by default the study's winner, to ``folder/export``; return that folder.

    Args:
        number: the trial.
        tolerance: largest difference between the export's AP and the trial's, 0 to 1.
        is_refined: export the best epoch of stage 2; the default trial is then that of the best
            refined student.
        has_onnx: also write ``model.onnx``.

    Raises:
        InputError: the trial or its checkpoint is missing, the data have changed, or the AP
            differs from the trial's. An earlier export stays unchanged.
    """
    if has_onnx:
        require_onnx()
    settings = read_settings(folder)
    config = relocate(from_plain(settings["config"]), folder)
    selected = select_trial(folder, config, number, is_refined=is_refined)
    estimator = selected.load()
    with display.meters() as meter:
        prepared = prepare_data(config.data, selected.resolved, meter, display.notify)
    if prepared.fingerprint != settings["data_fingerprint"]:
        raise InputError(
            "an export must be checked on the data of its study (fingerprint "
            f"{settings['data_fingerprint']}), got other data in {config.data.root} "
            f"({prepared.fingerprint}); restore the data"
        )
    temporary, target = folder / f".export-{os.getpid()}", export_folder(folder)
    shift = None
    try:
        info = describe(folder, selected, settings, prepared, estimator)
        write_files(temporary, estimator, info, selected)
        ap = check_export(temporary, estimator, selected, prepared, tolerance)
        if has_onnx:
            shift = add_onnx(temporary, selected, prepared)
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for line in _summary(selected, target, ap, tolerance, shift):
        display.notify(line)
    return target


def describe(
    folder: Path,
    selected: SelectedTrial,
    settings: dict[str, Any],
    prepared: PreparedData,
    estimator: RefinedPose,
) -> dict[str, Any]:
    """Return the content of ``config.json``: how to build and feed the model, and its source.

    Args:
        settings: the content of ``study.yaml``.
    """
    config, trial, checkpoint = selected.config, selected.trial, selected.checkpoint
    skeleton, frame = selected.resolved.skeleton, estimator.codec.frame
    pixels = estimator.student.pixels
    refiner = None
    if estimator.refiner is not None:
        refiner = {key: getattr(config.refine, key) for key in REFINER}
        refiner["mirror_pairs"] = estimator.refiner.mirror_pairs is not None
    figures = [column.name for column in AVERAGE_PRECISION]
    on_val = [
        row
        for row in read_final(folder).to_pylist()
        if (row["trial"], row["epoch"]) == (trial["trial"], checkpoint.epoch)
    ]
    return {
        "format": FORMAT,
        "skeleton": skeleton.name,
        "joints": list(skeleton.joints),
        "edges": [list(edge) for edge in skeleton.edges],
        "flip_pairs": [list(pair) for pair in skeleton.flip_pairs],
        "oks_sigmas": list(skeleton.oks_sigmas),
        "input_size": list(config.data.input_size),
        BOX_CENTER: list(frame.center),
        "crop_span": list(frame.span),
        "box_padding": BOX_PADDING,
        "pixel_mean": list(pixels.mean),
        "pixel_std": list(pixels.std),
        "pixel_order": pixels.order,
        "student": {"name": config.student.name, "size": config.student.size},
        "codec": {"name": config.student.codec, "sigma": config.student.sigma},
        "flip_test": estimator.flip_order is not None,
        "refiner": refiner,
        "source": {
            "study": config.name,
            "trial": trial["trial"],
            "control": trial["control"],
            "stage": checkpoint.stage,
            "epoch": checkpoint.epoch,
            "seed": trial["seed"],
            "data": config.data.kind,
            "data_fingerprint": prepared.fingerprint,
            "git_commit": settings["git_commit"],
            "versions": settings["versions"],
        },
        "search": {
            "num_people": prepared.num_people[1],
            **{name: selected.report[VAL + name] for name in figures},
        },
        "val": {key: on_val[0][key] for key in ("num_people", *figures)} if on_val else None,
    }


def write_files(
    folder: Path, estimator: RefinedPose, info: dict[str, Any], selected: SelectedTrial
) -> None:
    """Write weights, ``config.json`` and model card to a new folder."""
    folder.mkdir()
    tensors = {key: value.contiguous() for key, value in estimator.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # One line per key: with an indent, each number would have a line of its own.
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in info.items()]
    text = ",\n".join(lines)
    (folder / "config.json").write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    num_parameters = sum(parameter.numel() for parameter in estimator.parameters())
    card = model_card(info, selected.values, num_parameters)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_export(
    folder: Path,
    estimator: RefinedPose,
    selected: SelectedTrial,
    prepared: PreparedData,
    tolerance: float,
) -> ExportedAp:
    """Check that the written files predict as the checkpoint does, and reach the trial's AP.

    AP is measured as in the trial: precision, batches, kind of device, number of threads. An AP of
    0 proves little, hence the comparison of keypoints.

    Args:
        estimator: the checkpoint's estimator.

    Raises:
        InputError: the AP differs by more than ``tolerance``, or keypoints are not finite.
    """
    config, recorded = selected.config, selected.report["val_ap"]
    has_gpu = bool(selected.trial["gpu_s"]) and torch.cuda.is_available()
    workers = Workers(torch.device("cuda" if has_gpu else "cpu"))
    store, skeleton = open_crop_store(Path(prepared.search)), selected.resolved.skeleton
    truth, kind = Path(prepared.search_truth), selected.resolved.evaluation
    starts = _given_poses(selected, store)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.trial.cpus)))
    try:
        written = load_export(folder)[0].to(workers.device)
        written.student.precision = estimator.student.precision
        written.student.memory_format = estimator.student.memory_format
        expected, predicted = (
            predict_crops(model, store, skeleton, workers, BATCH_SIZE, starts)[0]
            for model in (estimator.to(workers.device), written)
        )
        ap = evaluate(written, store, truth, skeleton, kind, workers, starts)["ap"]
        ap_in_fp32 = None
        if computes_in_bf16(written.student.precision, workers.device):
            written.student.precision = "fp32"
            ap_in_fp32 = evaluate(written, store, truth, skeleton, kind, workers, starts)["ap"]
    except TrainingDiverged as error:
        raise InputError(f"trial {selected.trial['trial']} can't be exported: {error}") from None
    finally:
        torch.set_num_threads(threads)
    shift = float(np.abs(expected - predicted).max())
    assert shift <= MAX_SHIFT_PX, shift
    if not abs(ap - recorded) <= tolerance:
        device = "a GPU" if selected.trial["gpu_s"] else "a CPU"
        raise InputError(
            f"an export must reach the AP that its trial recorded, {recorded:.6f} on the search "
            f"slice, got {ap:.6f}; nothing was exported. Either the checkpoint was changed, or "
            f"the trial ran on {device} of another machine ({selected.trial['node']}): export "
            "there, or allow a difference with --tolerance"
        )
    return ExportedAp(ap, ap_in_fp32)


def _given_poses(selected: SelectedTrial, store: CropStore) -> NDArray[np.float32] | None:
    """Poses of the file ``refine.start`` that the trial was scored from; None without a file.

    Raises:
        InputError: the file is missing, or holds no poses.
    """
    start = selected.config.refine.start
    if selected.checkpoint.stage != RefineTask.name or start in (STUDENT, JITTER):
        return None
    Predictions(Path(start), selected.resolved.skeleton, START)
    return stored_starts(Path(start), store, selected.resolved.skeleton)


def add_onnx(folder: Path, selected: SelectedTrial, prepared: PreparedData) -> OnnxShift:
    """Write ``model.onnx`` beside the weights, and check it on people of the search slice.

    Raises:
        InputError: its predictions differ too much.
    """
    estimator, _ = load_export(folder)
    store, skeleton = open_crop_store(Path(prepared.search)), selected.resolved.skeleton
    write_onnx(estimator, folder / "model.onnx", skeleton)
    rows = torch.arange(min(len(store), BATCH_SIZE))
    frame, device = estimator.codec.frame, torch.device("cpu")
    crops = plain_batch(store, skeleton, frame, rows, device).crops
    return check_onnx(estimator, folder / "model.onnx", crops)


def _replace_folder(temporary: Path, target: Path) -> None:
    """Flush the new folder to the disk and rename it to ``target``; an earlier one goes last."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        target.replace(old)
    try:
        temporary.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _summary(
    selected: SelectedTrial,
    target: Path,
    ap: ExportedAp,
    tolerance: float,
    shift: OnnxShift | None,
) -> Iterator[str]:
    checkpoint = selected.checkpoint
    yield (
        f"exported trial {selected.trial['trial']} ({checkpoint.stage}, epoch {checkpoint.epoch}) "
        f"to {target}"
    )
    yield (
        f"its AP on the search slice is {percent(ap.as_trained)}, as recorded "
        f"(difference {abs(ap.as_trained - selected.report['val_ap']):.1g}, at most {tolerance:g})"
    )
    if ap.in_fp32 is not None:
        yield (
            "the trial computed in bf16; in fp32, as exports compute, AP is "
            f"{percent(ap.in_fp32)} (difference {100 * (ap.in_fp32 - ap.as_trained):+.2f} points)"
        )
    if shift is not None:
        yield (
            f"model.onnx differs by at most {shift.keypoints_px:.1g} px of a crop and "
            f"{shift.scores:.1g} in score"
        )


@ends_in_one_line()
def main(arguments: Sequence[str] | None = None) -> None:
    escape_unprintable()
    parser = argparse.ArgumentParser(
        description="Export the best pose estimator of a study, or that of another trial.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "study", metavar="STUDY", type=typed_path, help="folder of the study: <storage>/<name>"
    )
    parser.add_argument("--trial", metavar="N", type=int, help="trial to export (default: winner)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference from the trial's AP, 0 to 1 (default %(default)g); raise it if "
        "the trial ran on another kind of machine",
    )
    parser.add_argument(
        "--refined",
        action="store_true",
        help="export the best epoch of stage 2, even if stage 1 was better; needed for "
        "predict.py --poses",
    )
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx")
    options = parser.parse_args(arguments)
    try:
        target = export_study(
            options.study,
            options.trial,
            Display("auto"),
            options.tolerance,
            is_refined=options.refined,
            has_onnx=options.onnx,
        )
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"try it: python study/predict.py {shlex.quote(str(target))} IMAGES...")


if __name__ == "__main__":
    main()
