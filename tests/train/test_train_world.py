"""The procedural world as training data, and the benchmark that trains on it, in miniature."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokensieve.train.world import WorldSamples
from tokensieve.world import models as world


def test_samples_depend_on_the_epoch_alone() -> None:
    data = WorldSamples(3, frames=8)
    length, first = len(data), data[0]
    assert first.videos[0].shape == (8, 96, 96, 3) and [turn.role for turn in first.turns] == ["user", "assistant"]
    data.set_epoch(1)
    assert len(data) == length and data[0].name == "train-000003/0"
    data.set_epoch(0)
    assert np.array_equal(data[0].videos[0], first.videos[0]) and data[0].turns == first.turns
    again = WorldSamples(3, frames=8, first=3)
    data.set_epoch(1)
    assert [again[number].name for number in range(2)] == [data[number].name for number in range(2)]


def test_benchmark_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    world.clip_pair().save_pretrained(tmp_path / "pair")
    world.clip_processor().save_pretrained(tmp_path / "pair")
    world.video_llm().save_pretrained(tmp_path / "base")
    world.video_processor().save_pretrained(tmp_path / "base")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    threads = torch.get_num_threads()
    benchmark = importlib.import_module("benchmarks.ppllava_world")
    words = ["--pair", tmp_path / "pair", "--base", tmp_path / "base", "--work", tmp_path / "work"]
    words += ["--clips", 2, "--epochs", 1, "--frames", 8, "--test-clips", 2, "--batch", 2, "--output", tmp_path]
    words += ["--variants", "average 18x", "guided 18x, ren"]
    try:
        assert benchmark.main([str(word) for word in words]) == 0
        stamp = (tmp_path / "work" / "average-18x" / "answers.json").stat().st_mtime_ns
        # A second run trains nothing again.
        assert benchmark.main([str(word) for word in words]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "work" / "average-18x" / "answers.json").stat().st_mtime_ns == stamp
    found = json.loads((tmp_path / "ppllava_world.json").read_text())
    # Eight frames of 12 x 12 patches: 4 x 4 x 4 tokens.
    assert found["tokens"]["average 18x"] == found["tokens"]["guided 18x, renormalised"] == 64
    assert {len(right) for right in found["right"].values()} == {4}
    clip = np.arange(16)
    assert benchmark.thinned(clip, 16).tolist() == [8] and benchmark.thinned(clip, 8).tolist() == [4, 12]
    assert benchmark.thinned(clip[:8], 16).tolist() == [7] and benchmark.thinned(clip, 1).tolist() == clip.tolist()
    table = (tmp_path / "ppllava_world.md").read_text()
    assert "questions about a place or a moment" in table
