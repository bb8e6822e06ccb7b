"""One articulated person: proportions, poses, and the capsules of the body.

Lengths in the code are fractions of the stature, angles are degrees. The joints are COCO's.
"""

from __future__ import annotations

import dataclasses

from study.data.synthetic.geometry import (
    FACING_THE_CAMERA,
    Capsule,
    Frame,
    Rng,
    Vector,
    between,
    step,
)

JOINT_RADII = {
    "nose": 0.0,
    "eye": 0.0,
    "ear": 0.0,
    "shoulder": 0.042,
    "elbow": 0.03,
    "wrist": 0.022,
    "hip": 0.06,
    "knee": 0.043,
    "ankle": 0.027,
}
"""Height of the surface above each joint; the face's joints lie on it."""
FACE = ("nose", "eye", "ear")
HAIR_STYLES = {"short": 5.0, "long": 2.5, "bun": 1.0, "ponytail": 1.5, "bald": 0.8, "cap": 1.8}
Range = tuple[float, float]
NEUTRAL: dict[str, Range] = {
    "lean": (-4, 5),
    "tilt": (-4, 4),
    "bend": (-4, 10),
    "side_bend": (-6, 6),
    "spine_twist": (-12, 12),
    "head_yaw": (-16, 16),
    "nod": (-8, 12),
    "head_tilt": (-10, 10),
    "arm_flex": (-18, 22),
    "arm_out": (4, 20),
    "arm_twist": (-30, 10),
    "elbow": (5, 40),
    "leg_flex": (-6, 9),
    "leg_out": (1, 9),
    "leg_twist": (0, 22),
    "knee": (0, 9),
    "foot": (-5, 5),
}
"""Ranges of the angles of a standing person; a pose names only the angles that differ.

Flex lifts a limb to the front, out to its side. Lean and bend tip the body and the spine to the
front, tilt tips the body sideways."""
LIMBS = ("arm", "elbow", "leg", "knee", "foot")
# Pose, weight, then angles with their ranges. _a and _b are the two sides of the body; it is drawn
# for each person which of them is the left one.
_TABLE = """
stand        14
hands_on_hips  7 | arm_out 32 50 | arm_twist -95 -70 | elbow 85 115 | arm_flex -20 5
hold           4 | arm_flex 10 45 | arm_twist -70 -20 | elbow 70 120
walk         14 | leg_flex_a 15 36 | knee_a 2 18 | leg_flex_b -28 -8 | knee_b 12 42 | foot_b 10 35
                 | arm_flex_a -35 -8 | arm_flex_b 12 40 | elbow 10 60
run           5 | leg_flex_a 40 85 | knee_a 45 105 | leg_flex_b -38 -8 | knee_b 15 90
                 | foot_b 15 40 | arm_flex_a -60 -25 | arm_flex_b 10 55 | elbow 65 115 | lean 6 20
sit           2 | leg_flex 72 100 | knee 60 105 | leg_out 3 24 | lean -14 8 | arm_flex 10 55
                 | elbow 15 85
squat          1 | leg_flex 90 125 | knee 105 140 | leg_out 8 28 | lean 10 30 | arm_flex 30 90
                 | elbow 10 70 | foot -30 -10
kneel          1 | leg_flex_a 75 98 | knee_a 80 100 | leg_flex_b -12 8 | knee_b 75 100
                 | foot_b 20 60
lunge          3 | leg_flex_a 48 78 | knee_a 55 88 | leg_flex_b -38 -18 | knee_b 5 35
                 | foot_b 10 40 | arm_out 10 80 | elbow 10 90
arms_up        9 | arm_out 125 176 | elbow 0 60 | arm_twist -40 40
wave          10 | arm_out_a 85 165 | elbow_a 10 110 | arm_twist_a 20 110
arms_wide      6 | arm_out 60 105 | elbow 0 50 | arm_twist -60 60
reach          4 | arm_flex_a 55 125 | elbow_a 0 45 | arm_flex_b -20 90
bend           1 | bend 30 75 | lean 5 30 | leg_flex 20 50 | knee 0 30 | arm_flex 20 95
                 | elbow 0 40 | nod -35 5
jump           2 | leg_flex_a 15 80 | knee_a 30 110 | leg_flex_b -20 60 | knee_b 30 110
                 | arm_out 50 165 | elbow 0 60 | foot 10 45
star           4 | arm_out 95 145 | elbow 0 20 | leg_out 18 36
kick           2 | leg_flex_a 55 105 | knee_a 0 35 | lean -22 -4 | arm_out 20 90 | elbow 10 70
dance          2 | bend -15 35 | side_bend -25 25 | spine_twist -30 30 | arm_flex -40 120
                 | arm_out 5 150 | arm_twist -80 80 | elbow 0 125 | leg_flex -25 70
                 | leg_out 0 40 | knee 0 90
lie_face_down  0.3 | yaw 65 115 | lean 75 100 | arm_flex -20 130 | arm_out 5 70 | leg_flex -5 45
                 | knee 0 70 | foot 15 40
lie_on_back  0.3 | yaw 50 115 | lean -100 -75 | arm_flex -10 120 | arm_out 5 70 | leg_flex -5 60
                 | knee 0 90 | foot 15 40
upside_down  0.4 | tilt 135 205 | arm_out 140 176 | elbow 0 20 | leg_out 0 40 | leg_flex -30 50
                 | knee 0 60 | foot 10 45 | nod -40 -10
"""


