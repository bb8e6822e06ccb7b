"""The skeletons of a study that are not built in: from YAML files, or from its annotations.

``data.skeleton`` and ``teacher.skeleton`` may name a file; ``data.skeleton=from_data`` takes
joints and limbs from the category of the people. A study keeps their content in ``study.yaml``: it
resumes only with the same joints, and its export needs no file.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.skeleton import COCO, SKELETONS, Skeleton, shared_joints
from study.config.schema import FROM_DATA, RANDOM, DataConfig, TeacherConfig
from study.data.categories import person_category
from study.data.coco_json import LISTS, read_records
from study.data.coco_results import brief
from study.data.skeleton_file import (
    Notify,
    first_names,
    read_skeleton,
    skeleton_of_content,
    to_plain,
)
from study.errors import InputError
from study.storage.files import fingerprint
from study.storage.paths import settings_file
from study.storage.study_file import SKELETONS_KEY, read_settings

DATA, TEACHER = "data.skeleton", "teacher.skeleton"
CATEGORIES = re.compile(rb'"categories"\s*:\s*\[')
LONGEST = 1 << 22
"""Bytes of a file's categories at most; longer ones are parsed with the whole file."""


def own_skeletons(data: DataConfig, teacher: TeacherConfig, notify: Notify) -> dict[str, Skeleton]:
    """Read the skeletons that are not built in, by setting: data.skeleton, teacher.skeleton.

    Raises:
        InputError: a file is wrong, the category has no joints, or the teacher's skeleton shares
            no joint with the data's.
    """
    own: dict[str, Skeleton] = {}
    if data.skeleton == FROM_DATA:
        annotations = Path(data.root, data.train.annotations)
        own[DATA] = skeleton_from_data(annotations, data.category, DATA, notify)
    elif data.skeleton not in SKELETONS:
        own[DATA] = read_skeleton(Path(data.skeleton), DATA, notify)
    if teacher.skeleton == data.skeleton and DATA in own:
        own[TEACHER] = own[DATA]
    elif teacher.skeleton is not None and teacher.skeleton not in SKELETONS:
        own[TEACHER] = read_skeleton(Path(teacher.skeleton), TEACHER, notify)
    ours = own.get(DATA) or SKELETONS[data.skeleton]
    if data.kind == "drawn" and ours.joints != COCO.joints:
        raise InputError(
            f"data=drawn draws people with COCO's {COCO.num_joints} joints, got "
            f"{DATA}={data.skeleton} with {first_names(ours.joints)}; set {DATA}=coco, or "
            "data=coco and data.root for images of your own"
        )
    if teacher.skeleton is None and teacher.init != RANDOM and DATA in own:
        _note_same_number(ours, data.skeleton, notify)
    if teacher.skeleton is not None:
        theirs = own.get(TEACHER) or SKELETONS[teacher.skeleton]
        _check_shared(ours, theirs, data.skeleton, teacher.skeleton, notify)
    return own


def _note_same_number(ours: Skeleton, data: str, notify: Notify) -> None:
    """Report that a teacher's outputs are read as our joints, if they may be other ones."""
    for known in SKELETONS.values():
        if known.num_joints == ours.num_joints and set(known.joints) != set(ours.joints):
            notify(
                f"note: the outputs of teacher.init are read as the {ours.num_joints} joints of "
                f"{DATA}={data}, in its order; set {TEACHER}={known.name} if they are "
                f"those of {known.name}"
            )


def _check_shared(
    ours: Skeleton, theirs: Skeleton, data: str, teacher: str, notify: Notify
) -> None:
    """Check that the teacher knows some of the data's joints; report it if it lacks others."""
    number = len(shared_joints(ours, theirs))
    if not number:
        raise InputError(
            f"the teacher must predict at least one of the data's joints, by its name, got "
            f"{TEACHER}={teacher} ({first_names(theirs.joints)}) and {DATA}={data} "
            f"({first_names(ours.joints)}), which share none; rename the joints, or change "
            f"{TEACHER} to the joints of teacher.init"
        )
    if number < ours.num_joints:
        notify(
            f"note: the teacher of {TEACHER}={teacher} predicts {number} of the {ours.num_joints} "
            "joints; students learn the others from the labels alone"
        )


