"""Training records from the public JSON formats.

================= ===================================================================================================
format            record
================= ===================================================================================================
``conversations`` LLaVA, LLaVA-Hound, M4-Instruct: ``conversations`` of ``{"from": "human" | "gpt", "value": ...}``
                  and ``image`` (a path, or a list of paths) or ``video``, or neither
``questions``     VideoChat2-IT: ``video`` or ``image``, and ``QA`` of ``{"i": ..., "q": ..., "a": ...}``
``preference``    LLaVA-Hound preference pairs: ``video`` or ``image``, ``prompt``, ``chosen``, ``rejected``
================= ===================================================================================================

Placeholders in the text (``<image>``, ``<video>``) are taken out; the model's own go in front of the first question.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokensieve.errors import VideoError
from tokensieve.train.config import DataSource, Policy, TrainingError

__all__ = ["RecordDataset", "Sample", "Turn", "parse_record", "read_records"]

Kind = Literal["text", "image", "images", "video"]

_PLACEHOLDER = re.compile(r"\s*<(image|video)>\s*")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LARGEST = 4 * 2**30
_ATTEMPTS = 10

logger = logging.getLogger("tokensieve")


@dataclass(frozen=True)
class Turn:
    """What one side says; ``role`` is ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    text: str


@dataclass
class Sample:
    """One conversation about what is shown.

    Attributes
    ----------
    turns : list of Turn
        An optional system text, then user and assistant in turn; the last user turn is answered, by ``chosen`` if
        that is set.
    images : sequence
        Pictures, or their paths.
    videos : sequence
        Clips ``[T, H, W, 3]``, or their paths.
    chosen, rejected : str, optional
        Preferred and other answer to the last user turn.
    name : str
        Where it comes from, for messages.
    """

    turns: list[Turn]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    chosen: str | None = None
    rejected: str | None = None
    name: str = ""

    @property
    def kind(self) -> Kind:
        """What is shown."""
        if self.videos:
            return "video"
        return "text" if not self.images else "image" if len(self.images) == 1 else "images"


def read_records(source: DataSource) -> Iterator[tuple[str, Sample | str]]:
    """Records of an annotation file.

    Parameters
    ----------
    source : DataSource
        Where and in which format.

    Yields
    ------
    name : str
        File and number of the record.
    sample : Sample or str
        The sample, or what is wrong with the record.

    Raises
    ------
    TrainingError
        If the file itself cannot be read.
    """
    path = Path(source.path)
    media = Path(source.media) if source.media else path.parent
    for number, record in enumerate(_entries(path)):
        if source.limit is not None and number >= source.limit:
            return
        label = record.get("id", record.get("sample_id")) if isinstance(record, Mapping) else None
        name = f"{path.name}:{number}" + ("" if label is None else f" (id {label})")
        if isinstance(record, str):
            yield name, record
            continue
        try:
            sample = parse_record(record, media, source.format)
        except TrainingError as error:
            yield name, str(error)
            continue
        sample.name = name
        yield name, sample


def _entries(path: Path) -> Iterator[Any]:
    """Records of a JSON list or of JSON lines; a line that is no JSON comes as a text that says so."""
    try:
        if path.stat().st_size > _LARGEST:
            raise TrainingError(f"{path} is larger than 4 GiB; split it.")
        with path.open(encoding="utf-8") as file:
            start = file.read(1024).lstrip()[:1]
            file.seek(0)
            if start != "[":
                for line in file:
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except ValueError as error:
                            yield f"the line is no JSON ({error})"
                return
            records = json.load(file)
    except OSError as error:
        raise TrainingError(f"The annotations {path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise TrainingError(f"{path} is no JSON ({error}); correct or download it again.") from error
    yield from records


def parse_record(record: Any, media: Path, kind: str = "auto") -> Sample:
    """One record of a public format.

    Parameters
    ----------
    record : dict
        As read.
    media : Path
        Folder that its paths start from.
    kind : str
        Format; ``"auto"`` tells by the fields.

    Returns
    -------
    Sample

    Raises
    ------
    TrainingError
        If a field is missing or makes no sense.
    """
    if not isinstance(record, Mapping):
        raise TrainingError(f"the record is a {type(record).__name__}, not an object with fields")
    if kind == "auto":
        kind = "preference" if "rejected" in record else "questions" if "QA" in record else "conversations"
    parse = {"conversations": _conversations, "questions": _questions, "preference": _preference}[kind]
    sample = parse(record)
    sample.images = [media / path for path in _paths(record, "image")]
    sample.videos = [media / path for path in _paths(record, "video")]
    if sample.images and sample.videos:
        raise TrainingError("the record shows images and a video; give it one kind of them")
    _check_turns(sample)
    return sample


def _paths(record: Mapping[str, Any], field_name: str) -> list[str]:
    value = record.get(field_name)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in values):
        raise TrainingError(f"{field_name} is {value!r}, not a path")
    return values


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TrainingError(f"{what} is {'empty' if value in ('', None) else repr(value)}")
    return _PLACEHOLDER.sub("\n", value).strip()


