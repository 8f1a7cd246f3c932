"""What is to be answered: the videos of a folder, or the rows of a manifest."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import TokensieveError

__all__ = ["SUFFIXES", "Item", "read_items"]

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".3g2", ".mpg", ".mpeg", ".ts"}
    | {".m2ts", ".mts", ".wmv", ".flv", ".ogv", ".gif"}
)
"""Endings of the files that are taken from a folder."""

_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Item:
    """One question about one clip.

    Attributes
    ----------
    id : str
        Unique in the run.
    video : str
        Absolute path or http(s) address.
    question : str
        What to ask.
    start, end : float, optional
        Part of the clip, seconds.
    """

    id: str
    video: str
    question: str
    start: float | None = None
    end: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def read_items(source: str | Path, question: str | None = None) -> list[Item]:
    """List what is to be answered, in a fixed order.

    Parameters
    ----------
    source : str or Path
        A folder, searched with its subfolders for files with one of `SUFFIXES`; or a manifest: ``.jsonl`` or
        ``.csv`` with the columns ``video`` and optionally ``id``, ``question``, ``start``, ``end``, or ``.txt``
        with one video per line. Relative paths are relative to the manifest.
    question : str, optional
        For rows that have none of their own.

    Returns
    -------
    list of Item
        Clips of a folder are called by their path in it. Rows without ``id`` are called by their ``video``, with
        ``#2``, ``#3`` ... for repeated ones.

    Raises
    ------
    TokensieveError
        If there is nothing, a row is incomplete, or two rows have the same ``id``.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        items = [
            Item(path.relative_to(place).as_posix(), str(path.resolve()), _asked(None, question, str(path)))
            for path in found
        ]
        if not items:
            raise TokensieveError(f"The folder {place} holds no video ({', '.join(sorted(SUFFIXES))}); check the path.")
        return items
    if not place.is_file():
        raise TokensieveError(f"{place} is neither a folder nor a manifest; check the path.")
    try:
        items = list(_from_rows(_rows(place), place, question))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TokensieveError(f"The manifest {place} cannot be read ({error}); save it as UTF-8 text.") from error
    if not items:
        raise TokensieveError(f"The manifest {place} has no rows; list at least one video.")
    return items


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows of a manifest."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".txt"):
        raise TokensieveError(f"A manifest ends in .jsonl, .csv or .txt, not {path.suffix or path.name!r}; convert it.")
    with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:
        if suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if key and value}
            return
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
            if not line.strip():
                continue
            yield number, {"video": line.strip()} if suffix == ".txt" else _json_row(line, number, path)


def _json_row(line: str, number: int, path: Path) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TokensieveError(f"Line {number} of {path} is no JSON ({error}); correct it.") from error
    if not isinstance(row, dict):
        raise TokensieveError(f'Line {number} of {path} is no object; write {{"video": ...}}.')
    return row


def _from_rows(rows: Iterable[tuple[int, Mapping[str, Any]]], path: Path, question: str | None) -> Iterator[Item]:
    seen: set[str] = set()
    repeated: Counter[str] = Counter()
    for number, row in rows:
        where = f"Line {number} of {path}"
        video = row.get("video")
        if not isinstance(video, str) or not video.strip():
            raise TokensieveError(f"{where} names no video; give the column 'video'.")
        if row.get("id") is not None:
            identity = str(row["id"])
        else:
            repeated[video] += 1
            identity = video if repeated[video] == 1 else f"{video}#{repeated[video]}"
        if identity in seen:
            raise TokensieveError(f"{where} repeats the id {identity!r}; every row needs an id of its own.")
        seen.add(identity)
        if "://" not in video:
            video = str((path.parent / Path(video).expanduser()).resolve())
        start, end = (_seconds(row.get(name), name, where) for name in ("start", "end"))
        yield Item(identity, video, _asked(row.get("question"), question, where), start, end)


def _asked(own: Any, question: str | None, where: str) -> str:
    asked = own if own is not None else question
    if not isinstance(asked, str) or not asked.strip():
        raise TokensieveError(f"{where} has no question; give --question or a column 'question'.")
    return asked


def _seconds(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TokensieveError(f"{where} has {name}={value!r}, which is no number of seconds; correct it.") from None