@dataclasses.dataclass
class Body:
    """Capsules and joints of a person in the image frame, pixels; built at the origin."""

    stature: float
    """Height when standing straight, pixels."""
    head_radius: float
    parts: list[Capsule] = dataclasses.field(default_factory=list)
    joints: dict[str, Vector] = dataclasses.field(default_factory=dict)
    hair: str = "short"

    def moved(self, by: Vector) -> Body:
        """Return the body moved by a vector."""
        joints = {
            name: (p[0] + by[0], p[1] + by[1], p[2] + by[2]) for name, p in self.joints.items()
        }
        parts = [part.moved(by) for part in self.parts]
        return dataclasses.replace(self, parts=parts, joints=joints)

    def bounds(self) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom of all capsules."""
        edges = (part.bounds() for part in self.parts)
        lefts, tops, rights, bottoms = zip(*edges, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)

    def joint_radius(self, joint: str) -> float:
        """Return how far the surface lies above the joint, pixels."""
        return JOINT_RADII[joint.split("_")[-1]] * self.stature


@dataclasses.dataclass(frozen=True)
class Build:
    """Lengths and radii of one person, pixels."""

    unit: float
    head: float
    leg: float
    arm: float
    shoulder: float
    hip: float
    girth: float


def draw_build(rng: Rng, stature: float) -> Build:
    """Draw a person's proportions: adults of many shapes, one in six a child with a large head."""
    child = rng.chance(1 / 6)
    head = rng.between(1.15, 1.4) if child else rng.between(0.92, 1.15)
    leg = rng.between(0.82, 0.95) if child else rng.between(0.92, 1.08)
    girth = rng.between(0.95, 1.4)
    return Build(
        unit=stature,
        head=0.074 * head * stature,
        leg=leg * stature,
        arm=rng.between(0.93, 1.08) * (0.5 + 0.5 * leg) * stature,
        shoulder=rng.between(0.095, 0.122) * stature,
        hip=rng.between(0.052, 0.068) * stature,
        girth=girth * stature,
    )


def build_body(rng: Rng, stature: float) -> Body:
    """Build a person in a random pose, with the middle of the hips at the origin."""
    build, angles = draw_build(rng, stature), draw_angles(rng)
    body = Body(stature=stature, head_radius=build.head, hair=rng.pick(HAIR_STYLES))
    pelvis = (
        FACING_THE_CAMERA.pitch(angles["camera"])
        .yaw(angles["yaw"])
        .roll(angles["tilt"])
        .pitch(angles["lean"])
    )
    chest = pelvis.pitch(angles["bend"]).roll(angles["side_bend"]).yaw(angles["spine_twist"])
    neck = _add_trunk(body, build, pelvis, chest)
    head = chest.yaw(angles["head_yaw"]).pitch(angles["nod"]).roll(angles["head_tilt"])
    _add_head(body, build, neck, chest, head)
    for side in ("left", "right"):
        _add_arm(body, build, side, neck, chest, angles)
        _add_leg(body, build, side, pelvis, angles)
    _add_extras(body, build, rng, neck, chest)
    return body


def _add_trunk(body: Body, build: Build, pelvis: Frame, chest: Frame) -> Vector:
    """Add hips to shoulders; return the base of the neck."""
    u, g = build.unit, build.girth
    waist = step((0.0, 0.0, 0.0), (pelvis.up, 0.1 * u))
    neck = step(waist, (chest.up, 0.19 * u))
    for sign in (1, -1):
        hip = step((0.0, 0.0, 0.0), (pelvis.left, sign * build.hip * 0.85))
        side = step(waist, (chest.left, sign * 0.042 * g))
        top = step(neck, (chest.left, sign * (build.shoulder - 0.05 * u)), (chest.up, -0.05 * u))
        body.parts.append(Capsule("pelvis", hip, side, 0.062 * g, 0.058 * g, pelvis, waist))
        body.parts.append(Capsule("torso", side, top, 0.058 * g, 0.066 * g, chest, neck))
    breast = step(neck, (chest.up, -0.045 * u))
    body.parts.append(Capsule("torso", waist, breast, 0.06 * g, 0.064 * g, chest, neck))
    left, right = (
        step(neck, (chest.left, sign * (build.shoulder - 0.01 * u)), (chest.up, -0.028 * u))
        for sign in (1, -1)
    )
    body.parts.append(Capsule("torso", left, right, 0.04 * g, 0.04 * g, chest, neck))
    return neck


