"""Looks of drawn people: random per stream, in range, and the same in every run."""

from __future__ import annotations

import numpy as np
import pytest

from study.data.synthetic.appearance import PATTERNS, draw_look, mix, texture, tones_of
from study.data.synthetic.body import build_body
from study.data.synthetic.geometry import Rng

BODY = build_body(Rng(7, 0, 0, 0), 100.0)


def test_look_depends_only_on_its_random_stream() -> None:
    looks = [draw_look(Rng(seed, 0, 0, 1), BODY) for seed in (3, 3, 4)]
    assert looks[0] == looks[1] != looks[2]
    assert looks[0].stature == BODY.stature


def test_all_patterns_and_lengths_of_sleeves_are_drawn() -> None:
    looks = [draw_look(Rng(seed, 0, 0, 1), BODY) for seed in range(200)]
    assert {look.pattern for look in looks} == set(PATTERNS)
    assert min(look.sleeve for look in looks) < 1 < max(look.sleeve for look in looks) < 2
    colors = np.array([[look.skin, look.hair, look.shirt, look.shoes] for look in looks])
    assert colors.min() >= 0 and colors.max() <= 255


@pytest.mark.parametrize(
    ("part", "first", "share"), [("upper_arm", "shirt", 0.0), ("forearm", "shirt", -1.0)]
)
def test_a_sleeve_covers_its_length_of_the_arm(part: str, first: str, share: float) -> None:
    look = draw_look(Rng(3, 0, 0, 1), BODY)
    assert tones_of(part, look) == (getattr(look, first), look.skin, look.sleeve + share)


def test_a_part_without_clothes_has_the_color_of_skin() -> None:
    look = draw_look(Rng(3, 0, 0, 1), BODY)
    assert tones_of("neck", look) == (look.skin, look.skin, 1.0)
    assert tones_of("foot", look) == (look.shoes, look.shoes, 1.0)


def test_colors_are_mixed_channel_by_channel() -> None:
    assert mix((0, 100, 200), (100, 100, 100), 0.25) == (25, 100, 175)


@pytest.mark.parametrize("part", ["torso", "pelvis", "head"])
def test_every_point_of_a_textured_part_has_a_color(part: str) -> None:
    look = draw_look(Rng(3, 0, 0, 1), BODY)
    capsule = next(each for each in BODY.parts if each.part == part)
    x, y, z = capsule.origin
    offsets = np.linspace(-10, 10, 9, dtype=np.float32)
    colors = texture(capsule, look, z + offsets, x + offsets, y - offsets)
    assert colors.shape == (3, 9)
    assert colors.min() >= 0 and colors.max() <= 255
