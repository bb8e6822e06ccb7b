"""The model card of an export, in Markdown: what it is, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.display import heading, percent

BOX_CENTER = "box_centre"
"""Key of ``config.json``; its spelling is part of the format."""
CARD = """\
# {study}, trial {trial}: a pose estimator

Finds the {num_joints} joints of one person in a crop of that person: {student}, {refined},
{num_parameters:,} parameters. The weights are those of epoch {epoch}, stage {stage}. The teacher
is not part of the export.

{figures}

The figures follow {rules}'s rules, times 100, on crops of the annotated boxes. Trial and epoch
were selected by the figures of the first row, so these are optimistic; expect those of validation.

## Use

    python study/predict.py EXPORT IMAGES... --boxes BOXES.json

or in Python, with `crops` of shape (B, 3, {height}, {width}), RGB in 0..255:

```python
from pathlib import Path

import torch

from models.build import load_export

estimator, info = load_export(Path("EXPORT"))
with torch.inference_mode():
    keypoints_crop, scores = estimator(crops)
```

`EXPORT` is this folder. `config.json` holds all that another program needs to build the network
and to feed it; `model.safetensors` holds the weights. `model.onnx`, written by `--onnx`, is the
whole estimator in one graph: any number of float32 `crops` in, `keypoints_crop` and `scores` out.

- Input: a crop {height} high and {width} wide. The center of the person's box is at
  x {center[0]:g}, y {center[1]:g}; pixel centers are whole numbers. The box, widened to the
  crop's aspect ratio, is {box[0]:g} wide and {box[1]:g} high. The estimator itself subtracts the
  mean {pixel_mean} and divides by {pixel_std}.
- Output: x and y of each joint in pixels of the crop, and its score: the height of the heatmap's
  peak, near 1 where the network is certain.{flip_test}
- Joints: {joints}.

## How it was trained

On {data} data (fingerprint {data_fingerprint}), with these parameters and otherwise the study's
settings:

{params}

Made with {versions}.

## Limits

One person per crop, the one in its center. Where people overlap, joints may be those of another
person. Test the estimator on your own images before you use it.
"""

FLIP_TEST = " Each crop is predicted twice, plain and mirrored, and the two results are averaged."


def model_card(info: Mapping[str, Any], params: Mapping[str, Any], num_parameters: int) -> str:
    """Return the text of the card.

    Args:
        info: the content of ``config.json``.
        params: the trial's values by config path.
    """
    source, student = info["source"], info["student"]
    height, width = info["input_size"]
    refined = "without a refiner"
    if info["refiner"] is not None:
        refined = f"refined by IGP-GCN in {info['refiner']['levels']} levels"
        if info["refiner"]["candidates"] > 1:
            refined += f" from one of {info['refiner']['candidates']} peaks a joint"
    return CARD.format(
        study=source["study"],
        trial=source["trial"],
        stage=source["stage"],
        epoch=source["epoch"],
        num_joints=len(info["joints"]),
        student=f"{student['name']} ({student['size']})",
        refined=refined,
        num_parameters=num_parameters,
        figures=_figures(info),
        rules="CrowdPose" if source["data"] == "crowdpose" else "COCO",
        height=height,
        width=width,
        center=info[BOX_CENTER],
        box=[length / info["box_padding"] for length in info["crop_span"]],
        flip_test=FLIP_TEST if info["flip_test"] else "",
        pixel_mean=info["pixel_mean"],
        pixel_std=info["pixel_std"],
        joints=", ".join(info["joints"]),
        data=source["data"],
        data_fingerprint=source["data_fingerprint"],
        params="\n".join(f"- `{path}={value}`" for path, value in params.items()) or "- none",
        versions=", ".join(f"{name} {number}" for name, number in source["versions"].items()),
    )


def _figures(info: Mapping[str, Any]) -> str:
    """A table of the figures on both splits, without those that both lack."""
    rows = [("search slice, held out of train", info["search"])]
    if info["val"] is not None:
        rows.append(("validation", info["val"]))
    names = [
        name
        for name in info["search"]
        if name != "num_people" and any(row[name] is not None for _, row in rows)
    ]
    lines = [
        f"| scored on | people | {' | '.join(heading(name) for name in names)} |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for title, row in rows:
        cells = [str(row["num_people"]), *(percent(row[name]) for name in names)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if info["val"] is None:
        lines.append("\nThis epoch has not been scored on the validation people.")
    return "\n".join(lines)
