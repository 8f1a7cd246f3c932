"""Questions of a benchmark: the JSONL format of multiple-choice video QA, and the choice of clips and questions."""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokensieve.errors import BenchError
from tokensieve.video import Clip, read_clip
from tokensieve.video.clip import ClipInfo

__all__ = ["Item", "by_clip", "choose", "clip_of", "digest", "item_like", "read_items"]

LARGEST_LINE = 1 << 20
"""Bytes of a line that are read at most."""

MOST_CANDIDATES = len(string.ascii_uppercase)

ReadFrames = Callable[[], Clip | tuple[NDArray[np.uint8], float]]


@dataclass(frozen=True)
class Item:
    """One question about one clip.

    Attributes
    ----------
    id
        Unique in its dataset.
    clip
        Name of the clip; questions with the same name share its frames.
    family
        Kind of question; reported separately.
    question
        Its words.
    candidates
        Answers to choose from; empty for free answers.
    answer
        The right one, word for word as among the candidates.
    read_frames
        Gives the frames, as a `Clip` or as uint8 [F, H, W, 3] with their rate per second.
    """

    id: str
    clip: str
    family: str
    question: str
    candidates: tuple[str, ...]
    answer: str
    read_frames: ReadFrames = field(compare=False, repr=False)

    @property
    def chance(self) -> float:
        """Accuracy of a guess; 0 for free answers."""
        return 1 / len(self.candidates) if self.candidates else 0.0


def item_like(other: Any) -> Item:
    """An `Item` from any object with its attributes."""
    names = ("id", "clip", "family", "question", "candidates", "answer", "read_frames")
    found = {name: getattr(other, name) for name in names}
    return Item(**{**found, "candidates": tuple(found["candidates"])})


def clip_of(item: Item) -> Clip:
    """Frames of a question's clip with their times."""
    shown = item.read_frames()
    if isinstance(shown, Clip):
        return shown
    frames, rate = shown
    count, height, width = frames.shape[:3]
    info = ClipInfo(
        item.clip, width, height, average_fps=rate, duration=count / rate, num_frames=count, num_frames_kind="exact"
    )
    return Clip(frames, np.arange(count) / rate, np.arange(count), info, count / rate)


def read_items(path: str | Path, frames: int = 16) -> list[Item]:
    """Read a dataset with one JSON object a line.

    Keys: ``video`` (relative to the file), ``question``, ``answer``, and ``candidates`` or ``options`` (a list, or a
    mapping from letters); ``id``, ``clip`` and ``family`` are optional. The answer may be the words of a candidate,
    its letter, or its index from zero.

    Parameters
    ----------
    path : str or Path
        The file. Videos are not opened before their frames are asked for.
    frames : int
        Frames to take of every video, spread evenly.

    Raises
    ------
    BenchError
        When the file cannot be read or a line is wrong; the message names the line.
    """
    source = Path(path).expanduser()
    items: list[Item] = []
    seen: dict[str, int] = {}
    try:
        with source.open("rb") as lines:
            number = 0
            while line := lines.readline(LARGEST_LINE + 1):
                number += 1
                place = f"{source}, line {number}"
                if len(line) > LARGEST_LINE:
                    raise BenchError(f"{place} has more than {LARGEST_LINE} bytes; write one question a line.")
                if not line.strip():
                    continue
                item = _item(_row(line, place), number, source.parent, frames, place)
                if item.id in seen:
                    raise BenchError(f"{place} repeats the id {item.id!r} of line {seen[item.id]}; make ids unique.")
                seen[item.id] = number
                items.append(item)
    except OSError as error:
        raise BenchError(f"The dataset {source} cannot be read ({error.strerror}); name a JSONL file.") from error
    if not items:
        raise BenchError(f"The dataset {source} holds no question; write one JSON object a line.")
    return items


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{place} is no JSON ({error}); write one object a line.") from error
    if not isinstance(row, dict):
        raise BenchError(f"{place} is a JSON {type(row).__name__}; write one object a line.")
    return row


