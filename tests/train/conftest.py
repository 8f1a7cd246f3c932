"""Small annotated data in the public formats, and a tiny model to train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

from train_data import COLOURS, QUESTION, turns  # noqa: E402 - found by the path above


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Any:
    """Small models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture and a folder of five frames of each colour."""
    folder = tmp_path_factory.mktemp("media")
    for name, colour in COLOURS.items():
        Image.fromarray(np.full((40, 60, 3), colour, dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / name).mkdir()
        for number in range(5):
            frame = np.full((40, 60, 3), colour, dtype=np.uint8)
            frame[:, 10 * number : 10 * number + 10] //= 2
            Image.fromarray(frame).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def annotations(media: Path) -> Path:
    """Videos, images, several images and text alone, mixed."""
    records: list[dict[str, Any]] = []
    for name in COLOURS:
        answer = f"The ball is {name}."
        records.append({"id": f"v-{name}", "video": name, "conversations": turns(f"<video>\n{QUESTION}", answer)})
        image = {"id": f"i-{name}", "image": f"{name}.png"}
        records.append({**image, "conversations": turns(f"{QUESTION}\n<image>", answer)})
    several = turns("<image> <image>\nWhich is larger?", "No, the square is smaller.")
    records.append({"sample_id": 7, "image": ["red.png", "blue.png"], "conversations": several})
    records.append({"id": "t", "conversations": [*turns("Who runs?", "A dog."), *turns("Where?", "To the fence.")]})
    path = media / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def preferences(media: Path) -> Path:
    """Pairs in JSON lines: the true colour against another one."""
    names = list(COLOURS)
    lines = [
        json.dumps(
            {
                "id": name,
                "video": name,
                "prompt": QUESTION,
                "chosen": f"The ball is {name}.",
                "rejected": f"It is {names[(number + 1) % 4]}, I think.",
            }
        )
        for number, name in enumerate(names)
    ]
    path = media / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
