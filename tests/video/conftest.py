"""Shared fixtures: the real clips and what a plain PyAV loop makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from video_media import CLIPS, DATA, MANIFEST, Reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``clip_name`` once per real clip."""
    if "clip_name" in metafunc.fixturenames:
        reason = f"the real clips are not at {DATA}; set TOKENSIEVE_DATA_DIR"
        names = list(CLIPS) or [pytest.param("none", marks=pytest.mark.skip(reason=reason))]
        metafunc.parametrize("clip_name", names)


@pytest.fixture(scope="session")
def videos() -> Path:
    """Folder of the real clips."""
    if not CLIPS:
        pytest.skip(f"the real clips are not at {DATA}; set TOKENSIEVE_DATA_DIR")
    return MANIFEST.parent


@pytest.fixture(scope="session")
def images() -> Path:
    """Folder of the real photographs."""
    folder = DATA / "images"
    if not folder.is_dir():
        pytest.skip(f"the real images are not at {DATA}; set TOKENSIEVE_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def reference(videos: Path) -> Callable[[str], Reference]:
    """Decode a clip from front to back with nothing but PyAV, once."""
    known: dict[str, Reference] = {}

    def decode(name: str) -> Reference:
        if name not in known:
            entry = CLIPS[name]
            places = np.linspace(0, entry["frames"] - 1, min(7, entry["frames"]), dtype=int)
            wanted, stamps, pictures = set(places.tolist()), [], []
            with av.open(str(videos / name)) as container:
                stream = container.streams.video[0]
                for place, frame in enumerate(container.decode(stream)):
                    stamps.append(frame.pts)
                    if place in wanted:
                        pixels = frame.to_ndarray(format="rgb24")
                        pictures.append(np.rot90(pixels, entry["rotation"] // 90))
                times = np.sort(np.array(stamps)) * float(stream.time_base)
            known[name] = Reference(times, places, pictures)
        return known[name]

    return decode
