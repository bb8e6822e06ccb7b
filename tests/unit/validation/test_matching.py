"""Matches kept by person give the official AP, and that of any weighting of the people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.config.schema import Kind
from study.metrics import average_precision
from study.validation.bootstrap import match_people, weighted_ap


def world(
    skeleton: Skeleton, seed: int, *, sources: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """12 images of up to four people, some crowds, unlabeled or missed, and false alarms."""
    rng = np.random.RandomState(seed)
    joints, people, poses = len(skeleton.joints), [], []
    for image in range(12):
        for place in range(rng.randint(0, 5)):
            corner, size = rng.uniform(0, 60, 2), rng.uniform(40, 120, 2)
            points = corner + rng.rand(joints, 2) * size
            seen = np.where(rng.rand(joints) < 0.7, 2, 0) * (rng.rand() > 0.15)
            person = {
                **{"id": 10 * image + place + 1, "image_id": image, "category_id": 1},
                "keypoints": np.c_[points * (seen[:, None] > 0), seen].ravel().tolist(),
                **{"num_keypoints": int((seen > 0).sum()), "iscrowd": int(rng.rand() < 0.1)},
                **{"bbox": [*corner.tolist(), *size.tolist()], "area": float(size.prod()) / 2},
            }
            if sources:
                person["source_id"] = int(rng.randint(sources))
            people.append(person)
            for _ in range(rng.randint(0, 3)):
                noise = rng.normal(0, rng.choice([1, 4, 12]), (joints, 2))
                row = np.c_[points + noise, np.ones(joints)].ravel().tolist()
                score = float(rng.randint(1, 6)) / 5  # equal scores occur
                poses.append(
                    {"image_id": image, "category_id": 1, "keypoints": row, "score": score}
                )
    images = [{"id": image, "height": 200, "width": 200} for image in range(12)]
    category = {"id": 1, "name": "person", "keypoints": list(skeleton.joints), "skeleton": []}
    return {"images": images, "annotations": people, "categories": [category]}, poses


def written(folder: Path, document: dict[str, Any]) -> Path:
    file = folder / f"truth-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("skeleton", "kind"), [(COCO, "coco"), (CROWDPOSE, "crowdpose")])
def test_equal_weights_give_the_official_ap(
    skeleton: Skeleton, kind: Kind, seed: int, tmp_path: Path
) -> None:
    document, poses = world(skeleton, seed)
    truth = written(tmp_path, document)
    matches = match_people(truth, poses, skeleton, kind)
    official = average_precision(truth, poses, skeleton, kind)["ap"]
    assert 0.05 < official < 0.95
    assert weighted_ap(matches, np.ones(len(matches.people))) == pytest.approx(official, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_copies_of_images(seed: int, tmp_path: Path) -> None:
    """Each image as often as its weight, under new ids, evaluated by the official code."""
    document, poses = world(COCO, seed)
    rng = np.random.RandomState(seed)
    matches = match_people(written(tmp_path, document), poses, COCO, "coco")
    weights = rng.randint(0, 3, 12)
    copied: dict[str, Any] = {**document, "images": [], "annotations": []}
    found = []
    for image, times in enumerate(weights):
        for copy in range(times):
            number = 100 * image + copy  # in the order of the images they are copies of
            copied["images"].append({**document["images"][image], "id": number})
            for person in document["annotations"]:
                if person["image_id"] == image:
                    ident = 1000 * person["id"] + copy
                    copied["annotations"].append({**person, "image_id": number, "id": ident})
            found += [{**p, "image_id": number} for p in poses if p["image_id"] == image]
    official = average_precision(written(tmp_path, copied), found, COCO, "coco")["ap"]
    own = weighted_ap(matches, weights.astype(float))
    # Poses of equal score stand in another order among copies; that moves precision a little.
    assert own == pytest.approx(official, abs=0.02)


def test_units_are_source_persons_where_all_are_named(tmp_path: Path) -> None:
    document, poses = world(COCO, 0, sources=5)
    truth = written(tmp_path, document)
    people = document["annotations"]
    empty = 12 - len({person["image_id"] for person in people})
    matches = match_people(truth, poses, COCO, "coco")
    assert len(matches.people) == len({p["source_id"] for p in people}) + empty
    counted = sum(p["num_keypoints"] > 0 and not p["iscrowd"] for p in people)
    assert matches.people.sum() == counted
    del people[0]["source_id"]
    assert len(match_people(written(tmp_path, document), poses, COCO, "coco").people) == 12


def test_nothing_found_is_ap_zero(tmp_path: Path) -> None:
    document, _ = world(COCO, 1)
    matches = match_people(written(tmp_path, document), [], COCO, "coco")
    assert weighted_ap(matches, np.ones(len(matches.people))) == 0
