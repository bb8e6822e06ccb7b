"""The model card of an export, in Markdown: what it is, what it got, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from study.display import percent

CARD = """\
# {study}, trial {trial}: a pose estimator

Finds the {num_joints} joints of one person in a crop of that person: {student}, {refined},
{num_parameters:,} parameters. From epoch {epoch} of the trial, stage {stage}; the
teacher is not part of it.

{figures}

By {rules}'s rules, times 100, on crops by the annotated boxes. Trial and epoch were chosen by the
first row, which therefore flatters them; validation shows what to expect.

## Use

    python study/predict.py EXPORT PICTURES... --boxes BOXES.json

or in Python, `crops` being (B, 3, {height}, {width}), RGB in 0..255:

```python
from pathlib import Path

import torch

from models.build import load_export

estimator, info = load_export(Path("EXPORT"))
with torch.inference_mode():
    keypoints_crop, scores = estimator(crops)
```

`EXPORT` is this folder. `config.json` holds all that another program needs to build the network
and to feed it; `model.safetensors` holds the weights. `model.onnx`, which an export by `--onnx`
has, is all of it in one graph: any number of float32 `crops` in, `keypoints_crop` and `scores`
out.

- In: a crop {height} high and {width} wide, the center of the person's box at x {center[0]:g},
  y {center[1]:g}, pixel centers being whole numbers, and the box, widened to the crop's shape,
  {box[0]:g} wide and {box[1]:g} high. The estimator takes the mean {pixel_mean} out itself and
  divides by {pixel_std}.
- Out: x and y of each joint in pixels of the crop, and its score: the height of the peak that it
  was taken from, near 1 where the network is sure.{flip_test}
- Joints: {joints}.

## How it was trained

On {data} data (fingerprint {data_fingerprint}). What the trial was to try, the rest being the
study's settings:

{params}

Made with {versions}.

## Limits

One person a crop: whoever is in its middle. Where people overlap, joints may be taken from the
other one. Images unlike those it was trained on need a test of their own before it is used.
"""

FLIP_TEST = (
    """ Each crop is looked at twice, as it is and mirrored, and both answers are averaged."""
)


def model_card(info: Mapping[str, Any], params: Mapping[str, Any], num_parameters: int) -> str:
    """The text of the card.

    Args:
        info: what ``config.json`` says.
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
        **{key: source[key] for key in ("study", "trial", "stage", "epoch")},
        num_joints=len(info["joints"]),
        student=f"{student['name']} ({student['size']})",
        refined=refined,
        num_parameters=num_parameters,
        figures=_figures(info),
        rules="CrowdPose" if source["data"] == "crowdpose" else "COCO",
        height=height,
        width=width,
        center=info["box_centre"],
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
    """A table of the figures on both splits, without those that neither has."""
    rows = [("search slice, held out of train", info["search"])]
    if info["val"] is not None:
        rows.append(("validation", info["val"]))
    names = [
        name
        for name in info["search"]
        if name != "num_people" and any(row[name] is not None for _, row in rows)
    ]
    lines = [
        f"| scored on | people | {' | '.join(_heading(name) for name in names)} |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for title, row in rows:
        cells = [str(row["num_people"]), *(percent(row[name]) for name in names)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if info["val"] is None:
        lines.append("\nThis epoch has not been scored on the validation people.")
    return "\n".join(lines)


def _heading(name: str) -> str:
    """ap50 as AP50, ap_m as AP(m)."""
    figure, _, part = name.partition("_")
    return f"{figure.upper()}({part})" if part else figure.upper()
