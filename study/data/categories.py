"""The category of people in an annotation file, and the order in which its joints are read.

A file may have other categories too: boxes without joints, an export's empty first category,
animals. It may spell the joints' names otherwise, or list them in another order. Whatever reads
a file's keypoints reads them as ``PersonCategory`` prescribes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.joint_names import match_joints, repeated_names
from models.skeleton import Skeleton
from study.errors import InputError

PERSON = "person"
OTHER_ORDER = "joints in another order"
OTHER_NAMES = "joints of other names"
NO_NAMES = "joints without names"
LEFT_OUT = "annotations of another category"
READING = (OTHER_ORDER, OTHER_NAMES, NO_NAMES, LEFT_OUT)
"""Kinds of notes about how a file is read, which are shown in full."""
SETTING = "data.category"
Category = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PersonCategory:
    """The category of the people in a file, and how its keypoints are read."""

    id: int | None
    """None: the file has no categories, or the category has no number."""
    name: str
    joints: tuple[Any, ...]
    """Names of the joints as in the file; empty if it has none."""
    order: tuple[int, ...] | None
    """Place in the file's keypoints of each joint of the skeleton; None: they are read as they
    are in the file."""
    others: dict[int, str]
    """The other categories that annotations of the file have: names by id."""
    without_joints: frozenset[int]
    """Those of the others whose annotations should have no joints, since they list none."""

    @property
    def changes(self) -> list[Any]:
        """The new order and the ids left out, for fingerprints; empty if there are none."""
        return ["read", self.order, sorted(self.others)] if self.order or self.others else []


def person_category(
    categories: Any,
    annotations: Path,
    wanted: str | None = None,
    used: Collection[int] | None = None,
) -> Category:
    """Choose the category of people; an empty one if the file has no categories.

    It is the one of the wanted name, otherwise the one that lists joints. Where several do, it is
    the one whose annotations have joints; where several have, it is the one called person.

    Args:
        categories: the file's list.
        wanted: name of the category (``data.category``).
        used: ids of the categories of annotations with labeled joints; None if unknown.

    Raises:
        InputError: the categories are no list of objects, none has the wanted name, or several
            may be the people's.
    """
    if categories and not _is_list_of_objects(categories):
        raise InputError(
            f"the categories must be a list of objects with id and name, got "
            f"{str(categories)[:80]!a} in {annotations}; fix the file"
        )
    known = _listed_once(categories)
    if wanted is None:
        found = known
    else:
        found = [category for category in known if _plain(category.get("name")) == _plain(wanted)]
        if not found:
            raise InputError(
                f"{SETTING} must name a category of the file, got {SETTING}={wanted}, and "
                f"{_listed(known)} in {annotations}; correct it"
            )
    found = [category for category in found if category.get("keypoints")] or found
    if len(found) > 1:
        found = [c for c in found if used is None or category_id(c) in used] or found
    if len(found) > 1:
        found = [c for c in found if _plain(c.get("name")) == PERSON] or found
    if len(found) > 1 and (used is None or used):
        raise InputError(
            f"people must be of one category, the one with joints, got several, {_listed(found)}, "
            f"in {annotations}; set {SETTING} to the name of the people's, or give all people of "
            "the file one category"
        )
    return found[0] if found else {}


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _listed_once(categories: Sequence[Category] | None) -> list[Category]:
    """Return the categories, equal ones once."""
    found = list(categories or ())
    return [category for place, category in enumerate(found) if category not in found[:place]]


def _plain(name: object) -> str:
    return str(name).strip().casefold()


def _listed(categories: Iterable[Category]) -> str:
    """Name the categories for messages."""
    listed = [f"{c.get('name')} (id {c.get('id')})" for c in categories]
    return ", ".join(listed) or "no categories"


def category_id(category: Category) -> int | None:
    """Return the category's number, which some exports write as text; None if it has none."""
    number = category.get("id")
    if isinstance(number, str) and number.strip().isdecimal():
        return int(number)
    is_whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
    return int(number) if is_whole else None  # type: ignore[arg-type]


