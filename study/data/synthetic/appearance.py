"""Clothes of drawn people, and the colors of each point of their bodies.

Looks are drawn from their own random stream, so that they can change without moving a label.
Colors are blue, green, red from 0 to 255, as in cv2; arrays of colors are planar, (3, N).
"""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np

from study.data.synthetic.body import Body
from study.data.synthetic.geometry import Array, Capsule, Rng

Color = tuple[float, float, float]
Tones = tuple[Color, Color, float]
"""Color of a capsule's start, color of its rest, and the share of its length that is the start."""

SKINS = ((196, 219, 250), (160, 190, 232), (120, 158, 208), (84, 120, 172), (50, 78, 122))
HAIRS = (
    (28, 26, 30),
    (40, 60, 92),
    (70, 130, 190),
    (120, 190, 226),
    (34, 62, 140),
    (150, 150, 152),
)
# How often each pattern and each front of a shirt is drawn.
PATTERNS = {"plain": 5.0, "hoops": 2.0, "stripes": 1.2, "checks": 1.0, "halves": 1.0}
FRONTS = {"print": 2.0, "open": 2.0, "buttons": 1.5, "neck": 2.0}
TEXTURED = ("torso", "pelvis", "head")
EYE, EYE_WHITE, BROW, MOUTH = (40, 30, 30), (245, 245, 245), (40, 45, 55), (70, 60, 150)


@dataclasses.dataclass(frozen=True)
class Look:
    """Colors and cuts of one person."""

    skin: Color
    hair: Color
    shirt: Color
    second: Color
    trousers: Color
    shoes: Color
    cap: Color | None
    pattern: str
    front: str
    stripe: float
    """Stripes per stature."""
    sleeve: float
    """End of the sleeves: 0 at the shoulder, 1 at the elbow, 2 at the wrist."""
    leg: float
    """End of the trousers: 0 at the hip, 1 at the knee, 2 at the ankle."""
    stature: float


OUTFIT = ("shirt", "second", "trousers", "pattern", "front", "stripe", "sleeve", "leg")
"""Fields of a look that people in the same outfit share."""


def draw_look(rng: Rng, body: Body) -> Look:
    """Draw a person's colors and clothes."""
    tone = rng.between(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    hair = HAIRS[rng.whole(0, len(HAIRS) - 1)]
    sleeve = rng.between(0.35, 0.8) if rng.chance(0.5) else rng.between(1.6, 1.95)
    return Look(
        skin=skin,
        hair=mix(skin, hair, 0.12) if body.hair == "bald" else hair,
        shirt=draw_color(rng),
        second=draw_color(rng),
        trousers=draw_color(rng, 0.75),
        shoes=draw_color(rng),
        cap=draw_color(rng) if body.hair == "cap" else None,
        pattern=rng.pick(PATTERNS),
        front=rng.pick(FRONTS),
        stripe=rng.between(12, 22),
        sleeve=0.05 if rng.chance(0.1) else sleeve,
        leg=rng.between(0.45, 0.95) if rng.chance(0.4) else rng.between(1.7, 1.98),
        stature=body.stature,
    )


def draw_color(rng: Rng, strength: float = 1.0) -> Color:
    """Draw a color of cloth: vivid, pale or nearly gray."""
    hue, saturation = rng.between(0, 1), rng.between(0, 0.85) * strength
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, rng.between(0.15, 0.98))
    return (255 * blue, 255 * green, 255 * red)


def mix(first: Color, second: Color, share: float) -> Color:
    """Mix a share of the second color into the first."""
    b, g, r = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return (b, g, r)


def tones_of(part: str, look: Look) -> Tones:
    """Return the two colors of a body part, and the share of its length that has the first."""
    skin = look.skin
    if part in ("upper_arm", "forearm"):
        return look.shirt, skin, look.sleeve - (part == "forearm")
    if part in ("thigh", "shin"):
        return look.trousers, skin, look.leg - (part == "shin")
    plain = {"hair": look.hair, "cap": look.cap, "foot": look.shoes, "skirt": look.trousers}
    plain |= {"bag": look.second, "nose": mix(skin, (60, 80, 190), 0.5)}
    color = plain.get(part) or skin
    return color, color, 1.0


def texture(capsule: Capsule, look: Look, depth: Array, x: Array, y: Array) -> Array:
    """Return the unlit color of the trunk or the head at each of N rays, (3, N)."""
    ox, oy, oz = capsule.origin
    dx, dy, dz = x - ox, y - oy, depth - oz
    left, up, front = (dx * axis[0] + dy * axis[1] + dz * axis[2] for axis in capsule.frame)
    if capsule.part == "head":
        return _paint_head(left, up, front, capsule.end_radius, look)
    if capsule.part == "pelvis":
        return _blend(_column(look.shirt), look.trousers, _soft(-up - 0.02 * look.stature))
    return _paint_torso(left, up, front, look)


def _column(color: Color) -> Array:
    return np.array(color, dtype=np.float32)[:, None]


def _blend(paint: Array, color: Color, share: Array) -> Array:
    return paint + share * (_column(color) - paint)


def _soft(inside_px: Array) -> Array:
    """Return 1 inside, 0 outside, linear over the pixel between them."""
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
