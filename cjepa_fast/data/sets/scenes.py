"""Several shapes on textured ground: how the synthetic dataset (shapes.py) is drawn.

An image has one large object, in muted colours on calm ground, and up to two small ones behind.
Its kind is told by its outline and by the relief of its surface (stripes, checks, rings ...), never
by colour, size, position, pose or light: those are drawn apart from it, every kind covers the same
area at the same size, and its surface is as bright, on average, as the ground may be. So neither
mean colour nor raw pixels give the label away, and a small encoder can learn what does.

Image i of a split is a pure function of (SEED, split, i): numpy's Philox, no other state. It is
drawn at SIDE pixels and halved, which smooths its edges.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SEED = 20271
SIDE = 96  # pixels, as drawn
SIZE = SIDE // 2  # pixels of the file
SPLITS = ("train", "val")
KINDS = ("disc", "square", "triangle", "star", "ring", "cross", "crescent", "gear")
OVERSAMPLE = 4  # of an outline's edge
EXPOSURE = 0.48  # mean brightness of every picture, as a camera would set it
MARGIN = 9  # pixels around an outline, for its shadow
TURN = np.float32(2 * np.pi)
PERIODS = 2.2  # periods of the surface's relief from the middle of a disc to its rim
MUTED = 0.5  # strength of every hue
CALM = 0.7  # contrast of the ground

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


# ----------------------------------------------------------------------------------------- kinds


def _regular(corners: int, radii=(1.0,)) -> np.ndarray:
    """(corners * len(radii), 2) points on circles of the given radii, taken in turn."""
    n = corners * len(radii)
    angle_n = 2 * np.pi * np.arange(n) / n
    radius_n = np.resize(np.asarray(radii, dtype=float), n)
    return np.stack([np.cos(angle_n), np.sin(angle_n)], axis=1) * radius_n[:, None]


def _cross() -> np.ndarray:
    quarter, turn = np.array([(1, -0.34), (1, 0.34), (0.34, 0.34)]), np.array([[0, 1], [-1, 0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])


# Polygons drawn one over the other: value 1 fills, 0 cuts away.
OUTLINES = {
    "disc": [(_regular(40), 1)],
    "square": [(_regular(4), 1)],
    "triangle": [(_regular(3), 1)],
    "star": [(_regular(5, (1.0, 0.5)), 1)],
    "ring": [(_regular(40), 1), (0.5 * _regular(40), 0)],
    "cross": [(_cross(), 1)],
    "crescent": [(_regular(40), 1), (0.8 * _regular(40) + (0.6, 0.0), 0)],
    "gear": [(_regular(10, (1.0, 1.0, 0.75, 0.75)), 1)],
}


def _relief(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The kind's surface at (u, v), in periods from its middle: values about 0, a wave of +-1."""
    a, b = TURN * u, TURN * v
    if kind == "disc":  # rings
        return np.cos(np.hypot(a, b))
    if kind == "square":  # checks
        return 2 * np.sin(a * 0.6) * np.sin(b * 0.6)
    if kind == "triangle":  # stripes
        return np.sin(a)
    if kind == "star":  # blotches
        return np.sin(0.9 * a + 0.4 * b) + np.sin(0.8 * b - 0.5 * a) + np.sin(0.7 * a - 0.8 * b)
    if kind == "ring":  # spokes
        return np.sin(10 * np.arctan2(b, a))
    if kind == "cross":  # a lattice of lines
        return 2 * np.maximum(np.cos(a), np.cos(b)) - 1.2
    if kind == "crescent":  # dots
        return np.cos(a) + np.cos(b) - 0.9
    return np.sin(a + 1.5 * np.sin(b))  # gear: waves