def read_category(
    categories: Any,
    annotations: Path,
    skeleton: Skeleton,
    category_ids: NDArray[np.int64],
    is_labeled: NDArray[np.bool_],
    wanted: str | None = None,
) -> PersonCategory:
    """Choose the category of people and decide how its keypoints are read.

    Args:
        categories: the file's list.
        category_ids: of each annotation, -1 if it has none, (N,).
        is_labeled: whether each annotation has labeled joints, (N,).
        wanted: name of the category (``data.category``).

    Raises:
        InputError: no category has the wanted name, several may be the people's, or another
            category has the id of the chosen one.
    """
    used = frozenset(np.unique(category_ids[is_labeled]).tolist())
    chosen = person_category(categories, annotations, wanted, used)
    number = category_id(chosen)
    others = [category for category in _listed_once(categories) if category != chosen]
    if twins := [c for c in others if number is not None and category_id(c) == number]:
        raise InputError(
            f"categories must have different ids, got {_listed([chosen, *twins])} in "
            f"{annotations}; fix the file"
        )
    present = set(np.unique(category_ids).tolist())
    names = {category_id(c): str(c.get("name")) for c in others if category_id(c) in present}
    bare = {category_id(c) for c in others if not c.get("keypoints")} if wanted is None else set()
    joints = chosen.get("keypoints") or ()
    joints = tuple(joints) if isinstance(joints, list | tuple) else (joints,)
    return PersonCategory(
        id=number,
        name=str(chosen.get("name", PERSON)),
        joints=joints,
        order=_order(joints, skeleton),
        others={number: name for number, name in names.items() if number is not None},
        without_joints=frozenset(number for number in bare & names.keys() if number is not None),
    )


def _order(joints: tuple[Any, ...], skeleton: Skeleton) -> tuple[int, ...] | None:
    """Return the place in the file of each joint, None if that is its own or is unknown."""
    if joints == skeleton.joints or _wrong_names(joints, skeleton):
        return None
    order = match_joints(joints, skeleton.joints).order if joints else None
    return None if order == tuple(range(skeleton.num_joints)) else order


def naming_fault(category: PersonCategory, skeleton: Skeleton) -> str | None:
    """Describe why the names of joints are not the skeleton's; None if they are, or missing."""
    fault = _wrong_names(category.joints, skeleton)
    return fault and f"the category of people is {category.name}; {fault}"


def naming_notes(category: PersonCategory, skeleton: Skeleton) -> list[tuple[str, str]]:
    """Describe how joints are read if it is not plainly as they are in the file: kind, detail."""
    joints, name = category.joints, skeleton.name
    if joints == skeleton.joints or _wrong_names(joints, skeleton):
        return []
    if not joints:
        return [(NO_NAMES, f"read in the order of data.skeleton={name}")]
    places = category.order or range(len(joints))
    pairs = list(zip(skeleton.joints, (joints[place] for place in places), strict=True))
    found = []
    if category.order is not None:
        listed = ", ".join(joints)
        found.append((OTHER_ORDER, f"read in the order of data.skeleton={name}, from {listed}"))
    renamed = [
        f"{theirs} as {ours}" for ours, theirs in pairs if _letters(ours) != _letters(theirs)
    ]
    if renamed:
        found.append((OTHER_NAMES, f"read as those of data.skeleton={name}: {', '.join(renamed)}"))
    elif any(ours != theirs for ours, theirs in pairs):
        found.append((OTHER_NAMES, f"read as those of data.skeleton={name}, in another spelling"))
    return found


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _wrong_names(joints: tuple[Any, ...], skeleton: Skeleton) -> str | None:
    if not joints or joints == skeleton.joints:
        return None
    wrong = [joint for joint in joints if not _is_name(joint)]
    if wrong:
        return (
            f"its keypoints must be the names of its joints, got {str(wrong[0])[:60]!r} among "
            f"{len(joints)}; write the names, or, if the joints are in the order of "
            f"data.skeleton={skeleton.name}, remove the list"
        )
    if repeated := repeated_names(joints):
        return (
            f"its joints must have different names, got {', '.join(repeated)}; correct the names "
            "in the file"
        )
    match = match_joints(joints, skeleton.joints)
    if match.order is not None:
        return None
    pairs = zip(skeleton.joints, match.places, strict=True)
    missing = ", ".join(joint for joint, place in pairs if place is None) or "none"
    extra = ", ".join(joints[place] for place in match.extra) or "none"
    return (
        f"its joints must be those of data.skeleton={skeleton.name}, got others: missing are "
        f"{missing}; not among them are {extra}; change data.skeleton (from_data takes the "
        "file's joints), or correct the names in the file"
    )


def _is_name(joint: object) -> bool:
    """Check that the value is text with a letter; a number does not name a joint."""
    return isinstance(joint, str) and any(character.isalpha() for character in joint)
