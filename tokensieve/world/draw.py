"""Draws scenes: textured panning backgrounds, objects, signs, sensor noise.

Objects are pasted from masks that are computed once per shape, size and quarter-pixel offset, so a clip of 16 frames
takes a few milliseconds.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from tokensieve.world.scene import SIZE, Scene, Sign, Thing
from tokensieve.world.words import COLOUR_NAMES, COLOURS, SHAPES

_HALF = 10
_OVERSAMPLING = 8
_MARGIN = 24
_NOISE_PERIOD = 1 << 20

_GLYPHS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001010010010",
    "111101111101111",
    "111101111001111",
)


def draw(scene: Scene) -> np.ndarray:
    """The frames of a scene.

    Returns
    -------
    numpy.ndarray
        ``uint8 [F, 96, 96, 3]``.
    """
    rng = np.random.default_rng((*scene.seed, 1))
    canvas = _backgrounds(rng, scene)
    palette = _palette(rng)
    for thing in scene.things:
        for frame in range(thing.first, thing.stop):
            _paste_thing(canvas[frame], thing, frame, palette)
    for sign in scene.signs:
        patch = _sign_patch(sign.panel, sign.digit)
        for frame in range(sign.first, sign.stop):
            _paste_sign(canvas[frame], sign, patch)
    _add_noise(rng, canvas, scene.noise)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _backgrounds(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    frames = np.empty((scene.frames, SIZE, SIZE, 3), np.float32)
    texture = _texture(rng)
    for t in range(scene.frames):
        if scene.cut and t == scene.cut:
            texture = _texture(rng)
        x = int(_MARGIN / 2 * (1 + np.clip(scene.pan[0] * t / 16, -1, 1)))
        y = int(_MARGIN / 2 * (1 + np.clip(scene.pan[1] * t / 16, -1, 1)))
        frames[t] = texture[y : y + SIZE, x : x + SIZE]
    return frames


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A smooth coloured field with finer grain, ``[120, 120, 3]``, dim enough for every object to stand out."""
    edge = SIZE + _MARGIN
    base = rng.uniform(30, 120, 3).astype(np.float32)
    coarse = _upsample(rng.normal(0, 16, (5, 5, 3)), edge)
    fine = _upsample(rng.normal(0, 9, (20, 20, 1)), edge)
    return np.clip(base + coarse + fine, 10, 165)


def _upsample(field: np.ndarray, edge: int) -> np.ndarray:
    channels = [
        np.asarray(Image.fromarray(field[..., c].astype(np.float32)).resize((edge, edge), Image.Resampling.BICUBIC))
        for c in range(field.shape[-1])
    ]
    return np.stack(channels, -1)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """The eight colours with a cast of this clip, ``[8, 3]``."""
    colours = np.array([COLOURS[name] for name in COLOUR_NAMES], np.float32)
    return colours * rng.uniform(0.88, 1.0) + rng.normal(0, 5, colours.shape).astype(np.float32)


def _paste_thing(frame: np.ndarray, thing: Thing, t: int, palette: np.ndarray) -> None:
    x, y = thing.centre(t)
    left, top = int(np.floor(x)), int(np.floor(y))
    mask = _mask(thing.shape, round(thing.radius * 2), int((x - left) * 4), int((y - top) * 4))
    _blend(frame, palette[thing.colour_at(t)], mask, left - _HALF, top - _HALF)


def _paste_sign(frame: np.ndarray, sign: Sign, patch: np.ndarray) -> None:
    height, width = patch.shape[:2]
    left, top = round(sign.centre[0] - width / 2), round(sign.centre[1] - height / 2)
    _blend(frame, patch, np.ones((height, width), np.float32), left, top)


