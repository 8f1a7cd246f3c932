"""``tokensieve tune``: searches and trainings from files of samples, gone on with, and wrong files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., str]


@pytest.fixture
def samples(video: Path, tmp_path: Path) -> Path:
    """Two prompts about one video, by a path from the file's folder; the second has an answer nobody gives."""
    path = tmp_path / "samples.jsonl"
    name = os.path.relpath(video, tmp_path)
    lines = [{"video": name, "question": "What moves?"}, {"video": name, "question": "Why?", "answer": "no such words"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_search_of_vflowopt(cli: Any, model: Path, samples: Path, video: Path, tmp_path: Path) -> None:
    """A search that goes on, and an answer with what it found."""
    output = tmp_path / "strategy.json"
    words = ["tune", "vflowopt", "-s", samples, "-o", output, "-m", model, "--frames", 2, "--initial", 2]
    assert cli(*words, "--calls", 2).exit_code == 0
    first = json.loads((tmp_path / "strategy.json.search.json").read_text())["search"]["values"]
    found = json.loads(cli(*words, "--calls", 3, "--json").stdout)
    values = json.loads((tmp_path / "strategy.json.search.json").read_text())["search"]["values"]
    assert len(first) == 2 and values[:2] == first and len(values) == 3
    assert found["similarity"] == max(values) and len(found["ratios"]) == 3
    answer = cli("ask", video, "What?", "-m", model, "--frames", 2, "--method", f"vflowopt:strategy={output}", "--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["methods"][0]["options"]["strategy"] == str(output)


def test_labels_and_mapper(cli: Any, model: Path, samples: Path, video: Path, tmp_path: Path) -> None:
    """Labels of the prompt that counts, a mapper from them, and an answer with it."""
    labels, mapper = tmp_path / "labels", tmp_path / "mapper"
    words = ["tune", "labels", "-s", samples, "-o", labels, "-m", model, "--frames", 2, "--max-new-tokens", 1]
    made = json.loads(cli(*words, "--json").stdout)
    assert (made["prompts"], made["labelled"], made["new"]) == (2, 1, 1)
    assert json.loads(cli(*words, "--json").stdout)["new"] == 0
    trained = cli("tune", "mapper", "-l", labels, "-o", mapper, "--epochs", 2)
    assert trained.exit_code == 0 and "at epoch" in trained.stdout
    config = json.loads((mapper / "config.json").read_text())
    assert config["host"] == "llava_onevision" and config["decoder_layers"] == 5
    more = json.loads(cli("tune", "mapper", "-l", labels, "-o", mapper, "--epochs", 3, "--json").stdout)
    assert 1 <= more["epoch"] <= 3
    method = f"explainability-compression:weights={mapper}"
    answer = cli("ask", video, "What?", "-m", model, "--frames", 2, "--method", method, "-r", 0.5, "--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["compressed"]["share"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no samples"),
        ("{}", "line 1 of"),
        ('{"video": "a.mp4", "question": "x"}\nnonsense', "line 2 of"),
        ("[1]", "line 1 of"),
    ],
)
def test_wrong_samples(refused: Refused, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    assert message in refused("tune", "vflowopt", "-s", path, "-o", tmp_path / "out.json")


def test_missing_files(refused: Refused, tmp_path: Path, model: Path) -> None:
    assert "cannot be read" in refused("tune", "labels", "-s", tmp_path / "none.jsonl", "-o", tmp_path / "labels")
    assert "is no folder" in refused("tune", "mapper", "-l", tmp_path / "none", "-o", tmp_path / "mapper")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no labels" in refused("tune", "mapper", "-l", empty, "-o", tmp_path / "mapper")
    assert "use image, video, any" in refused(
        "tune", "mapper", "-l", empty, "-o", tmp_path / "mapper", "--modality", "sound"
    )
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"video": "gone.mp4", "question": "x"}\n')
    assert "gone.mp4" in refused("tune", "vflowopt", "-s", samples, "-o", tmp_path / "out.json", "-m", model)
