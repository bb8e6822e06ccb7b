"""A skeleton as a YAML file: joints, limbs, left-right pairs, OKS sigmas and upper body.

A study keeps such content of its own skeletons in ``study.yaml``.
"""

from __future__ import annotations

import collections
import difflib
import math
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from models.joint_names import LEFT, RIGHT, split_side, without_number
from models.skeleton import Skeleton
from study.errors import InputError

KEYS = ("name", "joints", "edges", "flip_pairs", "oks_sigmas", "upper_body")
UNIFORM_SIGMA = 0.05
"""OKS sigma of joints without one of their own: near the geometric mean of COCO's least (eyes,
0.025) and largest (hips, 0.107). An error of a tenth of the root of the area costs 0.4 of OKS."""
MAX_SIGMA = 1.0
"""With a larger one every pose in the person's box would count as right."""
LARGE_SIGMA = 0.15
"""With a larger one a note is given; COCO's largest is 0.107."""
SHOWN = 4
"""Joints or pairs that a message lists."""
Notify = Callable[[str], None]
Pairs = tuple[tuple[int, int], ...]


def read_skeleton(path: Path, setting: str, notify: Notify) -> Skeleton:
    """Read a skeleton from a YAML file.

    Args:
        setting: setting or option that names the file, as messages call it.

    Raises:
        InputError: the file is missing, is not YAML, or has an impossible value.
    """
    where = f"{setting}={path}"
    return skeleton_of_content(_read_yaml(path, where), where, path.stem, notify)


def _read_yaml(path: Path, where: str) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(
            f"{where} must be a YAML file that exists and can be read, got {error.strerror}; "
            "correct the path"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where} must be plain YAML, text, numbers and lists, got: {reason}"
        ) from None


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML whose keys are unique; PyYAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, count in collections.Counter(keys).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} is there {count} times", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def skeleton_of_content(content: Any, where: str, name: str, notify: Notify) -> Skeleton:
    """Build the skeleton that a file describes, after checks of every key.

    Args:
        content: the parsed file.
        where: setting and file, as messages call them.
        name: the skeleton's name if the file has none.
    """
    if not isinstance(content, dict):
        raise InputError(
            f"{where} must map {', '.join(KEYS)} to values, of which joints is required, got "
            f"{_brief(content)}"
        )
    for key in content:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where}: a key must be one of {', '.join(KEYS)}, got {key!r}{hint}")
    name = content.get("name", name)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: name must be text, got {_brief(name)}")
    joints = _joints(content.get("joints"), where)
    edges = _pairs(content.get("edges"), "edges", joints, where)
    by_name = pairs_by_name(joints) or pairs_by_name([*map(without_number, joints)])
    pairs = _pairs(content.get("flip_pairs"), "flip_pairs", joints, where)
    check_each_once(pairs, joints, where)
    if content.get("flip_pairs") is None:
        pairs = by_name
        _require_partners(joints, pairs, where)
        notify(f"note: {where} has no flip_pairs; {pairs_text(joints, pairs)}")
    elif lacking := [pair for pair in by_name if set(pair) not in map(set, pairs)]:
        notify(
            f"note: {where} has flip_pairs that a mirrored image exchanges, and lacks "
            f"{_named(joints, lacking)}, which the names suggest"
        )
    if not edges:
        notify(f"note: {where} has no edges; IGP-GCN moves each joint alone")
    if content.get("oks_sigmas") is None:
        notify(f"note: {where} has no oks_sigmas; {sigma_text()}")
    sigmas = _sigmas(content.get("oks_sigmas"), joints, where)
    if max(sigmas) > LARGE_SIGMA:
        notify(
            f"note: {where} has oks_sigmas of up to {max(sigmas):g}, while COCO's largest is "
            "0.107, so OKS and AP will be high; pycocotools lists sigmas times 10: divide "
            "those by 10"
        )
    return Skeleton(
        name=name.strip(),
        joints=joints,
        edges=edges,
        flip_pairs=pairs,
        oks_sigmas=sigmas,
        upper_body=_upper_body(content.get("upper_body"), joints, where),
    )


