"""Questions of the public benchmarks, from their annotation files."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokensieve.errors import TokensieveError

__all__ = [
    "EvaluationError",
    "Question",
    "Subtitle",
    "load_activitynet",
    "load_mvbench",
    "load_open_csv",
    "load_questions",
    "load_vcg",
    "load_videomme",
    "read_subtitles",
]

LONG_FRAMES = 64
"""Frames that the published evaluation gives medium and long videos of Video-MME."""

_LARGEST = 2**30
_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov")
_FOLDER_RATE = 3.0
"""Pictures a second in the frame folders of MVBench."""


class EvaluationError(TokensieveError):
    """An annotation file, a judge or a set of answers cannot be used."""


@dataclass(frozen=True)
class Subtitle:
    """One line of subtitles, shown from ``start`` to ``end`` seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes
    ----------
    id : str
        Unique in its benchmark.
    video : str
        Path below the folder of videos, with or without suffix; a folder of pictures where the benchmark has one.
    question : str
        As published.
    options : tuple of str
        Answers to choose from, without letters; empty for open questions.
    answer : str
        Letter of the right option, or the expected answer.
    group : str
        Part of the benchmark that is reported on its own.
    start, end : float, optional
        Range of the video in seconds.
    rate : float, optional
        Pictures a second of a folder of pictures.
    frames : int, optional
        Frames that the protocol asks for, where it is not 32.
    subtitles : tuple of Subtitle
        Of the whole video.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...] = ()
    answer: str = ""
    group: str = ""
    start: float = 0.0
    end: float | None = None
    rate: float | None = None
    frames: int | None = None
    subtitles: tuple[Subtitle, ...] = field(default=(), repr=False)

    def locate(self, folder: Path) -> Path:
        """The file (or folder of pictures) below a folder of videos.

        Raises
        ------
        EvaluationError
            If there is none, or the name leads out of the folder.
        """
        place = folder / self.video
        if not place.resolve().is_relative_to(folder.resolve()):
            raise EvaluationError(
                f"The video {self.video} of {self.id} leads out of {folder}; correct the annotations."
            )
        for candidate in (place, *(place.with_name(place.name + suffix) for suffix in _SUFFIXES)):
            if candidate.exists():
                return candidate
        raise EvaluationError(f"The video {self.video} of {self.id} is not in {folder}; check the folder of videos.")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise EvaluationError(f"{path} is larger than 1 GiB, which no annotation file is; check the path.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"The annotations {path} cannot be read ({error}); check the path.") from error


def _json(path: Path) -> Any:
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{path} is no JSON ({error}); download it again.") from error


def _field(row: Any, name: str, place: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        raise EvaluationError(f"{place} has no field {name!r}; is it the official file?")
    return row[name]


def _letter(options: Sequence[str], answer: str, place: str) -> str:
    """Letter of an answer that is given word for word."""
    if answer not in options or len(options) > len(string.ascii_uppercase):
        raise EvaluationError(f"The answer {answer!r} of {place} is not among its options; is it the official file?")
    return string.ascii_uppercase[list(options).index(answer)]


def load_mvbench(path: Path) -> list[Question]:
    """MVBench: one JSON file per task, or the folder of all; the group is the task."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EvaluationError(f"The folder {path} holds no JSON files; give that of MVBench's annotations.")
    found = []
    for file in files:
        for number, row in enumerate(_json(file)):
            place = f"{file.name}:{number}"
            options = tuple(str(option) for option in _field(row, "candidates", place))
            folder = not Path(str(_field(row, "video", place))).suffix
            found.append(
                Question(
                    id=f"{file.stem}-{number}",
                    video=str(row["video"]),
                    question=str(_field(row, "question", place)),
                    options=options,
                    answer=_letter(options, str(_field(row, "answer", place)), place),
                    group=file.stem,
                    start=float(row.get("start") or 0.0),
                    end=float(row["end"]) if row.get("end") is not None else None,
                    rate=_FOLDER_RATE if folder else None,
                )
            )
    return found


def load_videomme(path: Path, subtitles: Path | None = None) -> list[Question]:
    """Video-MME: a table as JSON lines; the group is the duration, with 64 frames for medium and long videos.

    ``subtitles`` is the folder of ``videoID.srt``; videos without a file have none.
    """
    found = []
    for number, row in enumerate(_json(path)):
        place = f"{path.name}:{number}"
        name, duration = str(_field(row, "videoID", place)), str(_field(row, "duration", place))
        options = tuple(str(option).split(". ", 1)[-1] for option in _field(row, "options", place))
        file = None if subtitles is None else subtitles / f"{name}.srt"
        found.append(
            Question(
                id=str(_field(row, "question_id", place)),
                video=name,
                question=str(_field(row, "question", place)),
                options=options,
                answer=str(_field(row, "answer", place)),
                group=duration,
                frames=None if duration == "short" else LONG_FRAMES,
                subtitles=read_subtitles(file) if file is not None and file.is_file() else (),
            )
        )
    return found


def load_activitynet(path: Path) -> list[Question]:
    """ActivityNet-QA: a folder with the files of questions (``*q.json``) and answers (``*a.json``)."""
    try:
        asked, answered = (next(iter(sorted(path.glob(f"*{kind}.json")))) for kind in ("q", "a"))
    except (StopIteration, RuntimeError) as error:
        raise EvaluationError(f"{path} lacks the file of questions or of answers of ActivityNet-QA.") from error
    answers = {str(_field(row, "question_id", answered.name)): row for row in _json(answered)}
    found = []
    for number, row in enumerate(_json(asked)):
        key = str(_field(row, "question_id", f"{asked.name}:{number}"))
        if key not in answers:
            raise EvaluationError(f"The question {key} has no answer in {answered.name}; take both files of one split.")
        video = f"v_{_field(row, 'video_name', key)}"
        answer = str(answers[key].get("answer", ""))
        found.append(Question(key, video, str(row["question"]), answer=answer, group=str(answers[key].get("type", ""))))
    return found


def load_open_csv(path: Path) -> list[Question]:
    """MSVD-QA, MSRVTT-QA and others as tables with ``question``, ``answer``, ``video_name`` and ``question_id``."""
    rows = list(csv.DictReader(_read(path).splitlines()))
    return [
        Question(
            str(_field(row, "question_id", f"{path.name}:{number}")),
            str(_field(row, "video_name", f"{path.name}:{number}")),
            str(_field(row, "question", path.name)),
            answer=str(_field(row, "answer", path.name)),
            group=str(row.get("question_type", "")),
        )
        for number, row in enumerate(rows)
    ]


def load_vcg(path: Path) -> list[Question]:
    """VCG-Bench: the folder with ``generic_qa.json``, ``temporal_qa.json`` and ``consistency_qa.json``.

    The generic questions serve the axes correctness, detail and context. Both wordings of a consistency question
    become questions of their own, whose ids end in ``.1`` and ``.2``.
    """
    found = []
    for group in ("generic", "temporal", "consistency"):
        file = path / f"{group}_qa.json"
        if not file.is_file():
            continue
        for number, row in enumerate(_json(file)):
            name = f"{group}-{number}"
            wordings = ("Q1", "Q2") if group == "consistency" else ("Q",)
            for place, key in enumerate(wordings, 1):
                found.append(
                    Question(
                        id=name if len(wordings) == 1 else f"{name}.{place}",
                        video=str(_field(row, "video_name", f"{file.name}:{number}")),
                        question=str(_field(row, key, f"{file.name}:{number}")),
                        answer=str(_field(row, "A", f"{file.name}:{number}")),
                        group=group,
                    )
                )
    if not found:
        raise EvaluationError(f"{path} holds no file of VCG-Bench (generic_qa.json, ...); check the folder.")
    return found


def read_subtitles(path: Path) -> tuple[Subtitle, ...]:
    """Lines of an SRT file."""
    return tuple(_lines(_read(path), path.name))


def _lines(text: str, name: str) -> Iterator[Subtitle]:
    for block in text.replace("\r\n", "\n").strip().split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        clock = next((number for number, line in enumerate(lines) if "-->" in line), None)
        if clock is None:
            continue
        start, _, end = lines[clock].partition("-->")
        yield Subtitle(_seconds(start, name), _seconds(end, name), " ".join(lines[clock + 1 :]).strip())


def _seconds(text: str, name: str) -> float:
    try:
        hours, minutes, seconds = text.strip().split(" ")[0].replace(",", ".").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError as error:
        raise EvaluationError(f"{name} has the time {text.strip()!r}, which is none of an SRT file.") from error


_LOADERS = {
    "mvbench": load_mvbench,
    "videomme": load_videomme,
    "activitynet": load_activitynet,
    "open": load_open_csv,
    "vcg": load_vcg,
}


def load_questions(task: str, path: Path, subtitles: Path | None = None) -> list[Question]:
    """Questions of a task: ``mvbench``, ``videomme``, ``activitynet``, ``open`` (MSVD, MSRVTT) or ``vcg``.

    Raises
    ------
    EvaluationError
        If the task is unknown or its files cannot be used.
    """
    if task not in _LOADERS:
        raise EvaluationError(f"The task {task!r} is unknown; choose one of {', '.join(_LOADERS)}.")
    if subtitles is not None:
        if task != "videomme":
            raise EvaluationError(f"The task {task} has no subtitles; leave them out.")
        return load_videomme(path, subtitles)
    return _LOADERS[task](path)
