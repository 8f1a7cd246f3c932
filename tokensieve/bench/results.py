"""From finished units to a table: accuracy, what was kept of it, tests, tokens, time and arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tokensieve.bench.data import Item, by_clip
from tokensieve.bench.journal import Journal, Unit
from tokensieve.bench.settings import FULL, RANDOM, Setting
from tokensieve.bench.statistics import Estimate, accuracy, holm, kept_share, mcnemar, sign_flip
from tokensieve.errors import BenchError

__all__ = ["Comparison", "Results", "Row", "summarise"]


@dataclass(frozen=True)
class Comparison:
    """A method against a reference on the same questions.

    Attributes
    ----------
    reference
        Key of the other setting.
    difference
        Accuracy minus that of the reference.
    lost, won
        Questions that only the reference answers, and that only the method answers.
    mcnemar
        p of McNemar's exact test, which takes questions for independent.
    p
        p of the exact permutation test over clips.
    p_holm
        The same, corrected for all comparisons with references of this kind in the benchmark.
    """

    reference: str
    difference: float
    lost: int
    won: int
    mcnemar: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Row:
    """Results of one setting.

    Attributes
    ----------
    setting, method, retention
        Key, notation, and the share of visual tokens asked for.
    control
        Whether the method is a control.
    questions, clips
        How many were asked.
    accuracy
        Over all questions.
    families
        By family.
    kept
        Right answers as a share of those of the full model.
    against_full, against_random
        Paired comparisons; None where there is nothing to compare with.
    tokens
        Visual tokens per question: ``uncompressed``, ``entered`` the LLM, ``average`` per layer, ``last`` layer.
    milliseconds
        Medians over clips, per question: ``compress``, ``prefill``, ``llm`` (both), ``decode``; ``encode`` per clip.
    flops
        Operations per question: ``prefill`` and ``encoder``, and as a share of the full model's; None if not known.
    own_encoding
        Whether the method changes what the encoder computes.
    on_front
        Whether no other setting is at least as accurate in less LLM time.
    """

    setting: str
    method: str
    retention: float | None
    control: bool
    questions: int
    clips: int
    accuracy: Estimate
    families: dict[str, Estimate]
    kept: Estimate | None
    against_full: Comparison | None
    against_random: Comparison | None
    tokens: dict[str, float]
    milliseconds: dict[str, float]
    flops: dict[str, float | None]
    own_encoding: bool
    on_front: bool = False

    @property
    def achieved(self) -> float:
        """Visual tokens per LLM layer as a share of the uncompressed number."""
        return self.tokens["average"] / self.tokens["uncompressed"] if self.tokens["uncompressed"] else 1.0


@dataclass(frozen=True)
class Results:
    """A finished benchmark.

    Attributes
    ----------
    facts
        Model, dataset, and how it was run.
    families
        Name -> questions and accuracy of a guess.
    rows
        The full model first, then every setting in the order asked for.
    refused
        Setting -> why it did not run or has no result.
    """

    facts: dict[str, Any]
    families: dict[str, dict[str, float]]
    rows: list[Row]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def full(self) -> Row:
        """The full model."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "facts": self.facts,
            "families": self.families,
            "rows": [{**asdict(row), "achieved": row.achieved} for row in self.rows],
            "refused": self.refused,
        }


def summarise(
    items: Sequence[Item], settings: Sequence[Setting], journal: Journal, facts: Mapping[str, Any]
) -> Results:
    """Results of the units in a journal.

    Raises
    ------
    BenchError
        When the full model itself has no result.
    """
    grouped = by_clip(items)
    refused = dict(journal.refused)
    units: dict[Setting, list[Unit]] = {}
    for setting in settings:
        if setting.key in refused:
            continue
        found = [journal.units[setting.key, clip] for clip in grouped]
        failed = [unit for unit in found if "error" in unit]
        if failed:
            refused[setting.key] = f"failed on {len(failed)} of {len(found)} clips: {failed[0]['error']}"
        else:
            units[setting] = found
    full = Setting(FULL)
    if full not in units:
        raise BenchError(f"The full model gives no answers: {refused.get(FULL, 'it was not run')}")
    tally = {setting: _Tally.of(items, found) for setting, found in units.items()}
    rows = [_row(setting, units[setting], tally[setting], tally[full]) for setting in units]
    rows = _compared(rows, list(units), tally)
    chance = _families(items)
    return Results({**facts, "questions": len(items), "clips": len(grouped)}, chance, _with_front(rows), refused)


@dataclass(frozen=True)
class _Tally:
    """Which questions a setting answers: id -> right, and ids by clip and by family."""

    right: dict[str, bool]
    clips: dict[str, list[str]]
    families: dict[str, dict[str, list[str]]]

    @classmethod
    def of(cls, items: Sequence[Item], units: Sequence[Unit]) -> _Tally:
        right = {key: bool(one["right"]) for unit in units for key, one in unit["answers"].items()}
        clips = {clip: [item.id for item in some] for clip, some in by_clip(items).items()}
        families: dict[str, dict[str, list[str]]] = {}
        for item in items:
            families.setdefault(item.family, {}).setdefault(item.clip, []).append(item.id)
        return cls(right, clips, families)

    def counts(self, clips: Mapping[str, Sequence[str]]) -> list[tuple[int, int]]:
        """Right answers and questions of every clip."""
        return [(sum(self.right[key] for key in keys), len(keys)) for keys in clips.values()]


