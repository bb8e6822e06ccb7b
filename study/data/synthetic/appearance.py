"""What drawn people wear, and the colours of each point of their bodies.

Looks come from a stream of their own, so that they can change without moving a label. Colours are
blue, green, red from 0 to 255, as cv2 has them; arrays of colours are planar, (3, N).
"""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np

from study.data.synthetic.body import Body
from study.data.synthetic.geometry import Array, Capsule, Dice

Colour = tuple[float, float, float]
Tones = tuple[Colour, Colour, float]
"""The colour of a capsule's beginning, of its rest, and the share of its length between them."""

SKINS = ((196, 219, 250), (160, 190, 232), (120, 158, 208), (84, 120, 172), (50, 78, 122))
HAIRS = (
    *((28, 26, 30), (40, 60, 92), (70, 130, 190), (120, 190, 226), (34, 62, 140)),
    (150, 150, 152),
)
PATTERNS = {"plain": 5.0, "hoops": 2.0, "stripes": 1.2, "checks": 1.0, "halves": 1.0}
FRONTS = {"print": 2.0, "open": 2.0, "buttons": 1.5, "neck": 2.0}
TEXTURED = ("torso", "pelvis", "head")
EYE, EYE_WHITE, BROW, MOUTH = (40, 30, 30), (245, 245, 245), (40, 45, 55), (70, 60, 150)


@dataclasses.dataclass(frozen=True)
class Look:
    """Colours and cuts of one person."""

    skin: Colour
    hair: Colour
    shirt: Colour
    second: Colour
    trousers: Colour
    shoes: Colour
    cap: Colour | None
    pattern: str
    front: str
    stripe: float
    """Stripes per stature."""
    sleeve: float
    """Where sleeves end: 0 at the shoulder, 1 at the elbow, 2 at the wrist."""
    leg: float
    """Where trousers end: 0 at the hip, 1 at the knee, 2 at the ankle."""
    stature: float


OUTFIT = ("shirt", "second", "trousers", "pattern", "front", "stripe", "sleeve", "leg")
"""What people who wear the same have in common."""


def draw_look(dice: Dice, body: Body) -> Look:
    """A person's colours and clothes."""
    tone = dice.between(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    hair = HAIRS[dice.whole(0, len(HAIRS) - 1)]
    sleeve = dice.between(0.35, 0.8) if dice.chance(0.5) else dice.between(1.6, 1.95)
    return Look(
        skin=skin,
        hair=mix(skin, hair, 0.12) if body.hair == "bald" else hair,
        shirt=draw_colour(dice),
        second=draw_colour(dice),
        trousers=draw_colour(dice, 0.75),
        shoes=draw_colour(dice),
        cap=draw_colour(dice) if body.hair == "cap" else None,
        pattern=dice.pick(PATTERNS),
        front=dice.pick(FRONTS),
        stripe=dice.between(12, 22),
        sleeve=0.05 if dice.chance(0.1) else sleeve,
        leg=dice.between(0.45, 0.95) if dice.chance(0.4) else dice.between(1.7, 1.98),
        stature=body.stature,
    )


def draw_colour(dice: Dice, strength: float = 1.0) -> Colour:
    """Array colour a cloth has: vivid, pale or nearly grey."""
    hue, saturation = dice.between(0, 1), dice.between(0, 0.85) * strength
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, dice.between(0.15, 0.98))
    return (255 * blue, 255 * green, 255 * red)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The first colour with a share of the second."""
    b, g, r = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return (b, g, r)


def tones_of(part: str, look: Look) -> Tones:
    """The two colours of a body part, and where the first ends."""
    skin = look.skin
    if part in ("upper_arm", "forearm"):
        return look.shirt, skin, look.sleeve - (part == "forearm")
    if part in ("thigh", "shin"):
        return look.trousers, skin, look.leg - (part == "shin")
    plain = {"hair": look.hair, "cap": look.cap, "foot": look.shoes, "skirt": look.trousers}
    plain |= {"bag": look.second, "nose": mix(skin, (60, 80, 190), 0.5)}
    colour = plain.get(part) or skin
    return colour, colour, 1.0


def texture(capsule: Capsule, look: Look, depth: Array, x: Array, y: Array) -> Array:
    """The unlit colours of a point of the trunk or the head under each ray, (3, N)."""
    ox, oy, oz = capsule.origin
    dx, dy, dz = x - ox, y - oy, depth - oz
    left, up, front = (dx * axis[0] + dy * axis[1] + dz * axis[2] for axis in capsule.frame)
    if capsule.part == "head":
        return _paint_head(left, up, front, capsule.end_radius, look)
    if capsule.part == "pelvis":
        return _blend(_column(look.shirt), look.trousers, _soft(-up - 0.02 * look.stature))
    return _paint_torso(left, up, front, look)


def _column(colour: Colour) -> Array:
    return np.array(colour, dtype=np.float32)[:, None]


def _blend(paint: Array, colour: Colour, share: Array) -> Array:
    return paint + share * (_column(colour) - paint)


def _soft(inside_px: Array) -> Array:
    """1 inside, 0 outside, even over the one pixel between."""
    return np.minimum(np.maximum(inside_px + np.float32(0.5), 0), 1)


def _paint_torso(left: Array, up: Array, front: Array, look: Look) -> Array:
    unit = look.stature
    aside, at_front = np.abs(left), front > 0
    paint = _column(look.shirt)
    if look.pattern != "plain":
        paint = _blend(paint, look.second, _pattern(look, left / unit, up / unit))
    if look.front == "print":
        inside = np.minimum(0.05 * unit - aside, 0.045 * unit - np.abs(up + 0.12 * unit))
        paint = _blend(paint, look.second, _soft(inside) * at_front)
    elif look.front == "open":
        paint = _blend(paint, look.second, _soft(0.03 * unit - aside) * at_front)
    elif look.front == "buttons":
        paint = _blend(paint, BROW, _soft(0.3 - aside) * at_front)
    neck = up + np.where(at_front, 0.075 * unit - 1.1 * aside, 0.012 * unit)
    return _blend(paint, look.skin, _soft(neck))


def _pattern(look: Look, left: Array, up: Array) -> Array:
    if look.pattern == "halves":
        return up < -0.14
    hoops = (up * look.stripe) % 1 < 0.5
    if look.pattern == "hoops":
        return hoops
    stripes = (left * look.stripe) % 1 < 0.5
    return stripes if look.pattern == "stripes" else hoops ^ stripes


def _paint_head(left: Array, up: Array, front: Array, r: float, look: Look) -> Array:
    aside, at_front = np.abs(left), front > 0
    eye = np.sqrt((aside - 0.38 * r) * (aside - 0.38 * r) + (up - 0.14 * r) * (up - 0.14 * r))
    paint = _blend(_column(look.skin), EYE_WHITE, _soft(0.26 * r - eye) * at_front)
    paint = _blend(paint, EYE, _soft(0.18 * r - eye) * at_front)
    brow = np.minimum(0.22 * r - np.abs(aside - 0.4 * r), 0.05 * r - np.abs(up - 0.44 * r))
    paint = _blend(paint, BROW, _soft(brow) * at_front)
    mouth = np.minimum(0.28 * r - aside, 0.07 * r - np.abs(up + 0.56 * r))
    paint = _blend(paint, MOUTH, _soft(mouth) * at_front)
    paint = _blend(paint, look.hair, _soft(0.9 * up - 0.12 * r - front))
    return paint if look.cap is None else _blend(paint, look.cap, _soft(up - 0.48 * r))