def skeleton_from_data(
    annotations: Path, category: str | None, setting: str, notify: Notify
) -> Skeleton:
    """Take joints and limbs from the people's category of an annotation file.

    Left-right pairs follow from the joints' names, and all OKS sigmas are ``UNIFORM_SIGMA``.

    Args:
        category: name of the category; None finds it.
        setting: setting or option that asks for it, as messages call it.

    Raises:
        InputError: the file cannot be read, or its category lacks names of joints.
    """
    chosen = person_category(read_categories(annotations), annotations, category)
    where = f"{setting}={FROM_DATA}, category {chosen.get('name')} of {annotations}"
    joints = chosen.get("keypoints")
    if not isinstance(joints, list) or len(joints) < 2:
        raise InputError(
            f"{where}: the category must have the joints' names as its 'keypoints', got "
            f"{brief(joints)}; add them, or write a skeleton file"
        )
    content = {
        "name": FROM_DATA,
        "joints": [joint.strip() if isinstance(joint, str) else joint for joint in joints],
        "edges": _limbs(chosen.get("skeleton"), joints, where, notify),
    }
    skeleton = skeleton_of_content(content, where, FROM_DATA, notify)
    for known in SKELETONS.values():
        if known.joints == skeleton.joints:
            notify(f"note: {where} has the joints of {setting}={known.name}, which has its sigmas")
    return skeleton


def _limbs(value: Any, joints: list[Any], where: str, notify: Notify) -> list[list[int]]:
    """Return a category's limbs by joints from 0, each once; COCO counts its joints from 1."""
    if not value:
        return []
    num_joints = len(joints)
    is_pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        for pair in value
    )
    numbers = {end for pair in value for end in pair} if is_pairs else {-1}
    first = 0 if 0 in numbers else 1
    if not first <= min(numbers) <= max(numbers) < num_joints + first:
        raise InputError(
            f"{where}: its 'skeleton' must be pairs of joints, counted from 1 to {num_joints}, "
            f"got {brief(value)}; fix it, or write a skeleton file"
        )
    if first == 0:
        notify(f"note: {where} counts the joints of its 'skeleton' from 0, not from 1; read so")
    elif num_joints not in numbers:
        start, end = (joints[number - 1] for number in value[0])
        notify(
            f"note: {where} does not show whether its 'skeleton' counts the joints from 1 or 0; "
            f"read from 1, so its first limb is {start}-{end}; if that is wrong, write a skeleton "
            "file with edges"
        )
    limbs = {frozenset(pair): [end - first for end in pair] for pair in value}
    return list(limbs.values())


def read_categories(annotations: Path) -> list[Any]:
    """Read the categories alone of an annotation file, wherever they are in it.

    Searching 430 MB of people took 0.3 s, parsing them 7 s. A file is parsed if the search does
    not find exactly one list.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with (
            annotations.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            found = list(CATEGORIES.finditer(text))
            if len(found) == 1:
                return _list_at(text, found[0].end() - 1)
    except (OSError, ValueError):
        pass  # the reader below says what is wrong
    parts = {key: value for key, value in read_records(annotations) if key not in LISTS}
    categories = parts.get("categories")
    return categories if isinstance(categories, list) else []


def _list_at(text: mmap.mmap, start: int) -> list[Any]:
    """Parse the JSON list that starts here.

    Raises:
        ValueError: there is none of at most LONGEST bytes.
    """
    part = text[start : start + LONGEST].decode("utf-8", errors="ignore")
    value, _ = json.JSONDecoder().raw_decode(part)
    assert isinstance(value, list)
    return value


def identity_of(skeleton: Skeleton) -> str:
    """Return a fingerprint of the skeleton's content; empty for one that is built in.

    The name does not count: the same joints in another file are the same skeleton.
    """
    content = _content(skeleton)
    is_built_in = any(_content(known) == content for known in SKELETONS.values())
    return "" if is_built_in else fingerprint(content)


def _content(skeleton: Skeleton) -> dict[str, Any]:
    return {**dataclasses.asdict(skeleton), "name": ""}


def kept_skeletons(folder: Path) -> dict[str, Skeleton]:
    """Return the own skeletons of the study in this folder, by setting, as it began with them.

    Raises:
        InputError: the folder has no ``study.yaml``, or the file holds no settings.
    """
    kept = read_settings(folder).get(SKELETONS_KEY) or {}
    where = f"{SKELETONS_KEY} of {settings_file(folder)}"
    if not isinstance(kept, dict):
        raise InputError(f"{where} must map settings to skeletons, got other content; restore it")
    return {
        setting: skeleton_of_content(content, where, setting, lambda text: None)
        for setting, content in kept.items()
    }


def kept_settings(own: Mapping[str, Skeleton], folder: Path) -> set[str]:
    """Return the settings whose skeletons are those with which the study in this folder began.

    Raises:
        InputError: a skeleton has changed; the message names what.
    """
    if not settings_file(folder).exists():
        return set()
    kept = kept_skeletons(folder)
    for setting, skeleton in own.items():
        before = kept.get(setting)
        if before is None or _content(before) == _content(skeleton):
            continue
        old, new = to_plain(before), to_plain(skeleton)
        changed = [key for key in old if key != "name" and old[key] != new[key]]
        raise InputError(
            f"{setting} must have the content with which the study in {folder} began, got other "
            f"{', '.join(changed)}; restore the file from '{SKELETONS_KEY}' in "
            f"{settings_file(folder).name}, or start a study of the new one with name=..."
        )
    return own.keys() & kept.keys()
