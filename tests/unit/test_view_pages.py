"""The page and the picture: content, safety, size, and files that are whole or absent."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from view_items import Page, data, frames, item, merge_map

from tokensieve.errors import TokensieveError, VideoError
from tokensieve.view import ViewData, render_html, write_html, write_png
from tokensieve.view.data import clock
from tokensieve.view.files import atomic

HOSTILE = "</script><script>alert('x')</script><img src=https://evil.example/x.png> \"quoted\" & $a_b$ {{ 7 * 7 }}"


def full(**fields: object) -> ViewData:
    """An item with everything: merged patches, two cuts, uniqueness."""
    trace = item(
        merged=merge_map((0, 0, 0.5), (1, 0, 0.5)),
        decoder={2: torch.tensor([0, 3, 6, 12, 30]), 4: torch.tensor([0, 30])},
        info={"frame_uniqueness": torch.tensor([-4.0, -3.0, -3.5, -3.2])},
    )
    given = {"label": "street.mp4", "question": "How many cars?", "method": "VidCom2", **fields}
    return data(trace, **given)  # type: ignore[arg-type]


def pictures(page: Page) -> list[dict[str, str | None]]:
    return [image for image in page.named("img") if image.get("src")]


def test_the_page_is_well_formed_and_says_what_it_shows() -> None:
    view = full(host="LLaVA-OneVision", answers={"VidCom2": "Three cars.", "full": "Four."}, note="random weights")
    page = Page(render_html(view))
    assert not page.errors and not page.open
    for words in (
        "VidCom2 on LLaVA-OneVision",
        "48 \N{RIGHTWARDS ARROW} 16 visual tokens (33.3 %)",
        "street.mp4",
        "How many cars?",
        "Three cars.",
        "Four.",
        "random weights",
        "Uniqueness of every frame",
        "merged into a kept patch",
        "0:03.0",
    ):
        assert words in page.words


def test_every_state_has_its_pictures_and_counts_and_one_is_shown() -> None:
    page = Page(render_html(full()))
    buttons = [button for button in page.named("button") if "data-go" in button]
    assert len(buttons) == 4 and [button["aria-pressed"] for button in buttons] == ["false"] * 3 + ["true"]
    shown = pictures(page)
    assert len(shown) == 16
    assert {image["data-state"] for image in shown if "hidden" not in image} == {"3"}
    assert all(image["alt"] for image in shown)
    assert "0:02.0, Enters the LLM: 4 of 12 patches kept" in {image["alt"] for image in shown}
    for words in ("Original", "Enters the LLM", "From layer 2", "From layer 4"):
        assert words in page.words


def test_pictures_are_embedded_and_differ_by_state() -> None:
    first = pictures(Page(render_html(full())))[:4]
    decoded = []
    for image in first:
        kind, _, text = (image["src"] or "").partition(",")
        assert kind == "data:image/jpeg;base64"
        decoded.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int))
        assert decoded[-1].shape == (int(image["height"] or 0), int(image["width"] or 0), 3)
    assert all(np.abs(one - decoded[0]).mean() > 5 for one in decoded[1:])


def test_nothing_is_loaded_from_anywhere() -> None:
    text = render_html(full(source="arxiv.org/abs/2505.14454", report={"peak_memory": 1}))
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for _, attributes in Page(text).tags:
        for name in ("src", "href", "action", "poster", "srcset", "data", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]


def test_the_policy_allows_only_the_page_s_own_script() -> None:
    text = render_html(full())
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text


def test_hostile_words_stay_words() -> None:
    fields = {
        "question": HOSTILE,
        "answers": {HOSTILE: HOSTILE},
        "note": HOSTILE,
        "host": HOSTILE,
        "source": HOSTILE,
    }
    view = data(
        label=HOSTILE,
        method=HOSTILE,
        settings={HOSTILE: HOSTILE, "retention": 0.5},
        report={
            "requested": [{"method": HOSTILE, "retention": 0.5, "counted": HOSTILE, "dropped": None}],
            "memory_kind": HOSTILE,
            "peak_memory": 5,
            "seconds": {HOSTILE: 1.0},
        },
        **fields,  # type: ignore[arg-type]
    )
    text = render_html(view)
    page = Page(text)
    assert not page.errors and not page.open
    assert len(page.named("script")) == 1 and "alert('x')</script>" not in text
    assert all((image["src"] or "").startswith("data:") for image in pictures(page))
    assert page.words.count("{{ 7 * 7 }}") >= 8


def test_thirty_two_noisy_frames_stay_below_six_megabytes() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (32, 90, 160, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    trace = item(32, 14, 14, decoder={3: torch.arange(0, 6272, 9)})
    assert 500_000 < len(render_html(data(trace, coarse))) < 6_000_000


def test_a_long_clip_shows_an_even_choice() -> None:
    page = Page(render_html(data(item(600, 2, 2), frames(600, 8, 8))))
    assert len(page.named("figure")) == 256
    assert "An even choice of 256 of 600 frames is shown" in page.words
    assert "9:59.0" in page.words


def test_pairs_of_frames_are_named_by_both_times(tmp_path: Path) -> None:
    view = data(item(3), frames(5))
    assert view.unit == "step"
    assert view.titles() == ["0:00.0\N{EN DASH}0:01.0", "0:02.0\N{EN DASH}0:03.0", "0:04.0"]
    assert "Tokens kept per step" in render_html(view)


def test_pictures_without_times() -> None:
    view = data(item(2, kind="image"), frames(2), timestamps=None)
    assert view.unit == "frame" and view.titles() == ["picture 1", "picture 2"]
    single = data(item(1, kind="image"), frames(1), timestamps=None)
    assert single.unit == "view" and single.titles() == ["picture"]
    assert not Page(render_html(single)).errors


def test_clock() -> None:
    assert [clock(0.04, 2), clock(59.96), clock(61.5), clock(3723.04)] == [
        "0:00.04",
        "1:00.0",
        "1:01.5",
        "1:02:03.0",
    ]


@pytest.mark.parametrize(
    ("pictures", "fields", "words"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), {}, "no frame"),
        (np.zeros((4, 4, 4, 3), np.float32), {}, "float32"),
        (np.zeros((4, 4, 4), np.uint8), {}, r"\[4, 4\]"),
        (frames(4), {"timestamps": np.arange(3.0)}, "3 timestamps for 4 frames"),
        (frames(4), {"regions": []}, "0 regions for 4 views"),
    ],
)
def test_bad_input_is_named(pictures: np.ndarray, fields: dict[str, object], words: str) -> None:
    with pytest.raises(VideoError, match=words):
        data(item(), pictures, **fields)


def test_the_picture_shows_frames_and_charts(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    write_png(full(question=HOSTILE, report={"seconds": {"encode": 1.0}}), path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1600 and 600 < picture.shape[0] < 3000
    red = (picture[..., 0] > 180) & (picture[..., 1] < 70) & (picture[..., 2] < 70)
    blue = (np.abs(picture.astype(int) - (0x2F, 0x6D, 0x8C)).sum(-1) == 0).sum()
    # The bar of the most unique frame, and the theme's bars.
    assert red[picture.shape[0] // 2 :].sum() > 1000 and blue > 1000


@pytest.mark.parametrize("frames_shown", [1, 2, 70])
def test_pictures_of_any_number_of_frames(tmp_path: Path, frames_shown: int) -> None:
    path = tmp_path / "report.png"
    write_png(data(item(frames_shown, 2, 2), frames(frames_shown, 40, 20)), path)
    assert Image.open(path).size[0] == 1600


@pytest.mark.parametrize("write", [write_html, write_png])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    path = tmp_path / "report.out"
    path.write_text("before")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(full(), path)  # type: ignore[operator]
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["report.out"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(TokensieveError, match=r"report.html cannot be written \(No space left on device\)"):
        write_html(full(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    write_html(full(), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "report.html"]


@pytest.mark.parametrize(("name", "words"), [("missing/report.html", "missing"), ("", "is a folder")])
def test_places_that_cannot_be_written_are_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(TokensieveError, match=words), atomic(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []
