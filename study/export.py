"""Take a trained pose estimator out of a study: ``python study/export.py studies/NAME``.

What is written stands alone: the student and, after stage 2, the refiner as safetensors, all that
``models/build.py`` needs to build them as JSON, and a model card. The teacher stays behind. The
written files are loaded again and must get the AP that the trial recorded.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # Inside a checkout: its root on the path in place of study/, whose file names would shadow
    # others.
    sys.path[0] = os.path.dirname(HERE)

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from study.data.crops import BOX_PADDING
from study.deploy.model_card import model_card
from study.deploy.onnx_export import prove_onnx, require_onnx, write_onnx
from study.deploy.select_trial import SelectedTrial, relocate, select_trial
from study.display import Display, percent
from study.errors import InputError, TrainingDiverged
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
"""AP, 0 to 1, may differ by so much; on the machine of the trial it does not differ at all."""
MAX_SHIFT_PX = 1e-4
"""A joint may lie so far from where the checkpoint's own estimator puts it, crop pixels."""
REFINER = ("levels", "depth", "width", "dropout", "gate", "candidates")
EXPLANATION = """\
writes STUDY/export:
  model.safetensors   student and refiner, without the teacher
  config.json         how to build and feed them, and where they come from
  README.md           the model card
  model.onnx          with --onnx: crops in, keypoints out, in one graph
An export that is there already is replaced once the new one is proved.

examples:
  python study/export.py studies/drawn-joint-joint
  python study/export.py studies/drawn-joint-joint --trial 3
  python study/export.py studies/drawn-joint-joint --onnx
  python study/export.py studies/coco-joint-joint --refined
"""


def export_study(
    folder: Path,
    number: int | None,
    display: Display,
    tolerance: float = TOLERANCE,
    *,
    is_refined: bool = False,
    has_onnx: bool = False,
) -> Path:
    """The trial, by default the study's winner, is in ``folder/export``, proved; returns that.

    Args:
        is_refined: its best epoch of stage 2, by default the best refined student's.
        has_onnx: write it as ONNX, too.

    Raises:
        InputError: no such trial, no checkpoint, other data, or another AP than the trial's. What
            was exported before stays.
    """
    if has_onnx:
        require_onnx()
    settings = read_settings(folder)
    config = relocate(from_plain(settings["config"]), folder)
    chosen = select_trial(folder, config, number, is_refined=is_refined)
    estimator = chosen.load()
    with display.meters() as meter:
        data = prepare_data(config.data, chosen.resolved, meter, display.notify)
    if data.fingerprint != settings["data_fingerprint"]:
        raise InputError(
            "an export is proved on the data that its study was made with (fingerprint "
            f"{settings['data_fingerprint']}), got other data in {config.data.root} "
            f"({data.fingerprint}); put the data back as they were"
        )
    aside, target = folder / f".export-{os.getpid()}", export_folder(folder)
    try:
        info = describe(folder, chosen, settings, data, estimator)
        write_files(aside, estimator, info, chosen)
        ap, ap_in_fp32 = prove(aside, estimator, chosen, data, tolerance)
        if has_onnx:
            shifts = add_onnx(aside, chosen, data)
        _put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    trial, stage = chosen.trial["trial"], chosen.checkpoint.stage
    display.notify(
        f"exported trial {trial} ({stage}, epoch {chosen.checkpoint.epoch}) to {target}"
    )
    display.notify(
        f"loaded again, its AP on the search slice is {percent(ap)}, which is the trial's "
        f"(difference {abs(ap - chosen.report['val_ap']):.1g} of at most {tolerance:g})"
    )
    if ap_in_fp32 is not None:
        display.notify(
            "the trial computed in bf16; in fp32, in which an export computes, AP is "
            f"{percent(ap_in_fp32)} (difference {100 * (ap_in_fp32 - ap):+.2f} points)"
        )
    if has_onnx:
        display.notify(
            f"model.onnx is it to {shifts[0]:.1g} px of a crop and {shifts[1]:.1g} in score"
        )
    return target


def add_onnx(aside: Path, chosen: SelectedTrial, data: PreparedData) -> tuple[float, float]:
    """What was written to ``aside`` is there as ONNX, too; returns how far the two are apart.

    Raises:
        InputError: too far, on the search slice's first people.
    """
    estimator, _ = load_export(aside)
    write_onnx(estimator, aside / "model.onnx")
    store, skeleton = open_crop_store(Path(data.search)), chosen.resolved.skeleton
    rows = torch.arange(min(len(store), BATCH_SIZE))
    frame, device = estimator.codec.frame, torch.device("cpu")
    crops = plain_batch(store, skeleton, frame, rows, device).crops
    return prove_onnx(estimator, aside / "model.onnx", crops)