def _add_head(body: Body, build: Build, neck: Vector, chest: Frame, head: Frame) -> None:
    u, r = build.unit, build.head
    throat = step(neck, (chest.up, 0.035 * u))
    chin = step(throat, (head.up, 0.72 * r), (head.front, 0.15 * r))
    crown = step(chin, (head.up, 0.42 * r))
    middle = step(chin, (head.up, 0.21 * r))
    body.parts.append(Capsule("neck", neck, chin, 0.034 * build.girth, 0.032 * u, chest, neck))
    body.parts.append(Capsule("head", chin, crown, 0.95 * r, r, head, middle))
    bridge = step(middle, (head.front, 0.93 * r), (head.up, 0.08 * r))
    nose = step(middle, (head.front, 1.1 * r), (head.up, -0.14 * r))
    body.parts.append(Capsule("nose", bridge, nose, 0.07 * r, 0.14 * r, head, middle))
    body.joints["nose"] = step(nose, (head.front, 0.12 * r))
    for side, sign in (("left", 1), ("right", -1)):
        ear = step(middle, (head.left, sign * 1.02 * r), (head.front, -0.06 * r))
        top = step(ear, (head.up, 0.16 * r))
        low = step(ear, (head.up, -0.16 * r))
        body.parts.append(Capsule("ear", top, low, 0.2 * r, 0.15 * r, head, middle))
        body.joints[f"{side}_ear"] = step(ear, (head.left, sign * 0.1 * r))
        body.joints[f"{side}_eye"] = step(
            middle, (head.left, sign * 0.38 * r), (head.up, 0.14 * r), (head.front, 0.92 * r)
        )
    _add_hair(body, r, middle, neck, chest, head)


def _add_hair(
    body: Body, r: float, middle: Vector, neck: Vector, chest: Frame, head: Frame
) -> None:
    if body.hair == "long":
        top = step(middle, (head.front, -0.3 * r), (head.up, 0.15 * r))
        end = step(neck, (chest.front, -0.6 * r), (chest.up, -0.5 * r))
        body.parts.append(Capsule("hair", top, end, 0.98 * r, 0.7 * r, head, middle))
    elif body.hair == "bun":
        bun = step(middle, (head.front, -0.75 * r), (head.up, 0.85 * r))
        body.parts.append(Capsule("hair", bun, bun, 0.45 * r, 0.45 * r, head, middle))
    elif body.hair == "ponytail":
        top = step(middle, (head.front, -1.0 * r), (head.up, 0.4 * r))
        end = step(top, (head.front, -0.5 * r), (head.up, -1.7 * r))
        body.parts.append(Capsule("hair", top, end, 0.4 * r, 0.22 * r, head, middle))
    elif body.hair == "cap":
        brow = step(middle, (head.front, 0.75 * r), (head.up, 0.5 * r))
        for sign in (1, -1):
            start = step(brow, (head.left, sign * 0.3 * r))
            tip = step(start, (head.front, 0.85 * r), (head.up, -0.1 * r))
            body.parts.append(Capsule("cap", start, tip, 0.22 * r, 0.12 * r, head, middle))


def _add_arm(
    body: Body, build: Build, side: str, neck: Vector, chest: Frame, angles: dict[str, float]
) -> None:
    u, sign = build.unit, 1 if side == "left" else -1
    flex, out, twist, bend = (
        angles[f"{side}_{name}"] for name in ("arm_flex", "arm_out", "arm_twist", "elbow")
    )
    # A raised arm lifts its shoulder.
    lift = 0.03 * u * max(0.0, out - 60.0) / 100.0
    upper = chest.roll(-sign * out).pitch(-flex).yaw(sign * twist)
    fore = upper.pitch(-bend)
    shoulder = step(neck, (chest.left, sign * build.shoulder), (chest.up, lift - 0.03 * u))
    elbow = step(shoulder, (upper.up, -0.165 * build.arm))
    wrist = step(elbow, (fore.up, -0.145 * build.arm))
    tip = step(wrist, (fore.up, -0.042 * build.arm))
    thick = 0.6 * u + 0.4 * build.girth
    body.parts += [
        Capsule("upper_arm", shoulder, elbow, 0.038 * thick, 0.03 * thick, upper, shoulder),
        Capsule("forearm", elbow, wrist, 0.03 * thick, 0.021 * thick, fore, elbow),
        Capsule("hand", wrist, tip, 0.021 * thick, 0.026 * thick, fore, wrist),
    ]
    body.joints.update(
        {f"{side}_shoulder": shoulder, f"{side}_elbow": elbow, f"{side}_wrist": wrist}
    )


