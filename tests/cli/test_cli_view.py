"""``tokensieve view``: the files it writes, and those it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_media import REAL_CLIPS
from PIL import Image

from tokensieve.hosts import tiny

SHORT = ("--frames", 4, "--max-new-tokens", 2)


def test_page_and_picture(cli: Any, video: Path, model: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "kept.html", tmp_path / "kept.png"
    result = cli("view", video, "-o", page, "-o", picture, "-q", "Is <b>this</b> safe?", "--model", model, *SHORT)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{page}\n{picture}\n"
    text = page.read_text(encoding="utf-8")
    assert "VidCom2" in text and "shapes.mp4" in text and "random weights" in text
    assert "&lt;b&gt;this" in text and "<b>this" not in text
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 200
    assert sorted(tmp_path.iterdir()) == [page, picture]


def test_json_lists_what_was_kept(cli: Any, video: Path, model: Path, tmp_path: Path) -> None:
    page = tmp_path / "kept.htm"
    words = ("view", video, "-o", page, "--model", model, "--method", "uniform", "--json", *SHORT)
    found = json.loads(cli(*words).stdout)
    assert found["files"] == [str(page)] and page.is_file()
    kept = found["report"]["items"][0]["kept"]
    assert len(kept) == 25 and all(0 <= frame < 4 and row < 5 and column < 5 for frame, row, column in kept)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "video_llama_3"])
def test_other_families(cli: Any, video: Path, tmp_path: Path, family: str) -> None:
    page = tmp_path / "kept.html"
    result = cli("view", video, "-o", page, "--model", tiny.cached(family), "--method", "holitom", *SHORT)
    assert result.exit_code == 0, result.output
    assert page.stat().st_size > 10_000


def test_a_still_image(cli: Any, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    result = cli("view", tmp_path / "red.png", "-o", tmp_path / "kept.png", "--model", model, *SHORT)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept.png").stat().st_size > 1000


def test_bad_input_leaves_no_file(
    refused: Callable[..., str], video: Path, sound: Path, frameless: Path, copied_model: Path, tmp_path: Path
) -> None:
    page = tmp_path / "kept.html"
    assert "audio" in refused("view", sound, "-o", page)
    assert "no frame" in refused("view", frameless, "-o", page)
    assert "did you mean" in refused("view", video, "-o", page, "--method", "vidcon")
    assert "Retention" in refused("view", video, "-o", page, "-r", 2)
    (copied_model / "model.safetensors").unlink()
    assert "weights" in refused("view", video, "-o", page, "--model", copied_model)
    assert not page.exists()
    page.write_text("an older report")
    assert "audio" in refused("view", sound, "-o", page)
    assert page.read_text() == "an older report"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["kept.html"]


def test_bad_output(refused: Callable[..., str], video: Path, tmp_path: Path) -> None:
    assert "must end in .html or .png" in refused("view", video, "-o", tmp_path / "kept.pdf")
    assert "does not exist" in refused("view", video, "-o", tmp_path / "nowhere" / "kept.html")
    (tmp_path / "folder.html").mkdir()
    assert "is a folder" in refused("view", video, "-o", tmp_path / "folder.html")
    assert "--output" in refused("view", video)


@pytest.mark.slow
def test_demo(cli: Any, tmp_path: Path) -> None:
    result = cli("demo", "-o", tmp_path / "shown", "--no-progress")
    assert result.exit_code == 0, result.output
    assert "full model" in result.stdout and "true answer" in result.stdout
    assert "knows nothing else" in result.stderr
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == ["report.html", "report.png"]


def test_demo_in_a_place_that_is_taken(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made" in refused("demo", "-o", tmp_path / "file")


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips(cli: Any, real_videos: Path, model: Path, tmp_path: Path, name: str) -> None:
    page, picture = tmp_path / "kept.html", tmp_path / "kept.png"
    result = cli("view", real_videos / name, "-o", page, "-o", picture, "--model", model, *SHORT)
    assert result.exit_code == 0, result.output
    assert name in page.read_text(encoding="utf-8")
    assert picture.stat().st_size > 10_000
