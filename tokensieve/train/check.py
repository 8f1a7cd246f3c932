"""A look at all training records before the first step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokensieve.errors import TokensieveError
from tokensieve.train.config import DataSource, Depth, Policy, TrainingError
from tokensieve.train.records import Sample, read_records

__all__ = ["DataReport", "check_records", "load_samples"]

logger = logging.getLogger("tokensieve")

_NAMED = 5
"""Broken records that a message names; the report has all."""


@dataclass
class DataReport:
    """What the data check found.

    Attributes
    ----------
    good : int
        Records that can be trained on.
    broken : list of (str, str)
        Name of the record and what is wrong with it.
    kinds : dict
        Good records by what they show: text, image, images, video.
    """

    good: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        text = f"{self.good} records can be trained on ({kinds or 'none'}), {len(self.broken)} are broken"
        if self.broken:
            named = "; ".join(f"{name}: {reason}" for name, reason in self.broken[:_NAMED])
            text += f": {named}{'; ...' if len(self.broken) > _NAMED else ''}"
        return text


def check_records(
    records: Iterable[tuple[str, Sample | str]], depth: Depth, progress: Callable[[int], None] | None = None
) -> tuple[list[Sample], DataReport]:
    """Sort records into good ones and broken ones.

    Parameters
    ----------
    records : iterable
        Names with samples, or with what is wrong, from `read_records`.
    depth : str
        ``"none"``: only what reading the annotations has found. ``"files"``: also whether every file exists.
        ``"decode"``: also whether a frame of it can be read.
    progress : callable, optional
        Called with the number of records seen.

    Returns
    -------
    samples : list of Sample
        The good ones, in order.
    report : DataReport
        Counts and faults.
    """
    samples: list[Sample] = []
    report, seen = DataReport(), dict[Path, str | None]()
    for number, (name, found) in enumerate(records, 1):
        reason = found if isinstance(found, str) else _fault(found, depth, seen)
        if isinstance(found, str) or reason is not None:
            report.broken.append((name, str(reason)))
        else:
            samples.append(found)
        if progress is not None:
            progress(number)
    report.good, report.kinds = len(samples), dict(Counter(sample.kind for sample in samples))
    return samples, report


def load_samples(
    sources: Sequence[DataSource],
    depth: Depth = "files",
    on_broken: Policy = "skip",
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Sample], DataReport]:
    """All samples of several annotation files, checked.

    Parameters
    ----------
    sources : sequence of DataSource
        Files; repeated sources give their samples several times.
    depth, on_broken : str
        See `TrainConfig`.
    progress : callable, optional
        Called with the number of records seen.

    Returns
    -------
    samples : list of Sample
        In the order of the files.
    report : DataReport
        About all of them.

    Raises
    ------
    TrainingError
        If records are broken and ``on_broken`` is ``"stop"``, or if none is left.
    """
    samples: list[Sample] = []
    total = DataReport()
    for source in sources:
        found, report = check_records(read_records(source), depth, progress)
        samples += found * source.repeat
        total.good += report.good
        total.broken += report.broken
        total.kinds = dict(Counter(total.kinds) + Counter(report.kinds))
    if total.broken and on_broken == "stop":
        raise TrainingError(f"The data check failed: {total}. Correct them, or set on_broken to skip.")
    if not samples:
        raise TrainingError(f"There is nothing to train on: {total}.")
    if total.broken:
        logger.warning("Broken records are left out: %s", total)
    return samples, total


def _fault(sample: Sample, depth: Depth, seen: dict[Path, str | None]) -> str | None:
    """What is wrong with the files of a sample, None if nothing; every file is looked at once."""
    if depth == "none":
        return None
    for path in (*sample.images, *sample.videos):
        if not isinstance(path, Path):
            continue
        if path not in seen:
            seen[path] = _file_fault(path, depth, is_image=path in sample.images)
        if seen[path] is not None:
            return seen[path]
    return None


def _file_fault(path: Path, depth: Depth, is_image: bool) -> str | None:
    if not path.exists():
        return f"{path} does not exist"
    if depth == "decode":
        from tokensieve.train.frames import read_frames
        from tokensieve.video import read_clip

        try:
            if is_image:
                read_clip(path)
            else:
                read_frames(path, 1)
        except TokensieveError as error:
            return str(error)
    return None