def _add_leg(body: Body, build: Build, side: str, pelvis: Frame, angles: dict[str, float]) -> None:
    u, sign = build.unit, 1 if side == "left" else -1
    flex, out, twist, bend, point = (
        angles[f"{side}_{name}"] for name in ("leg_flex", "leg_out", "leg_twist", "knee", "foot")
    )
    upper = pelvis.roll(-sign * out).pitch(-flex).yaw(sign * twist)
    lower = upper.pitch(bend)
    foot = lower.pitch(point)
    hip = step((0.0, 0.0, 0.0), (pelvis.left, sign * build.hip))
    knee = step(hip, (upper.up, -0.245 * build.leg))
    ankle = step(knee, (lower.up, -0.225 * build.leg))
    heel = step(ankle, (foot.up, -0.022 * u), (foot.front, -0.012 * u))
    toe = step(ankle, (foot.up, -0.03 * u), (foot.front, 0.088 * u))
    thick = 0.5 * u + 0.5 * build.girth
    body.parts += [
        Capsule("thigh", hip, knee, 0.063 * thick, 0.044 * thick, upper, hip),
        Capsule("shin", knee, ankle, 0.044 * thick, 0.027 * thick, lower, knee),
        Capsule("foot", heel, toe, 0.03 * u, 0.022 * u, foot, ankle),
    ]
    body.joints.update({f"{side}_hip": hip, f"{side}_knee": knee, f"{side}_ankle": ankle})


def _add_extras(body: Body, build: Build, rng: Rng, neck: Vector, chest: Frame) -> None:
    """Add a skirt or a bag on the back to some people."""
    u, g = build.unit, build.girth
    if rng.chance(0.14):
        share = rng.between(0.35, 0.65)
        hems = []
        for side in ("left", "right"):
            hip, knee = body.joints[f"{side}_hip"], body.joints[f"{side}_knee"]
            hems.append(between(hip, knee, share))
            body.parts.append(Capsule("skirt", hip, hems[-1], 0.068 * g, 0.085 * g))
        body.parts.append(Capsule("skirt", hems[0], hems[1], 0.085 * g, 0.085 * g))
    if rng.chance(0.12):
        top = step(neck, (chest.front, -0.085 * g), (chest.up, -0.07 * u))
        low = step(top, (chest.up, -0.11 * u))
        body.parts.append(Capsule("bag", top, low, 0.065 * g, 0.075 * g, chest, neck))


def _parse_poses(table: str) -> tuple[dict[str, float], dict[str, dict[str, Range]]]:
    weights: dict[str, float] = {}
    poses: dict[str, dict[str, Range]] = {}
    for row in table.replace("\n                 |", " |").strip().splitlines():
        head, *angles = row.split("|")
        name, weight = head.split()
        weights[name], poses[name] = float(weight), {}
        for angle, low, high in (entry.split() for entry in angles):
            poses[name][angle] = (float(low), float(high))
    return weights, poses


def draw_angles(rng: Rng) -> dict[str, float]:
    """Draw the angles of a random pose; those of limbs start with ``left_`` or ``right_``."""
    ranges = POSES[rng.pick(WEIGHTS)]
    sides = {"left": "a", "right": "b"} if rng.chance(0.5) else {"left": "b", "right": "a"}
    angles: dict[str, float] = {}
    for angle, usual in NEUTRAL.items():
        usual = ranges.get(angle, usual)
        if angle.startswith(LIMBS):
            for side, letter in sides.items():
                angles[f"{side}_{angle}"] = rng.between(*ranges.get(f"{angle}_{letter}", usual))
        else:
            angles[angle] = rng.between(*usual)
    yaw = ranges.get("yaw") or YAWS[rng.pick(VIEWS)]
    angles["yaw"] = rng.sign() * rng.between(*yaw)
    angles["tilt"] *= rng.sign()
    angles["camera"] = rng.between(-6, 18)
    return angles


WEIGHTS, POSES = _parse_poses(_TABLE)
"""How often each pose is drawn, and the ranges of its angles."""
VIEWS = {"front": 0.8, "side": 0.08, "back": 0.12}
"""How often people are seen from each side."""
YAWS = {"front": (0.0, 28.0), "side": (55.0, 125.0), "back": (125.0, 180.0)}