def _item(row: Mapping[str, Any], number: int, folder: Path, frames: int, place: str) -> Item:
    texts = {}
    for key in ("video", "question"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BenchError(f"{place} has no text under {key!r}; every question needs a video and a question.")
        texts[key] = row[key]
    candidates = _candidates(row, place)
    video = folder / texts["video"]
    return Item(
        id=str(row.get("id", f"line-{number}")),
        clip=str(row.get("clip", texts["video"])),
        family=str(row.get("family", "all")),
        question=texts["question"],
        candidates=candidates,
        answer=_answer(row.get("answer"), candidates, place),
        read_frames=partial(read_clip, video, frames),
    )


def _candidates(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    given = row.get("candidates", row.get("options", ()))
    if isinstance(given, dict):
        expected = list(string.ascii_uppercase[: len(given)])
        if [str(key).upper() for key in given] != expected:
            raise BenchError(f"{place} names its options {list(given)}; use the letters {', '.join(expected)}.")
        given = list(given.values())
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, (str, int, float)) for one in given):
        raise BenchError(f"{place} has candidates that are no list of texts; write ['yes', 'no'].")
    found = tuple(str(one) for one in given)
    if len(found) == 1 or len(found) > MOST_CANDIDATES:
        raise BenchError(f"{place} has {len(found)} candidates; give 2 to {MOST_CANDIDATES}, or none.")
    if len(set(found)) < len(found):
        raise BenchError(f"{place} has the same candidate twice; make them distinct.")
    return found


def _answer(given: Any, candidates: Sequence[str], place: str) -> str:
    """The right answer in the words of its candidate."""
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise BenchError(f"{place} has the answer {given!r}; give the words, the letter or the index of a candidate.")
    if not candidates:
        return str(given)
    if isinstance(given, str):
        if given in candidates:
            return given
        letter = given.strip().strip("().").upper()
        place_of = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    else:
        place_of = given if str(given) not in candidates else list(candidates).index(str(given))
    if not 0 <= place_of < len(candidates):
        raise BenchError(f"{place} has the answer {given!r}, which is none of its candidates {list(candidates)}.")
    return candidates[place_of]


def by_clip(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Questions by clip, in the order of first appearance."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.clip, []).append(item)
    return found


def choose(
    items: Sequence[Item],
    clips: int | None = None,
    families: Sequence[str] | None = None,
    per_clip: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """A part of a dataset, the same for the same arguments.

    Clips are drawn at random without changing their order. Of every clip those questions are taken whose families
    have had the fewest so far, so that the families come out even.

    Parameters
    ----------
    items : sequence of Item
        The dataset.
    clips : int, optional
        How many clips; all by default.
    families : sequence of str, optional
        Families to ask; all by default.
    per_clip : int, optional
        Questions of a clip; all by default.
    seed : int
        Of the choice.

    Raises
    ------
    BenchError
        For an unknown family or a number below one.
    """
    for name, number in (("clips", clips), ("questions", per_clip)):
        if number is not None and number < 1:
            raise BenchError(f"The number of {name} must be 1 or more, not {number}.")
    known = list(dict.fromkeys(item.family for item in items))
    unknown = [family for family in families or () if family not in known]
    if unknown:
        raise BenchError(f"The dataset has no family {unknown[0]!r}; it has {', '.join(known)}.")
    wanted = [item for item in items if families is None or item.family in families]
    grouped = by_clip(wanted)
    generator = np.random.default_rng(seed)
    names = list(grouped)
    if clips is not None and clips < len(names):
        chosen = np.sort(generator.permutation(len(names))[:clips])
        names = [names[int(place)] for place in chosen]
    if per_clip is None:
        return [item for name in names for item in grouped[name]]
    asked: Counter[str] = Counter()
    found: list[Item] = []
    for name in names:
        pool = [grouped[name][int(place)] for place in generator.permutation(len(grouped[name]))]
        for _ in range(min(per_clip, len(pool))):
            rarest = min(pool, key=lambda item: asked[item.family])
            pool.remove(rarest)
            asked[rarest.family] += 1
            found.append(rarest)
    return found


def digest(items: Sequence[Item]) -> str:
    """Fingerprint of all that is asked; two datasets with the same one ask the same questions in the same order."""
    rows = [[item.id, item.clip, item.family, item.question, list(item.candidates), item.answer] for item in items]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
