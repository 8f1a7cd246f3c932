"""Draws ``docs/img/world.jpg``: every second frame of four test clips, twice their size.

python docs/world_picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tokensieve.world import scene_of
from tokensieve.world.draw import draw

GAP = 4


def main() -> None:
    """Write the picture."""
    rows = [list(draw(scene_of("test", index))[::2]) for index in range(4)]
    edge = rows[0][0].shape[0]
    canvas = np.full((4 * (edge + GAP) - GAP, 8 * (edge + GAP) - GAP, 3), 255, np.uint8)
    for i, frames in enumerate(rows):
        for j, frame in enumerate(frames):
            top, left = i * (edge + GAP), j * (edge + GAP)
            canvas[top : top + edge, left : left + edge] = frame
    picture = Image.fromarray(canvas)
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    picture.save(Path(__file__).parent / "img" / "world.jpg", quality=88)


if __name__ == "__main__":
    main()