def _joints(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(
            f"{where}: joints must be a list of at least 2 names, got {_brief(value)}"
        )
    for place, joint in enumerate(value):
        is_name = isinstance(joint, str) and joint.strip() == joint and joint.isprintable()
        if not is_name or not joint or "$" in joint:
            raise InputError(
                f"{where}: joints must be names, printable text without $ and outer blanks, got "
                f"{_brief(joint)} at place {place} (from 0); quote it if YAML reads it as another "
                "kind of value"
            )
    doubled = [joint for joint, count in collections.Counter(value).items() if count > 1]
    if doubled:
        raise InputError(f"{where}: joints must have each name once, got {doubled[0]!r} twice")
    return tuple(value)


def _pairs(value: Any, key: str, joints: Sequence[str], where: str) -> Pairs:
    """Return pairs of joint indices from pairs of names or indices, each once."""
    value = [] if value is None else value
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} must be a list of pairs of joints, got {_brief(value)}")
    pairs: list[tuple[int, int]] = []
    for place, pair in enumerate(value):
        at = f"{where}: {key}, place {place} (from 0)"
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{at}: must be a pair of joints, [a, b], got {_brief(pair)}")
        first, second = (_index(joint, joints, at) for joint in pair)
        if first == second:
            raise InputError(f"{at}: must join two different joints, got {joints[first]} twice")
        if {first, second} in map(set, pairs):
            raise InputError(
                f"{at}: every pair must be there once, got {joints[first]} and "
                f"{joints[second]} again"
            )
        pairs.append((first, second))
    return tuple(pairs)


def pairs_by_name(joints: Sequence[str]) -> Pairs:
    """Return the left-right pairs that follow from the names, whatever their spelling."""
    places: dict[str, dict[str, list[int]]] = {LEFT: {}, RIGHT: {}}
    for index, joint in enumerate(joints):
        side, rest = split_side(joint)
        if side:
            places[side].setdefault(rest, []).append(index)
    return tuple(
        (left[0], right[0])
        for rest, left in places[LEFT].items()
        if len(left) == len(right := places[RIGHT].get(rest, [])) == 1
    )


def _require_partners(joints: Sequence[str], pairs: Pairs, where: str) -> None:
    """Check that there are pairs if the names have both sides."""
    sides = {split_side(without_number(joint))[0]: joint for joint in joints[::-1]}
    if not pairs and LEFT in sides and RIGHT in sides:
        raise InputError(
            f"{where}: flip_pairs must be given if the names of left and right joints do not "
            f"differ in the side alone, got names like {sides[LEFT]} and {sides[RIGHT]}; list the "
            "pairs as flip_pairs in a skeleton file, or [] if a mirrored image exchanges none"
        )


