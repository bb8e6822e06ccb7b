"""The poses that drawn people take: ranges of joint angles, in degrees."""

from __future__ import annotations

from study.drawn_shapes import Dice

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
"""Angles of a person who stands: what a pose does not name is as here. Flex lifts a limb to the
front, out to its side; lean and bend tip the body and the spine to the front, tilt sideways."""

LIMBS = ("arm", "elbow", "leg", "knee", "foot")

# Pose, weight, then angles with their ranges. _a and _b are the two sides; which of them is the
# left one is drawn for each person.
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


def _read_table(table: str) -> tuple[dict[str, float], dict[str, dict[str, Range]]]:
    weights: dict[str, float] = {}
    poses: dict[str, dict[str, Range]] = {}
    for row in table.replace("\n                 |", " |").strip().splitlines():
        head, *angles = row.split("|")
        name, weight = head.split()
        weights[name], poses[name] = float(weight), {}
        for angle, low, high in (entry.split() for entry in angles):
            poses[name][angle] = (float(low), float(high))
    return weights, poses


WEIGHTS, POSES = _read_table(_TABLE)
"""How often each pose comes, and the angles it names."""

VIEWS = {"front": 0.8, "side": 0.08, "back": 0.12}
YAWS = {"front": (0.0, 28.0), "side": (55.0, 125.0), "back": (125.0, 180.0)}


def draw_angles(dice: Dice) -> dict[str, float]:
    """The angles of a random pose, each side's under the names ``left_...`` and ``right_...``."""
    ranges = POSES[dice.pick(WEIGHTS)]
    sides = {"left": "a", "right": "b"} if dice.chance(0.5) else {"left": "b", "right": "a"}
    angles: dict[str, float] = {}
    for angle, usual in NEUTRAL.items():
        usual = ranges.get(angle, usual)
        if angle.startswith(LIMBS):
            for side, letter in sides.items():
                angles[f"{side}_{angle}"] = dice.between(*ranges.get(f"{angle}_{letter}", usual))
        else:
            angles[angle] = dice.between(*usual)
    yaw = ranges.get("yaw") or YAWS[dice.pick(VIEWS)]
    angles["yaw"] = dice.sign() * dice.between(*yaw)
    angles["tilt"] *= dice.sign()
    angles["camera"] = dice.between(-6, 18)
    return angles