def _blend(frame: np.ndarray, colour: np.ndarray, mask: np.ndarray, left: int, top: int) -> None:
    """Lay ``colour`` over the frame through ``mask``, cut off at the edges of the frame."""
    height, width = mask.shape
    y0, y1, x0, x1 = max(top, 0), min(top + height, SIZE), max(left, 0), min(left + width, SIZE)
    if y0 >= y1 or x0 >= x1:
        return
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    alpha = mask[inside][..., None]
    over = colour[inside] if colour.ndim == 3 else colour
    frame[y0:y1, x0:x1] += alpha * (over - frame[y0:y1, x0:x1])


@cache
def _mask(shape: int, diameter: int, shift_x: int, shift_y: int) -> np.ndarray:
    """Coverage ``[20, 20]`` of a shape around the middle, shifted by quarter pixels."""
    edge = 2 * _HALF * _OVERSAMPLING
    image = Image.new("L", (edge, edge))
    scale = diameter / 2 * _OVERSAMPLING
    centre = ((_HALF + shift_x / 4) * _OVERSAMPLING, (_HALF + shift_y / 4) * _OVERSAMPLING)
    pen = ImageDraw.Draw(image)
    _outline(pen, SHAPES[shape], centre, scale)
    small = image.resize((2 * _HALF, 2 * _HALF), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _outline(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], r: float) -> None:
    x, y = centre

    def points(*unit: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + r * a, y + r * b) for a, b in unit]

    def disc(cx: float, cy: float, radius: float, fill: int) -> None:
        pen.ellipse([x + r * (cx - radius), y + r * (cy - radius), x + r * (cx + radius), y + r * (cy + radius)], fill)

    if shape == "circle":
        disc(0, 0, 0.95, 255)
    elif shape == "square":
        pen.rectangle([x - 0.82 * r, y - 0.82 * r, x + 0.82 * r, y + 0.82 * r], 255)
    elif shape == "triangle":
        pen.polygon(points((0, -1), (1, 0.85), (-1, 0.85)), 255)
    elif shape == "star":
        spokes = [(1.1 if i % 2 == 0 else 0.42, np.pi * (i / 5 - 0.5)) for i in range(10)]
        pen.polygon(points(*((float(m * np.cos(a)), float(m * np.sin(a))) for m, a in spokes)), 255)
    elif shape == "cross":
        pen.rectangle([x - 0.3 * r, y - r, x + 0.3 * r, y + r], 255)
        pen.rectangle([x - r, y - 0.3 * r, x + r, y + 0.3 * r], 255)
    elif shape == "ring":
        disc(0, 0, 1.0, 255)
        disc(0, 0, 0.55, 0)
    elif shape == "diamond":
        pen.polygon(points((0, -1.1), (0.7, 0), (0, 1.1), (-0.7, 0)), 255)
    else:
        disc(-0.47, -0.35, 0.52, 255)
        disc(0.47, -0.35, 0.52, 255)
        pen.polygon(points((-0.93, -0.1), (0.93, -0.1), (0, 1.0)), 255)


@cache
def _sign_patch(panel: int, digit: int) -> np.ndarray:
    """A panel of 13 x 10 pixels with a digit of 9 x 6 pixels, ``float32 [13, 10, 3]``."""
    bits = np.array([float(bit) for bit in _GLYPHS[digit]], np.float32).reshape(5, 3)
    ink = np.zeros((13, 10), np.float32)
    ink[2:12, 2:8] = bits.repeat(2, 0).repeat(2, 1)
    paper, pen = (235.0, 20.0) if panel == 0 else (12.0, 235.0)
    return np.repeat((paper + (pen - paper) * ink)[..., None], 3, -1)


@cache
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(20_241).standard_normal(_NOISE_PERIOD).astype(np.float32)


def _add_noise(rng: np.random.Generator, canvas: np.ndarray, sigma: float) -> None:
    """Add grain to every frame, taken from a fixed long table at a random place: drawing fresh numbers costs more."""
    bank = _noise_bank()
    each = canvas[0].size
    for frame in canvas:
        begin = int(rng.integers(_NOISE_PERIOD - each))
        frame += sigma * bank[begin : begin + each].reshape(frame.shape)