def _index(joint: Any, joints: Sequence[str], at: str) -> int:
    """Return the index of a joint that is given by its name or by its index, from 0."""
    if isinstance(joint, str) and joint in joints:
        return joints.index(joint)
    if isinstance(joint, int) and not isinstance(joint, bool) and 0 <= joint < len(joints):
        return joint
    near = difflib.get_close_matches(str(joint), joints, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; the names are {first_names(joints)}"
    raise InputError(
        f"{at}: must be a joint's name, or its place 0 to {len(joints) - 1}, got {_brief(joint)}"
        f"{hint}"
    )


def check_each_once(pairs: Sequence[tuple[int, int]], joints: Sequence[str], where: str) -> None:
    """Check that no joint is in two of the left-right pairs."""
    counts = collections.Counter(index for pair in pairs for index in pair)
    doubled = [joints[index] for index, count in counts.items() if count > 1]
    if doubled:
        raise InputError(
            f"{where}: flip_pairs must have each joint in one pair at most, got {doubled[0]} in "
            "two; a mirrored image exchanges the two joints of a pair"
        )


def _sigmas(value: Any, joints: Sequence[str], where: str) -> tuple[float, ...]:
    """Return a sigma per joint from a list, a mapping by name, one number, or nothing."""
    if value is None:
        value = UNIFORM_SIGMA
    if isinstance(value, dict):
        for joint in value:
            _index(joint, joints, f"{where}: oks_sigmas")
        missing = [joint for joint in joints if joint not in value]
        if missing:
            raise InputError(
                f"{where}: oks_sigmas must have a number for every joint, got none for "
                f"{first_names(missing)}"
            )
        value = [value[joint] for joint in joints]
    elif not isinstance(value, list):
        value = [value] * len(joints)
    if len(value) != len(joints):
        raise InputError(
            f"{where}: oks_sigmas must be one number, or one for each of the {len(joints)} "
            f"joints, got {len(value)}"
        )
    return tuple(_sigma(sigma, joint, where) for sigma, joint in zip(value, joints, strict=True))


def _sigma(value: Any, joint: str, where: str) -> float:
    try:
        sigma = math.nan if isinstance(value, bool) else float(value)  # YAML reads 5e-2 as text
    except (TypeError, ValueError, OverflowError):
        sigma = math.nan
    if not 0 < sigma <= MAX_SIGMA:
        raise InputError(
            f"{where}: oks_sigmas must be above 0 and at most {MAX_SIGMA:g}, as COCO's 0.025 to "
            f"0.107, got {_brief(value)} for {joint}"
        )
    return sigma


def _upper_body(value: Any, joints: Sequence[str], where: str) -> tuple[int, ...]:
    value = [] if value is None else value
    if not isinstance(value, list):
        raise InputError(f"{where}: upper_body must be a list of joints, got {_brief(value)}")
    upper = [_index(joint, joints, f"{where}: upper_body") for joint in value]
    if len(set(upper)) < len(upper) or len(upper) == len(joints):
        raise InputError(
            f"{where}: upper_body must name some of the {len(joints)} joints, each once, and not "
            f"all, got {_brief(value)}"
        )
    return tuple(upper)


def to_plain(skeleton: Skeleton) -> dict[str, Any]:
    """Return the skeleton as a skeleton file has it."""

    def by_name(pairs: Sequence[tuple[int, int]]) -> list[list[str]]:
        return [[skeleton.joints[index] for index in pair] for pair in pairs]

    return {
        "name": skeleton.name,
        "joints": list(skeleton.joints),
        "edges": by_name(skeleton.edges),
        "flip_pairs": by_name(skeleton.flip_pairs),
        "oks_sigmas": list(skeleton.oks_sigmas),
        "upper_body": [skeleton.joints[index] for index in skeleton.upper_body],
    }


def first_names(names: Sequence[str]) -> str:
    """Return the names, or the first few and how many there are."""
    listed = ", ".join(names[:SHOWN])
    return listed if len(names) <= SHOWN else f"{listed} ... ({len(names)})"


def pairs_text(joints: Sequence[str], pairs: Pairs) -> str:
    """Describe the left-right pairs that follow from the names."""
    if not pairs:
        return (
            "no two names have the words left and right, so a mirrored image exchanges no joints; "
            "if it should, list the pairs as flip_pairs in a skeleton file"
        )
    return f"by their names the left-right pairs are {_named(joints, pairs)}"


def _named(joints: Sequence[str], pairs: Sequence[tuple[int, int]]) -> str:
    return first_names([f"{joints[left]}/{joints[right]}" for left, right in pairs])


def sigma_text() -> str:
    """Describe the sigma of joints that have none of their own."""
    return f"each joint has {UNIFORM_SIGMA:g}, so AP compares only with AP of the same sigmas"


def _brief(value: object) -> str:
    text = reprlib.repr(value)  # the file's lists may hold each other
    return text if len(text) <= 60 else f"{text[:57]}..."