def _row(setting: Setting, units: Sequence[Unit], mine: _Tally, full: _Tally) -> Row:
    counts = mine.counts(mine.clips)
    pairs = [
        (float(right), float(theirs)) for (right, _), (theirs, _) in zip(counts, full.counts(full.clips), strict=True)
    ]
    return Row(
        setting=setting.key,
        method=setting.method,
        retention=setting.retention,
        control=setting.is_full or all(cls.fidelity == "control" for cls in setting.classes),
        questions=len(mine.right),
        clips=len(counts),
        accuracy=accuracy(counts),
        families={family: accuracy(mine.counts(clips)) for family, clips in mine.families.items()},
        kept=kept_share(pairs),
        against_full=None,
        against_random=None,
        tokens=_tokens(units),
        milliseconds=_milliseconds(units),
        flops=_flops(units),
        own_encoding=any(unit["own_encoding"] for unit in units),
    )


def _tokens(units: Sequence[Unit]) -> dict[str, float]:
    """Means over questions."""
    number = sum(len(unit["answers"]) for unit in units)
    return {
        name: sum(unit["tokens"][name] * len(unit["answers"]) for unit in units) / number for name in units[0]["tokens"]
    }


def _milliseconds(units: Sequence[Unit]) -> dict[str, float]:
    """Medians over clips."""

    def median(of: Callable[[Mapping[str, float]], float]) -> float:
        return 1e3 * statistics.median(of(unit["seconds"]) for unit in units)

    stages = {stage: median(lambda seconds, stage=stage: seconds[stage]) for stage in units[0]["seconds"]}  # type: ignore[misc]
    return {**stages, "llm": median(lambda seconds: seconds["compress"] + seconds["prefill"])}


def _flops(units: Sequence[Unit]) -> dict[str, float | None]:
    """Means over clips, and shares of the full model's."""
    found: dict[str, float | None] = {}
    for stage in ("prefill", "encoder"):
        after, before = ([unit["flops"][name] for unit in units] for name in (stage, f"{stage}_full"))
        known = None not in after and None not in before
        found[stage] = sum(after) / len(units) if known else None
        found[f"{stage}_share"] = sum(after) / sum(before) if known else None
    return found


def _compared(rows: Sequence[Row], settings: Sequence[Setting], tally: Mapping[Setting, _Tally]) -> list[Row]:
    """Rows with their paired comparisons, corrected over all rows of the same kind of reference."""
    by_key = dict(zip([row.setting for row in rows], settings, strict=True))
    controls = [row for row in rows if row.method == RANDOM]
    against: dict[str, dict[str, Comparison]] = {"against_full": {}, "against_random": {}}
    for row in rows[1:]:
        mine = tally[by_key[row.setting]]
        against["against_full"][row.setting] = _comparison(rows[0], mine, tally[by_key[rows[0].setting]])
        if controls and row.method != RANDOM:
            control = _nearest(row, controls)
            against["against_random"][row.setting] = _comparison(control, mine, tally[by_key[control.setting]])
    for name, found in against.items():
        adjusted = holm({key: one.p for key, one in found.items()})
        against[name] = {key: replace(one, p_holm=adjusted[key]) for key, one in found.items()}
    return [
        replace(
            row,
            against_full=against["against_full"].get(row.setting),
            against_random=against["against_random"].get(row.setting),
        )
        for row in rows
    ]


def _nearest(row: Row, controls: Sequence[Row]) -> Row:
    """The random control of the same retention; for methods that state their own, of the nearest achieved share."""
    same = [control for control in controls if control.retention == row.retention]
    return same[0] if same else min(controls, key=lambda control: abs(control.achieved - row.achieved))


def _comparison(reference: Row, mine: _Tally, theirs: _Tally) -> Comparison:
    lost = sum(theirs.right[key] and not mine.right[key] for key in mine.right)
    won = sum(mine.right[key] and not theirs.right[key] for key in mine.right)
    differences = [
        ours - other for (ours, _), (other, _) in zip(mine.counts(mine.clips), theirs.counts(theirs.clips), strict=True)
    ]
    chance = sign_flip(differences)
    return Comparison(
        reference=reference.setting,
        difference=(won - lost) / len(mine.right),
        lost=lost,
        won=won,
        mcnemar=mcnemar(lost, won),
        p=chance,
        p_holm=chance,
    )


def _with_front(rows: Sequence[Row]) -> list[Row]:
    """Mark the Pareto front of accuracy against LLM time."""
    best, front = -1.0, set()
    for row in sorted(rows, key=lambda row: (row.milliseconds["llm"], -row.accuracy.value)):
        if row.accuracy.value > best:
            best = row.accuracy.value
            front.add(row.setting)
    return [replace(row, on_front=row.setting in front) for row in rows]


def _families(items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Questions and accuracy of a guess by family."""
    found: dict[str, dict[str, float]] = {}
    for family in dict.fromkeys(item.family for item in items):
        mine = [item for item in items if item.family == family]
        found[family] = {"questions": len(mine), "chance": sum(item.chance for item in mine) / len(mine)}
    return found
