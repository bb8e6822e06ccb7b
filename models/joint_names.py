"""Names of joints, compared whatever their spelling and order.

``RAnkle``, ``right-ankle``, ``ANKLE_RIGHT`` and ``Right foot`` all name the right ankle. The
synonyms are those of COCO, CrowdPose, MPII, LSP, AI Challenger, Human3.6M and OpenPose. Names of
different places are never one: ``head_bottom`` is no eye, the ``nose`` is not the head.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

LEFT, RIGHT = "left", "right"
SIDES = {"left": LEFT, "l": LEFT, "lt": LEFT, "right": RIGHT, "r": RIGHT, "rt": RIGHT}
SYNONYMS = (
    ("ankle", "ank", "foot"),
    ("elbow", "elb"),
    ("head", "head top", "top of head"),
    ("neck", "upper neck", "thorax"),
    ("shoulder", "sho", "shldr"),
    ("wrist", "wri"),
)
"""Names of one place on the body; they are used where equal spelling finds no partner."""
MEANINGS = {" ".join(sorted(synonym.split())): group[0] for group in SYNONYMS for synonym in group}
PLACES = (
    "ankle bottom center chest ear elbow eye foot hand head heel hip index inner knee mid mouth "
    "neck nose outer pelvis pinky shoulder spine thorax thumb toe top upper wrist big small "
    "ank elb sho shldr wri"
).split()
"""Words that are found in a name without blanks, like ``rightankle``, ``LEAR`` and ``headtop``;
abbreviations are last, since the first that fits is taken."""
UNSPACED = re.compile(f"(left|right|l|r)?((?:{'|'.join(PLACES)})+)(left|right|l|r)?")
CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Places in a name like ``RightAnkle`` or ``RPaw`` where a word begins."""
NUMBER = re.compile(r"^\W*\d+[\W_]*|[\W_]*\d+\W*$")
"""A number before or after a name, like those of ``0: nose``, ``nose_1`` and ``nose (1)``."""
WORDS = re.compile(r"[^\W_]+")
Key = tuple[str, str]
"""Side and place of a joint, in a form that is equal for names that mean the same."""


@dataclasses.dataclass(frozen=True)
class JointMatch:
    """The given names of wanted joints, found by name."""

    places: tuple[int | None, ...]
    """For each wanted joint, the index of the given name that means it; None if there is none."""
    extra: tuple[int, ...]
    """Indices of the given names that mean no wanted joint."""

    @property
    def order(self) -> tuple[int, ...] | None:
        """The places if each wanted joint has a name and each name a joint, otherwise None."""
        found = tuple(place for place in self.places if place is not None)
        return None if self.extra or len(found) < len(self.places) else found


def match_joints(names: Sequence[str], wanted: Sequence[str]) -> JointMatch:
    """Find each wanted joint among the names: by its spelling, otherwise by a synonym.

    A name that could mean two joints, or shares its meaning with another name, is not matched.
    """
    places: dict[int, int] = {}
    for key_of in (_spelling, _meaning):
        used = set(places.values())
        ours = _unique(wanted, key_of, skip=set(places))
        theirs = _unique(names, key_of, skip=used)
        places.update((ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    matched = set(places.values())
    return JointMatch(
        places=tuple(places.get(joint) for joint in range(len(wanted))),
        extra=tuple(place for place in range(len(names)) if place not in matched),
    )


def repeated_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that differ from another one in spelling alone, or not at all."""
    counts = collections.Counter(map(_spelling, names))
    return tuple(name for name in names if counts[_spelling(name)] > 1)


def split_side(name: str) -> tuple[str, str]:
    """Return the side, ``left``, ``right`` or empty, and the rest in lower case: "big toe"."""
    words = [word for token in WORDS.findall(name) for word in _split(token)]
    sides = {SIDES[word] for word in words if word in SIDES}
    place = [word for word in words if word not in SIDES]
    if len(sides) != 1 or not place:
        return "", " ".join(words)
    return sides.pop(), " ".join(place)


def without_number(name: str) -> str:
    """Return the name without a number before or after it; a number alone stays."""
    return NUMBER.sub("", name) or name


def _split(token: str) -> list[str]:
    """Split a name without blanks into its words, in lower case."""
    if match := UNSPACED.fullmatch(token.lower()):
        before, places, after = match.groups()
        words = (before, *re.findall("|".join(PLACES), places), after)
        return [word for word in words if word]
    return CAPITALS.sub(" ", token).lower().split()


def _spelling(name: str) -> Key:
    """Return the key of the name alone: equal if names differ in case, blanks and order."""
    side, place = split_side(name)
    return side, " ".join(sorted(place.split()))


def _meaning(name: str) -> Key:
    """Return the key of the joint: equal for synonyms."""
    side, place = _spelling(name)
    return side, MEANINGS.get(place, place)


def _unique(names: Sequence[str], key_of: Callable[[str], Key], skip: set[int]) -> dict[Key, int]:
    """Return the index of each name by its key; keys of several names are left out."""
    keys = {index: key_of(name) for index, name in enumerate(names) if index not in skip}
    counts = collections.Counter(keys.values())
    return {key: index for index, key in keys.items() if counts[key] == 1}