def _conversations(record: Mapping[str, Any]) -> Sample:
    said = record.get("conversations")
    if not isinstance(said, list) or not said:
        raise TrainingError("conversations are missing")
    turns = []
    for number, turn in enumerate(said):
        role = _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
        if role is None:
            raise TrainingError(f"turn {number} has no known speaker; use human and gpt")
        turns.append(Turn(role, _text(turn.get("value", turn.get("content")), f"turn {number}")))
    return Sample(turns)


def _questions(record: Mapping[str, Any]) -> Sample:
    pairs = record.get("QA")
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
        raise TrainingError("QA holds no questions")
    turns = []
    instruction = pairs[0].get("i")
    if isinstance(instruction, str) and instruction.strip():
        turns.append(Turn("system", instruction.strip()))
    for number, pair in enumerate(pairs):
        turns.append(Turn("user", _text(pair.get("q") or pair.get("i"), f"question {number}")))
        turns.append(Turn("assistant", _text(pair.get("a"), f"answer {number}")))
    if turns[0].role == "system" and turns[1].text == turns[0].text:
        turns = turns[1:]
    return Sample(turns)


def _preference(record: Mapping[str, Any]) -> Sample:
    answers = {name: _text(record.get(name), name) for name in ("chosen", "rejected")}
    if answers["chosen"] == answers["rejected"]:
        raise TrainingError("chosen and rejected are the same")
    return Sample([Turn("user", _text(record.get("prompt", record.get("question")), "prompt"))], **answers)


def _check_turns(sample: Sample) -> None:
    turns = sample.turns[1:] if sample.turns[0].role == "system" else sample.turns
    wanted = ["user", "assistant"] * len(turns)
    if [turn.role for turn in turns] != wanted[: len(turns)]:
        raise TrainingError("user and assistant do not speak in turn, the user first")
    if (len(turns) % 2 == 0) == (sample.chosen is not None):
        raise TrainingError(
            "the last question has no answer" if sample.chosen is None else "the prompt ends in an answer"
        )


@dataclass
class RecordDataset:
    """Samples with their pixels read, for a data loader.

    Which frames are drawn depends on seed, epoch and number of the sample alone, so that a resumed run sees the same.

    Parameters
    ----------
    samples : list of Sample
        With paths.
    frames : int
        Frames of every video.
    seed : int
        Of the frames that are drawn.
    random_frames : bool
        One random frame per segment, or the central ones of evaluation.
    fixed : bool
        Draw the same frames in every epoch.
    on_broken : str
        ``"skip"`` puts a random other sample in the place of one that cannot be read, ``"stop"`` raises.
    """

    samples: list[Sample]
    frames: int = 32
    seed: int = 0
    random_frames: bool = True
    fixed: bool = False
    on_broken: Policy = "skip"
    epoch: int = field(default=0, repr=False)

    def set_epoch(self, epoch: int) -> None:
        """Let other frames be drawn in this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """A sample with pictures and clips in place of their paths.

        Raises
        ------
        TrainingError
            If it cannot be read and nothing may take its place, or ten others cannot be read either.
        """
        place = index
        generator = np.random.default_rng((self.seed, self.epoch, index, 1))
        for _ in range(_ATTEMPTS):
            try:
                return self._read(place)
            except VideoError as error:
                name = self.samples[place].name or f"sample {place}"
                if self.on_broken == "stop":
                    raise TrainingError(
                        f"{name} cannot be read ({error}); correct it, or set on_broken to skip."
                    ) from error
                logger.warning("%s cannot be read (%s); another sample takes its place.", name, error)
                place = int(generator.integers(len(self.samples)))
        raise TrainingError(f"{_ATTEMPTS} samples in a row cannot be read; run the data check with check: decode.")

    def _read(self, index: int) -> Sample:
        from tokensieve.train.frames import read_frames
        from tokensieve.video import read_clip

        sample = self.samples[index]
        generator = None
        if self.random_frames:
            generator = np.random.default_rng((self.seed, 0 if self.fixed else self.epoch, index))
        images = [read_clip(path).frames[0] if isinstance(path, str | Path) else path for path in sample.images]
        videos = [
            read_frames(path, self.frames, generator) if isinstance(path, str | Path) else path
            for path in sample.videos
        ]
        return Sample(sample.turns, images, videos, sample.chosen, sample.rejected, sample.name)