def describe(
    folder: Path,
    chosen: SelectedTrial,
    settings: dict[str, Any],
    data: PreparedData,
    estimator: RefinedPose,
) -> dict[str, Any]:
    """What ``config.json`` says: how to build and feed the model, and where it comes from."""
    config, trial, checkpoint = chosen.config, chosen.trial, chosen.checkpoint
    skeleton, frame = chosen.resolved.skeleton, estimator.codec.frame
    pixels = estimator.student.pixels
    built = None
    if estimator.refiner is not None:
        built = {key: getattr(config.refine, key) for key in REFINER}
        built["mirror_pairs"] = estimator.refiner.mirror_pairs is not None
    names = [column.name for column in AVERAGE_PRECISION]
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
        "input_size": list(config.data.input_size),
        "box_centre": list(frame.center),
        "crop_span": list(frame.span),
        "box_padding": BOX_PADDING,
        "pixel_mean": list(pixels.mean),
        "pixel_std": list(pixels.std),
        "pixel_order": pixels.order,
        "student": {"name": config.student.name, "size": config.student.size},
        "codec": {"name": config.student.codec, "sigma": config.student.sigma},
        "flip_test": estimator.flip_order is not None,
        "refiner": built,
        "source": {
            "study": config.name,
            "trial": trial["trial"],
            "control": trial["control"],
            "stage": checkpoint.stage,
            "epoch": checkpoint.epoch,
            "seed": trial["seed"],
            "data": config.data.kind,
            "data_fingerprint": data.fingerprint,
            "git_commit": settings["git_commit"],
            "versions": settings["versions"],
        },
        "search": {
            "num_people": data.num_people[1],
            **{name: chosen.report[VAL + name] for name in names},
        },
        "val": {key: on_val[0][key] for key in ("num_people", *names)} if on_val else None,
    }


def write_files(
    aside: Path, estimator: RefinedPose, info: dict[str, Any], chosen: SelectedTrial
) -> None:
    """The export's three files are in a new folder ``aside``."""
    aside.mkdir()
    tensors = {key: value.contiguous() for key, value in estimator.state_dict().items()}
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in info.items()]
    text = ",\n".join(lines)  # a line a key: indented all through, it would be a line a number
    (aside / "config.json").write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    num_parameters = sum(parameter.numel() for parameter in estimator.parameters())
    (aside / "README.md").write_text(
        model_card(info, chosen.values, num_parameters), encoding="utf-8"
    )


def prove(
    aside: Path,
    estimator: RefinedPose,
    chosen: SelectedTrial,
    data: PreparedData,
    tolerance: float,
) -> tuple[float, float | None]:
    """The AP of the written files on the search slice, which is that of the trial.

    Measured as the trial did: in its precision and batches, on its kind of device and number of
    threads. Where AP is 0 throughout it says little, so the joints must be the checkpoint's too.
    The second figure is the AP in fp32, None where the first is that.

    Raises:
        InputError: it is another one.
    """
    config, recorded = chosen.config, chosen.report["val_ap"]
    has_gpu = bool(chosen.trial["gpu_s"]) and torch.cuda.is_available()
    workers = Workers(torch.device("cuda" if has_gpu else "cpu"))
    store, skeleton = open_crop_store(Path(data.search)), chosen.resolved.skeleton
    starts = _starts_of(chosen, store)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.trial.cpus)))
    try:
        written = load_export(aside)[0].to(workers.device)
        written.student.precision = estimator.student.precision
        written.student.memory_format = estimator.student.memory_format
        poses = [
            predict_crops(model, store, skeleton, workers, BATCH_SIZE, starts)[0]
            for model in (estimator.to(workers.device), written)
        ]
        truth, kind = Path(data.search_truth), chosen.resolved.evaluation
        ap = evaluate(written, store, truth, skeleton, kind, workers, starts)["ap"]
        ap_in_fp32 = None
        if computes_in_bf16(written.student.precision, workers.device):
            written.student.precision = "fp32"
            ap_in_fp32 = evaluate(written, store, truth, skeleton, kind, workers, starts)["ap"]
    except TrainingDiverged as error:
        raise InputError(f"trial {chosen.trial['trial']} can't be exported: {error}") from None
    finally:
        torch.set_num_threads(threads)
    shift = float(np.abs(poses[0] - poses[1]).max())
    assert shift <= MAX_SHIFT_PX, shift
    if not abs(ap - recorded) <= tolerance:
        where = "a GPU" if chosen.trial["gpu_s"] else "a CPU"
        raise InputError(
            f"an export must get the AP that its trial recorded, {recorded:.6f} on the search "
            f"slice, got {ap:.6f}; nothing was exported. The checkpoint may have been changed; or "
            f"the trial ran on {where} of another machine ({chosen.trial['node']}): export there, "
            "or allow a difference by --tolerance"
        )
    return ap, ap_in_fp32


def _starts_of(chosen: SelectedTrial, store: CropStore) -> NDArray[np.float32] | None:
    """The poses that the trial was scored from: those of ``refine.start``'s file, if it has one.

    Raises:
        InputError: the file is gone, or is no such file any more.
    """
    start = chosen.config.refine.start
    if chosen.checkpoint.stage != RefineTask.name or start in (STUDENT, JITTER):
        return None
    Predictions(Path(start), chosen.resolved.skeleton, START)
    return stored_starts(Path(start), store, chosen.resolved.skeleton)


def _put_in_place(aside: Path, target: Path) -> None:
    """The finished folder is ``target``, in place of any earlier one."""
    for path in (*aside.iterdir(), aside):
        sync(path)
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        target.replace(old)
    try:
        aside.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write a study's best pose estimator, or another trial's, to take away.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="its folder: <storage>/<name>")
    parser.add_argument("--trial", metavar="N", type=int, help="which trial (default: the winner)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="how far AP, 0 to 1, may be from the trial's (default %(default)g); for a trial that "
        "ran on another kind of machine",
    )
    parser.add_argument(
        "--refined",
        action="store_true",
        help="the best epoch of stage 2, whatever stage 1 got: for predict.py --poses",
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx, too")
    options = parser.parse_args(arguments)
    try:
        target = export_study(
            *(options.study, options.trial, Display("auto"), options.tolerance),
            is_refined=options.refined,
            has_onnx=options.onnx,
        )
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"try it: python study/predict.py {target} PICTURES...")


if __name__ == "__main__":
    main()
