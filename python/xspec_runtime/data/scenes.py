"""Procedural driving scenes: the same scene as 8 video frames, as an event image, and as two
captions.

A scene is a set of facts (`Scene`). The renderer draws 16 sub-frames of 64x64; every two are
averaged to a video frame, and the log-intensity changes between all of them are the events
(threshold 0.18 with a reference per pixel, as an event camera does it). Colors, light color and
time of day never show in the events; with the camera car standing, nothing static does. Both
captions are functions of the facts: the target's speaks of everything, the draft's only of what
moves.

Synthetic by construction: good for exercising the machinery, no evidence about recorded driving
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .captions import BACKGROUNDS, COLORS, KINDS, LIGHTS, MOTIONS, PEDESTRIANS, SLOTS, TIMES, Scene
from .captions import draft_caption as draft_caption
from .captions import target_caption as target_caption

SIZE = 64
FRAMES = 8
SUBFRAMES = 2 * FRAMES
HORIZON = 26
EVENT_THRESHOLD = 0.18
EVENT_NOISE = 0.002

RGB = {
    "red": (200, 30, 30),
    "blue": (30, 60, 210),
    "white": (235, 235, 235),
    "black": (22, 22, 26),
    "yellow": (235, 205, 40),
    "green": (30, 150, 60),
}
SKY = {"day": (150, 195, 235), "night": (14, 16, 34), "sunset": (240, 140, 70)}
LUMINANCE = {"day": 1.0, "night": 0.42, "sunset": 0.8}
LANE_X = {"left": -1.0, "middle": 0.0, "right": 1.0}
CURB_X = {"left": -1.3, "right": 1.3}
VEHICLE_SIZE = {"car": (0.34, 0.42), "truck": (0.40, 0.78), "bus": (0.42, 1.05)}

# Sizes of the fact vector's entries, in the order of `facts`.
FACT_SIZES = (
    *(n for _ in SLOTS for n in (len(KINDS) + 1, len(COLORS) + 1, len(MOTIONS) + 1)),
    len(PEDESTRIANS),
    len(LIGHTS),
    len(BACKGROUNDS),
    len(TIMES),
    2,
)


@dataclass(frozen=True)
class Sample:
    """One rendered scene.

    Attributes:
        scene: its facts.
        video: uint8 ``[8, 64, 64, 3]``.
        event_image: uint8 ``[64, 64, 3]``, white canvas, blue then red over it.
    """

    scene: Scene
    video: np.ndarray
    event_image: np.ndarray


def facts(scene: Scene) -> list[int]:
    """The scene as class indices (sizes `FACT_SIZES`); 0 means absent for the vehicle entries."""
    out: list[int] = []
    by_slot = {v.slot: v for v in scene.vehicles}
    for slot in SLOTS:
        v = by_slot.get(slot)
        out += (
            [0, 0, 0]
            if v is None
            else [1 + KINDS.index(v.kind), 1 + COLORS.index(v.color), 1 + MOTIONS.index(v.motion)]
        )
    return [
        *out,
        PEDESTRIANS.index(scene.pedestrian),
        LIGHTS.index(scene.light),
        BACKGROUNDS.index(scene.background),
        TIMES.index(scene.time),
        int(scene.driving),
    ]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw all sub-frames: float32 ``[16, 64, 64, 3]`` in 0..255; `rng` varies what captions
    ignore.
    """
    jitter = rng.random(32)
    heights = 5 + 4 * rng.random(4)
    lum = LUMINANCE[scene.time]
    base = _backdrop(scene, lum, jitter, rng.integers(0, 7, 16))
    speed = 0.16 + 0.06 * jitter[3] if scene.driving else 0.0
    frames = np.empty((SUBFRAMES, SIZE, SIZE, 3), np.float32)
    still = None
    for t in range(SUBFRAMES):
        travelled = speed * t
        if still is None or scene.driving:
            still = base.copy()
            _roadside(still, scene, travelled, jitter, heights, lum)
        frames[t] = still
        _movers(frames[t], scene, t, travelled, jitter, lum)
    return frames


