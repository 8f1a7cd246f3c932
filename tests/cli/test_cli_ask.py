"""``tokensieve ask`` on good input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_media import REAL_CLIPS
from PIL import Image

SHORT = ("--frames", 4, "--max-new-tokens", 2)


def ask_json(cli: Any, *words: Any) -> dict[str, Any]:
    result = cli("ask", *words, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_answer_is_all_that_goes_to_standard_output(cli: Any, video: Path, model: Path) -> None:
    result = cli("ask", video, "What moves?", "--model", model, *SHORT)
    assert result.exit_code == 0, result.output
    answer = ask_json(cli, video, "What moves?", "--model", model)["compressed"]["answer"]
    assert result.stdout == f"{answer}\n"
    assert "100 visual tokens -> " in result.stderr and "first token after" in result.stderr


def test_without_a_model_the_bundled_one_answers_and_says_what_it_knows(cli: Any, video: Path) -> None:
    result = cli("ask", video, "What moves?", *SHORT)
    assert result.exit_code == 0, result.output
    assert "note: no --model was given, so the bundled model answers" in result.stderr
    assert "knows only the clips of 'tokensieve world'" in result.stderr


def test_random_weights_are_named(cli: Any, video: Path, model: Path) -> None:
    result = cli("ask", video, "What moves?", "--model", model, *SHORT)
    assert "this model has random weights: its answer means nothing" in result.stderr


def test_json_holds_counts_and_measurements(cli: Any, video: Path, model: Path) -> None:
    found = ask_json(cli, video, "What moves?", "--model", model, "--method", "uniform", "--retention", 0.5)
    column = found["compressed"]
    assert (column["visual_tokens"], column["share"], column["new_tokens"]) == (50, 0.5, 2)
    assert found["report"]["patches"]["uncompressed"] == 100
    assert column["seconds_to_first_token"] > 0 and column["tokens_per_second"] > 0
    assert column["peak_memory"] > 1_000_000
    assert found["frames"] == 4 and found["timestamps"][0] == 0
    assert found["methods"][0]["name"] == "uniform" and found["full"] is None
    assert found["random_weights"] is True


def test_compare_runs_the_full_model_too(cli: Any, video: Path, model: Path) -> None:
    words = (video, "What moves?", "--model", model, "--method", "none", "--compare")
    found = ask_json(cli, *words)
    # Without compression both columns are the same computation.
    assert found["full"]["answer"] == found["compressed"]["answer"]
    assert found["full"]["visual_tokens"] == found["compressed"]["visual_tokens"] == 100
    table = cli("ask", *words, *SHORT)
    assert table.exit_code == 0, table.output
    rows = ("answer", "visual tokens", "time to first token", "tokens per second", "peak memory")
    assert all(row in table.stdout for row in rows)


def test_compare_leaves_the_full_model_uncompressed(cli: Any, video: Path, model: Path) -> None:
    found = ask_json(cli, video, "What moves?", "--model", model, "--method", "random:retention=0.1", "--compare")
    full = ask_json(cli, video, "What moves?", "--model", model, "--method", "none")
    assert found["full"]["answer"] == full["compressed"]["answer"]
    assert found["full"]["prompt_tokens"] == found["compressed"]["prompt_tokens"] + 90


def test_options_of_methods(cli: Any, video: Path, model: Path) -> None:
    words = (video, "What moves?", "--model", model)
    found = ask_json(cli, *words, "--method", "vidcom2", "--set", "similarity=cosine", "--set", "temperature=0.5")
    assert found["methods"][0]["options"]["similarity"] == "cosine"
    assert found["methods"][0]["options"]["temperature"] == 0.5
    both = ask_json(cli, *words, "--method", "uniform+fastv", "--set", "layer=3", "-r", 0.5)
    assert [method["name"] for method in both["methods"]] == ["uniform", "fastv"]
    assert both["methods"][1]["options"]["layer"] == 3
    assert both["compressed"]["visual_tokens"] == 50


def test_the_seed_decides_what_is_drawn(cli: Any, video: Path, model: Path) -> None:
    words = (video, "What moves?", "--model", model, "--method", "random")
    options = [ask_json(cli, *words, "--seed", seed)["methods"][0]["options"]["seed"] for seed in (3, 4)]
    assert options == [3, 4]


def test_range_and_frame_rate(cli: Any, video: Path, model: Path) -> None:
    words = (video, "What moves?", "--model", model)
    part = ask_json(cli, *words, "--start", 1, "--end", 3)
    assert part["timestamps"] == [1.0, 1.5, 2.0, 2.5]
    slow = ask_json(cli, *words, "--fps", 1)
    assert slow["timestamps"] == [0.0, 1.0, 2.0, 3.0]


def test_a_still_image_is_a_clip_of_one_frame(cli: Any, model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(picture)
    found = ask_json(cli, picture, "Which colour?", "--model", model)
    assert found["frames"] == 1
    assert found["report"]["items"][0]["kind"] == "image"


@pytest.mark.parametrize("retention", [0.001, 1e-9])
def test_a_tiny_retention_keeps_at_least_one_token_and_says_so(
    cli: Any, video: Path, model: Path, retention: float
) -> None:
    words = ("ask", video, "What moves?", "--model", model, *SHORT, "--method", "uniform", "-r", retention)
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert "fewer than one for each of 4 frames; 1 (1.0 %) were kept" in result.stderr
    frames = cli(*words[:-4], "--method", "vidcom2", "-r", retention)
    assert "fewer than one for each of 4 frames; 4 (4.0 %) were kept" in frames.stderr


def test_every_family_answers(cli: Any, video: Path) -> None:
    from tokensieve.hosts import tiny

    for family in tiny.FAMILIES:
        found = ask_json(cli, video, "What moves?", "--model", tiny.cached(family))
        assert 0 < found["compressed"]["share"] < 0.5, family
        assert bool(found["notes"]) == (family in ("llava", "llava_next")), family


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips(cli: Any, real_videos: Path, model: Path, name: str) -> None:
    found = ask_json(cli, real_videos / name, "What happens here?", "--model", model)
    assert found["frames"] == 4
    assert found["timestamps"] == sorted(set(found["timestamps"]))
    assert found["compressed"]["new_tokens"] == 2
    assert 0.2 <= found["compressed"]["share"] <= 0.3