def _tone(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The relief as drawn, in [-1, 1]."""
    return np.clip(1.5 * _relief(kind, u, v), -1, 1)


def _mean_tone(kind: str) -> float:
    side = np.linspace(-10, 10, 401, dtype=np.float32)
    return float(_tone(kind, *np.meshgrid(side, side)).mean())


MEAN_TONE = {kind: _mean_tone(kind) for kind in KINDS}


def _cover(kind: str, centre, radius: float, turn: float, squash: float) -> tuple:
    """How much of each pixel the outline covers, in the box of rows and columns it lies in.

    Returns (cover_HW float32 in [0, 1], rows slice, columns slice); the box leaves MARGIN pixels
    around the outline for its shadow, where the picture has them.
    """
    reach = radius + MARGIN
    low_2 = np.maximum(np.floor(centre - reach), 0).astype(int)
    high_2 = np.minimum(np.ceil(centre + reach), SIDE).astype(int)
    width, height = (high_2 - low_2).tolist()
    canvas = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    pose_22 = _rotation(turn) @ np.diag([1.0, squash]) * radius
    for points_n2, value in OUTLINES[kind]:
        at_n2 = (points_n2 @ pose_22.T + centre - low_2) * OVERSAMPLE
        draw.polygon([tuple(p) for p in at_n2.tolist()], fill=255 * value)
    cover_HW = np.asarray(canvas.reduce(OVERSAMPLE), dtype=np.float32) / 255
    return cover_HW, slice(low_2[1], high_2[1]), slice(low_2[0], high_2[0])


def _rotation(turn: float) -> np.ndarray:
    c, s = math.cos(turn), math.sin(turn)
    return np.array([[c, -s], [s, c]])


def _unit_radius(kind: str) -> float:
    """The radius at which a kind covers the area of a disc of radius 1."""
    area = _cover(kind, np.full(2, SIDE / 2), SIDE / 3, 0.0, 1.0)[0].sum()
    return math.sqrt(math.pi / area) * SIDE / 3


UNIT_RADIUS = {kind: _unit_radius(kind) for kind in KINDS}


# ----------------------------------------------------------------------- colour, ground and light


def _tint(rng: np.random.Generator, strength: float) -> np.ndarray:
    """(3,) float32: a random hue that adds no brightness (it sums to zero)."""
    angle_3 = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
    return (MUTED * strength * np.cos(angle_3)).astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of about `cells` bumps a side: (SIDE, SIDE) float32 in [0, 1]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255


def _ground(rng: np.random.Generator, horizon: float) -> np.ndarray:
    """A floor of blotches or boards that runs towards the horizon: (SIDE, SIDE, 3) float32.

    horizon: its row, in pixels, above the picture (negative), so that the floor fills it.
    """
    if rng.random() < 0.5:
        pattern = _noise(rng, rng.integers(4, 9)) + 0.3 * _noise(rng, 24)
    else:
        board = (_X - SIDE / 2) / (_Y - horizon) * rng.uniform(4, 8) + rng.uniform(0, 9)
        pattern = np.sin(np.floor(board) * 12.9898) * 0.5 + 0.5 * _noise(rng, 12)
    shade = (pattern - pattern.mean()) / pattern.std() * rng.uniform(0.1, 0.18)
    hue = _noise(rng, 4)
    return 0.5 + CALM * (shade[..., None] + (hue - hue.mean())[..., None] * _tint(rng, 0.3))


def _paint(rng, picture: np.ndarray, cover_HW: np.ndarray, tone_HW: np.ndarray, light: float):
    """One object over `picture`, in place: its shadow, its surface, a rim lit from `light`."""
    dx, dy = math.cos(light), math.sin(light)
    soft = Image.fromarray((cover_HW * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.5))
    height_HW = np.asarray(soft, np.float32) / 255
    slope_y, slope_x = np.gradient(height_HW)
    y, x = 3 - round(-3 * dy), 3 - round(-3 * dx)  # the shadow falls 3 pixels away from the light
    shadow_HW = np.pad(height_HW, 3, "edge")[y:, x:][: cover_HW.shape[0], : cover_HW.shape[1]]
    picture *= 1 - 0.4 * shadow_HW[..., None]

    swing_3 = rng.uniform(0.2, 0.28) + _tint(rng, rng.uniform(0.02, 0.15))
    surface = 0.5 + tone_HW[..., None] * swing_3.astype(np.float32)
    lit = np.clip(1.0 - 2.2 * (slope_x * dx + slope_y * dy), 0.4, 1.6)[..., None]
    picture += cover_HW[..., None] * (surface * lit - picture)


# ----------------------------------------------------------------------------------- one picture


def _scene(rng: np.random.Generator, horizon: float) -> list[dict]:
    """The objects, the largest first: kind, distance, apparent radius and centre in pixels."""
    main = {"kind": KINDS[rng.integers(len(KINDS))], "radius": rng.uniform(0.30, 0.44) * SIDE}
    main["centre"] = rng.uniform(0.25, 0.75, 2) * SIDE
    main["distance"] = SIDE / (main["centre"][1] - horizon)
    objects = [main]
    for behind in range(1, rng.integers(1, 4)):
        radius = rng.uniform(0.06, 0.09) * SIDE
        for _ in range(20):
            centre = rng.uniform(0.08, 0.92, 2) * SIDE
            gaps = [math.dist(centre, o["centre"]) - o["radius"] for o in objects]
            if min(gaps) > 0.5 * radius:
                break
        kind = KINDS[rng.integers(len(KINDS))]
        distance = main["distance"] + behind
        objects.append({"kind": kind, "radius": radius, "centre": centre, "distance": distance})
    return objects


def _draw(rng: np.random.Generator, picture: np.ndarray, thing: dict, light: float) -> None:
    """Draw one object of a scene into `picture`, at a random pose."""
    turn, squash = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.0)
    kind, centre = thing["kind"], thing["centre"]
    radius = thing["radius"] * UNIT_RADIUS[kind] / math.sqrt(squash)
    cover_HW, rows, columns = _cover(kind, centre, radius, turn, squash)
    x, y = centre.astype(np.float32)
    away_2HW = np.stack([_X[rows, columns] - x, _Y[rows, columns] - y])
    periods = PERIODS * math.exp(rng.uniform(-0.4, 0.4)) / thing["radius"]
    u, v = np.tensordot((_rotation(-turn) * periods).astype(np.float32), away_2HW, 1)
    if kind not in ("disc", "ring"):  # theirs are about the middle
        u, v = u + rng.random(dtype=np.float32), v + rng.random(dtype=np.float32)
    tone_HW = rng.choice((-1, 1)) * (_tone(kind, u, v) - MEAN_TONE[kind])
    _paint(rng, picture[rows, columns], cover_HW, tone_HW, light)


def render(split: str, index: int) -> tuple[bytes, int, dict]:
    """Image `index` of a split: (JPEG bytes, class, {"kind", "objects", "distance"})."""
    seed = np.random.SeedSequence([SEED, SPLITS.index(split), index])
    rng = np.random.Generator(np.random.Philox(seed))
    horizon, light = rng.uniform(-1.2, -0.3) * SIDE, rng.uniform(0, 2 * np.pi)
    picture = _ground(rng, horizon)
    objects = _scene(rng, horizon)
    for thing in sorted(objects, key=lambda o: -o["distance"]):
        _draw(rng, picture, thing, light)
    slope = (_X - SIDE / 2) * math.cos(light) + (_Y - SIDE / 2) * math.sin(light)
    picture *= (1 - rng.uniform(0, 0.5) / SIDE * slope)[..., None]
    picture *= EXPOSURE / picture.mean()
    picture += 0.015 * rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32)
    file = io.BytesIO()
    pixels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).reduce(SIDE // SIZE).save(file, "JPEG", quality=95)
    nearest = min(thing["distance"] for thing in objects)
    kind = objects[0]["kind"]
    facts = {"kind": kind, "objects": len(objects), "distance": round(nearest, 4)}
    return file.getvalue(), KINDS.index(kind), facts
