"""The dataset format, its errors, and the choice of clips and questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from bench_items import frames_of, item, write_rows

from tokensieve.bench.asking import check_style, default_style, is_right, normalised, write
from tokensieve.bench.data import choose, clip_of, digest, item_like, read_items
from tokensieve.errors import BenchError

ROW = {"id": "a/0", "clip": "a", "video": "videos/a.mp4", "family": "counting", "question": "how many?"}


def rows(tmp_path: Path, **fields: Any) -> Path:
    return write_rows(tmp_path / "questions.jsonl", [{**ROW, **fields}])


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"candidates": ["one", "two"], "answer": "two"}, "two"),
        ({"options": ["one", "two"], "answer": "B"}, "two"),
        ({"options": ["one", "two"], "answer": "(a)"}, "one"),
        ({"options": {"A": "one", "B": "two"}, "answer": "B"}, "two"),
        ({"candidates": ["one", "two"], "answer": 0}, "one"),
        ({"candidates": [3, 1], "answer": 1}, "1"),
        ({"answer": "a red ball"}, "a red ball"),
    ],
)
def test_answers_as_words_letters_and_numbers(tmp_path: Path, fields: dict[str, Any], answer: str) -> None:
    (found,) = read_items(rows(tmp_path, **fields))
    assert found.answer == answer
    assert (found.id, found.clip, found.family) == ("a/0", "a", "counting")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"candidates": ["one", "two"], "answer": "three"}, "none of its candidates"),
        ({"candidates": ["one", "two"], "answer": "C"}, "none of its candidates"),
        ({"candidates": ["one", "two"], "answer": 2}, "none of its candidates"),
        ({"candidates": ["one", "two"], "answer": None}, "answer None"),
        ({"candidates": ["one", "one"], "answer": "one"}, "same candidate twice"),
        ({"candidates": ["one"], "answer": "one"}, "1 candidates"),
        ({"candidates": "one", "answer": "one"}, "no list of texts"),
        ({"options": {"X": "one", "Y": "two"}, "answer": "X"}, "letters A, B"),
        ({"video": 7, "answer": "one"}, "'video'"),
        ({"question": " ", "answer": "one"}, "'question'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    good = {**ROW, "id": "good", "answer": "one"}
    path = write_rows(tmp_path / "questions.jsonl", [good, {**ROW, **fields}])
    with pytest.raises(BenchError, match=words) as caught:
        read_items(path)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1 is no JSON"), ("[1]", "line 1 is a JSON list"), ("\n\n", "holds no question")],
)
def test_files_that_are_no_dataset(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(BenchError, match=words):
        read_items(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_items(tmp_path / "absent.jsonl")


def test_repeated_ids_and_endless_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "questions.jsonl", [{**ROW, "answer": "x"}] * 2)
    with pytest.raises(BenchError, match=r"line 2 repeats the id 'a/0' of line 1"):
        read_items(path)
    path.write_text("x" * (1 << 21))
    with pytest.raises(BenchError, match="more than 1048576 bytes"):
        read_items(path)


def test_videos_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "a.mp4"), "w") as output:
        stream: Any = output.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 40, 40, "yuv420p"
        for picture in frames_of(0):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    (found,) = read_items(rows(tmp_path, answer="one"), frames=3)
    clip = clip_of(found)
    assert clip.frames.shape == (3, 40, 40, 3) and clip.timestamps[-1] == pytest.approx(1.25)


def test_frames_in_memory_get_their_times() -> None:
    clip = clip_of(item(0, 0))
    assert np.array_equal(clip.frames, frames_of(0))
    assert clip.timestamps.tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.25] and clip.video_metadata().fps == 4.0


def test_items_of_another_kind() -> None:
    class Other:
        id, clip, family, question, candidates, answer = "i", "c", "f", "q?", ["x", "y"], "x"

        def read_frames(self) -> tuple[np.ndarray, float]:
            return frames_of(3), 2.0

    found = item_like(Other())
    assert found.candidates == ("x", "y") and found.chance == 0.5 and len(clip_of(found)) == 6


def test_the_choice_is_even_over_families_and_repeatable() -> None:
    many = [item(clip, number) for clip in range(30) for number in range(6)]
    found = choose(many, clips=20, per_clip=2, seed=3)
    assert found == choose(many, clips=20, per_clip=2, seed=3) != choose(many, clips=20, per_clip=2, seed=4)
    counts = Counter(one.family for one in found)
    assert sum(counts.values()) == 40 and max(counts.values()) - min(counts.values()) <= 1
    assert len({one.clip for one in found}) == 20
    assert [one.clip for one in choose(many, clips=30)] == [one.clip for one in many]


def test_the_choice_of_families() -> None:
    many = [item(clip, number) for clip in range(4) for number in range(3)]
    assert {one.family for one in choose(many, families=["count"])} == {"count"}
    with pytest.raises(BenchError, match="no family 'size'; it has colour, count, order"):
        choose(many, families=["size"])
    with pytest.raises(BenchError, match="clips must be 1 or more, not 0"):
        choose(many, clips=0)


def test_the_digest_sees_every_word() -> None:
    assert digest([item(0, 0)]) != digest([item(0, 0, answer="blue", question="What is thing 0 in scene 0?")])
    assert digest([item(0, 0)]) == digest([item(0, 0)])


def test_prompt_styles() -> None:
    asked = item(0, 0)
    free = item(0, 1, candidates=())
    assert write(asked, "open") == asked.question
    assert "\nA. red\nB. green\nC. blue\n" in write(asked, "letters")
    assert default_style([asked]) == "letters" and default_style([asked, free]) == "open"
    trained = type("Config", (), {"tokensieve_prompt": "open"})()
    assert default_style([asked], trained) == "open"
    with pytest.raises(BenchError, match="no candidates to letter"):
        check_style("letters", [asked, free])
    with pytest.raises(BenchError, match="no prompt style 'essay'"):
        check_style("essay", [asked])


@pytest.mark.parametrize("given", ["red", "Red.", " the  RED!", "\uff32\uff25\uff24", "(red)"])
def test_equal_but_for_writing(given: str) -> None:
    assert is_right(given, item(0, 0))


def test_other_words_are_wrong() -> None:
    assert not is_right("dark red", item(0, 0)) and not is_right("", item(0, 0))
    assert normalised("A man, a plan") == "man plan"