def event_image(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Events of the sub-frames as one picture: white canvas, p=0 blue, p=1 red over blue."""
    positive = np.zeros(frames.shape[1:3], bool)
    negative = np.zeros_like(positive)
    for _, pos, neg in _polarity(frames, rng):
        positive |= pos
        negative |= neg
    image = np.full((*positive.shape, 3), 255, np.uint8)
    image[negative] = (0, 0, 255)
    image[positive] = (255, 0, 0)
    return image


def event_stream(
    frames: np.ndarray, rng: np.random.Generator, duration_us: int = 50_000
) -> dict[str, np.ndarray]:
    """The same events as a stream {x, y, t, p} sorted by time, `duration_us` microseconds long."""
    x, y, t, p = [], [], [], []
    for step, pos, neg in _polarity(frames, rng):
        for polarity, mask in ((0, neg), (1, pos)):
            rows, columns = np.nonzero(mask)
            x.append(columns)
            y.append(rows)
            t.append(np.full(rows.size, step * duration_us // len(frames)))
            p.append(np.full(rows.size, polarity))
    return {
        "x": np.concatenate(x).astype(np.uint16),
        "y": np.concatenate(y).astype(np.uint16),
        "t": np.concatenate(t).astype(np.int64),
        "p": np.concatenate(p).astype(np.uint8),
    }


def make_sample(seed: int) -> Sample:
    """The scene of one seed; the same seed gives the same bytes on every machine of one numpy."""
    rng = np.random.default_rng(seed)
    scene = Scene.draw(rng)
    frames = render(scene, rng)
    events = event_image(frames, rng)
    # Two sub-frames of exposure: what moves is blurred, as in a real camera.
    exposed = (frames[0::2] + frames[1::2]) / 2
    noise = rng.normal(0, 3, (FRAMES, SIZE, SIZE, 1))
    video = np.clip(exposed + noise, 0, 255).astype(np.uint8)
    return Sample(scene, video, events)


def _polarity(frames: np.ndarray, rng: np.random.Generator):
    log = np.log(frames.mean(-1) + 12.0)
    reference = log[0].copy()
    for t in range(1, len(log)):
        change = log[t] - reference
        noise = rng.random(change.shape)
        positive = (change > EVENT_THRESHOLD) | (noise < EVENT_NOISE / 2)
        negative = (change < -EVENT_THRESHOLD) | (noise > 1 - EVENT_NOISE / 2)
        fired = positive | negative
        reference[fired] = log[t][fired]
        yield t, positive, negative


def _box(
    im: np.ndarray, x0: float, y0: float, x1: float, y1: float, color: Sequence[float]
) -> None:
    """Blend an axis-aligned box, edges weighted by the part of the pixel they cover."""
    x0, x1, y0, y1 = max(x0, 0.0), min(x1, float(SIZE)), max(y0, 0.0), min(y1, float(SIZE))
    if x1 - x0 < 0.05 or y1 - y0 < 0.05:
        return
    left, right = int(x0), min(int(np.ceil(x1)), SIZE)
    top, bottom = int(y0), min(int(np.ceil(y1)), SIZE)
    cover_x = np.ones(right - left, np.float32)
    cover_x[0] -= x0 - left
    cover_x[-1] -= right - x1
    cover_y = np.ones(bottom - top, np.float32)
    cover_y[0] -= y0 - top
    cover_y[-1] -= bottom - y1
    cover = (cover_y[:, None] * cover_x)[..., None]
    area = im[top:bottom, left:right]
    area += cover * (np.asarray(color, np.float32) - area)


def _project(x: float, z: float) -> tuple[float, float]:
    """Lateral meters and depth to (column, ground row)."""
    return 32 + x * 26 / z, HORIZON + 34 / z


def _backdrop(scene: Scene, lum: float, jitter: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    im = np.empty((SIZE, SIZE, 3), np.float32)
    im[:HORIZON] = np.array(SKY[scene.time]) * (0.93 + 0.14 * jitter[0])
    ground = (140, 134, 126) if scene.background == "buildings" else (92, 120, 60)
    im[HORIZON:] = np.array(ground) * lum * (0.9 + 0.2 * jitter[2])
    road = np.array((96, 96, 100)) * lum * (0.9 + 0.2 * jitter[1])
    for y in range(HORIZON, SIZE):
        half = (y + 0.5 - HORIZON) / 34 * 26 * 1.5
        _box(im, 32 - half, y, 32 + half, y + 1, road)
    if scene.background == "mountains":
        for i, peak in enumerate(peaks):
            height = 5 + peak + 3 * np.sin(i * 0.9 + 6 * jitter[5])
            _box(im, 4 * i, HORIZON - height, 4 * i + 4, HORIZON, np.array((105, 112, 135)) * lum)
    return im


def _roadside(im, scene: Scene, travelled: float, jitter, heights, lum: float) -> None:
    for k in range(7):
        z = ((k * 0.8 + jitter[6] * 0.8 - travelled) % 5.6) + 0.45
        _, far = _project(0, z + 0.22)
        _, near = _project(0, z)
        half = 0.07 * 26 / z
        _box(im, 32 - half, far, 32 + half, min(near, SIZE), np.array((235, 235, 225)) * lum)
    for i in range(4):
        z = ((i * 1.1 + jitter[7] - travelled) % 4.4) + 0.8
        for side in (-1, 1):
            _roadside_object(im, scene, side, z, i, heights[i], lum)
    if scene.light != "none":
        _traffic_light(im, scene.light, max(2.1 + 0.5 * jitter[8] - 0.25 * travelled, 0.9))


def _roadside_object(im, scene: Scene, side: int, z: float, i: int, height: float, lum: float):
    q = 26 / z
    if scene.background == "trees":
        x, y = _project(side * (1.95 + 0.2 * height / 9), z)
        _box(im, x - 0.06 * q, y - 0.5 * q, x + 0.06 * q, y, np.array((84, 58, 36)) * lum)
        leaves = np.array((34, 104, 40)) * lum * (1 - 0.1 * (i % 2))
        _box(im, x - 0.3 * q, y - 1.2 * q, x + 0.3 * q, y - 0.45 * q, leaves)
    elif scene.background == "buildings":
        x, y = _project(side * 2.3, z)
        h = 0.2 * height * q
        wall = np.array((168, 148, 126)) * lum * (1 - 0.12 * (i % 3))
        _box(im, x - 0.55 * q, y - h, x + 0.55 * q, y, wall)
        lit = scene.time == "night"
        window = np.array((250, 235, 150)) if lit else np.array((70, 84, 104)) * lum
        for a in (-0.3, 0.15):
            for b in (0.25, 0.6):
                _box(im, x + a * q, y - h * (b + 0.2), x + (a + 0.17) * q, y - h * b, window)
    else:
        x, y = _project(side * 1.7, z)
        _box(im, x - 0.05 * q, y - 0.35 * q, x + 0.05 * q, y, np.array((150, 150, 150)) * lum)


def _traffic_light(im, light: str, z: float) -> None:
    x, y = _project(1.75, z)
    q = 26 / z
    _box(im, x - 0.04 * q, y - 1.15 * q, x + 0.04 * q, y, (50, 50, 50))
    _box(im, x - 0.17 * q, y - 1.65 * q, x + 0.17 * q, y - 1.0 * q, (18, 18, 18))
    lamp, offset = ((255, 40, 30), 1.6) if light == "red" else ((40, 255, 90), 1.25)
    _box(im, x - 0.13 * q, y - offset * q, x + 0.13 * q, y - (offset - 0.24) * q, lamp)


def _movers(im, scene: Scene, t: int, travelled: float, jitter, lum: float) -> None:
    placed = [_place(v, t, travelled, jitter[10 + 3 * i :]) for i, v in enumerate(scene.vehicles)]
    for x, z, vehicle, shade in sorted(placed, key=lambda item: -item[1]):
        _vehicle(im, vehicle, x, z, shade, lum)
    if scene.pedestrian != "none":
        _pedestrian(im, scene, t, travelled, jitter, lum)


def _place(vehicle, t: int, travelled: float, jitter):
    """Where the vehicle is at sub-frame t: (lateral meters, depth, vehicle, shade)."""
    shade = 0.9 + 0.15 * jitter[2]
    if vehicle.motion == "parked":
        z = max(2.0 + 0.4 * jitter[0] - 0.2 * travelled, 1.1)
        return CURB_X[vehicle.slot], z, vehicle, shade
    x = LANE_X[vehicle.slot]
    if vehicle.motion == "away":
        z = 1.15 + 0.2 * jitter[0] + (0.045 + 0.02 * jitter[1]) * t
    elif vehicle.motion == "toward":
        z = 2.2 + 0.3 * jitter[0] - (0.065 + 0.02 * jitter[1]) * t
    else:
        z = 1.9 + 0.4 * jitter[0]
        x = (-0.5 + 0.067 * t) * (1 if jitter[1] < 0.5 else -1)
    return x, z, vehicle, shade


def _vehicle(im, vehicle, x_meters: float, z: float, shade: float, lum: float) -> None:
    x, y = _project(x_meters, z)
    q = 26 / z
    body = np.array(RGB[vehicle.color]) * (lum**0.7) * shade
    glass = np.array((60, 75, 95)) * max(lum, 0.6)
    w, h = VEHICLE_SIZE[vehicle.kind]
    w *= 1.4 if vehicle.motion == "cross" else 1.0
    _box(im, x - w * q, y - h * q, x + w * q, y - 0.08 * q, body)
    if vehicle.kind == "car":
        _box(im, x - 0.62 * w * q, y - (h + 0.2) * q, x + 0.62 * w * q, y - h * q, body)
        _box(im, x - 0.5 * w * q, y - (h + 0.15) * q, x + 0.5 * w * q, y - (h + 0.01) * q, glass)
    elif vehicle.kind == "truck":
        load = np.array((190, 190, 186)) * lum
        _box(im, x - w * q, y - h * q, x + w * q, y - (h - 0.3) * q, load)
    else:
        for a in (-0.8, -0.25, 0.3):
            _box(im, x + a * w * q, y - 0.9 * h * q, x + (a + 0.45) * w * q, y - 0.6 * h * q, glass)
    for a in (-0.85, 0.45):
        _box(im, x + a * w * q, y - 0.1 * q, x + (a + 0.4) * w * q, y, (12, 12, 12))
    if vehicle.motion in ("away", "toward"):
        lamp = (255, 60, 50) if vehicle.motion == "away" else (255, 250, 215)
        for a in (-0.95, 0.7):
            _box(im, x + a * w * q, y - 0.28 * q, x + (a + 0.25) * w * q, y - 0.16 * q, lamp)


def _pedestrian(im, scene: Scene, t: int, travelled: float, jitter, lum: float) -> None:
    z = max(1.9 + 0.2 * jitter[22] - 0.1 * travelled, 1.5)
    side = -1 if jitter[23] < 0.5 else 1
    walking = scene.pedestrian == "walking"
    x, y = _project(side * (2.1 - 0.04 * t if walking else 1.8), z)
    q = 32 / z
    swing = 0.05 * np.sin(t * 1.3) if walking else 0.0
    coat = np.array((190, 80, 150)) * max(lum, 0.6)
    _box(im, x - 0.1 * q, y - 0.62 * q, x + 0.1 * q, y - 0.28 * q, coat)
    _box(im, x - 0.07 * q, y - 0.8 * q, x + 0.07 * q, y - 0.63 * q, (225, 180, 150))
    for a, s in ((-0.09, -swing), (0.02, swing)):
        _box(im, x + (a + s) * q, y - 0.28 * q, x + (a + 0.07 + s) * q, y, (40, 40, 70))
