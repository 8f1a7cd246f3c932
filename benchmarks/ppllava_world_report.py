"""Tables of `ppllava_world`: accuracy with intervals, families, and paired tests at equal tokens."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import machine, show, write
from tokensieve.bench.statistics import accuracy, mcnemar, sign_flip
from tokensieve.world.items import WorldItem
from tokensieve.world.words import FAMILIES

__all__ = ["Answered", "report"]

AVERAGE = "average"
GROUPS = {
    "a place": ("attributes", "existence", "reading", "spatial"),
    "a moment": ("motion", "order", "moment", "one-frame", "two-places"),
}
"""Families whose answer lies at a place or at a moment of the clip: all but counting, which asks for the whole."""

TESTS = ("against average", "McNemar p", "p by clip")
COLUMNS = ("model", "fewer", "tokens", "before training", "accuracy", "95 %", *TESTS)


@dataclass(frozen=True)
class Answered:
    """Right and wrong answers of one model to the test questions with one window size."""

    model: str
    ratio: str
    trained: bool
    tokens: int
    right: tuple[bool, ...]


def _fingerprint(folder: Path) -> str:
    """First digits of the SHA-256 of a model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def _clips(test: Sequence[WorldItem], places: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(test[place].clip, []).append(place)
    return found


def _against(test: Sequence[WorldItem], places: Sequence[int], one: Answered, other: Answered) -> list[str]:
    """Difference to another model on the same questions, with both tests."""
    won = sum(one.right[place] and not other.right[place] for place in places)
    lost = sum(other.right[place] and not one.right[place] for place in places)
    by_clip = [sum(one.right[place] - other.right[place] for place in clip) for clip in _clips(test, places).values()]
    return [f"{(won - lost) / len(places):+.1%}", f"{mcnemar(lost, won):.2g}", f"{sign_flip(by_clip):.2g}"]


def _table(
    test: Sequence[WorldItem], places: Sequence[int], found: Sequence[Answered], yardstick: str
) -> list[list[str]]:
    rows = []
    by_name = {(one.model, one.ratio, one.trained): one for one in found}
    for one in found:
        if not one.trained:
            continue
        marks = [(sum(one.right[p] for p in clip), len(clip)) for clip in _clips(test, places).values()]
        estimate = accuracy(marks)
        before = by_name.get((one.model, one.ratio, False))
        start = "" if before is None else f"{sum(before.right[p] for p in places) / len(places):.1%}"
        other = by_name.get((yardstick, one.ratio, True))
        tests = ["", "", ""] if other is None or other is one else _against(test, places, one, other)
        ratio = "1x" if one.model == "all tokens" else one.ratio
        shares = [f"{estimate.value:.1%}", f"{estimate.low:.1%} to {estimate.high:.1%}"]
        rows.append([one.model, ratio, str(one.tokens), start, *shares, *tests])
    return rows


def _families(test: Sequence[WorldItem], found: Sequence[Answered], guided: str) -> list[list[str]]:
    """Guided against average by family, at every window size."""
    rows = []
    by_name = {(one.model, one.ratio): one for one in found if one.trained}
    sets = {f"all about {name}": members for name, members in GROUPS.items()}
    for family, members in {**sets, **{family: (family,) for family in FAMILIES}}.items():
        places = [number for number, item in enumerate(test) if item.family in members]
        row = [family, str(len(places))]
        for ratio in ("18x", "9x", "4x"):
            one, other = by_name.get((guided, ratio)), by_name.get((AVERAGE, ratio))
            if one is None or other is None or not places:
                row += ["", "", ""]
                continue
            shares = [sum(mine.right[p] for p in places) / len(places) for mine in (other, one)]
            row += [*(f"{share:.0%}" for share in shares), _against(test, places, one, other)[1]]
        rows.append(row)
    return rows


def report(
    arguments: argparse.Namespace,
    test: Sequence[WorldItem],
    found: Sequence[Answered],
    long_names: Sequence[str],
    guided: str,
) -> None:
    """Print and write all tables.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of the benchmark.
    test : sequence of WorldItem
        Test questions.
    found : sequence of Answered
        What the models answered, before and after training.
    long_names : sequence of str
        Models that were asked with long prompts; the last one averages.
    guided : str
        Name of the guided model whose families are shown.
    """
    everything = list(range(len(test)))
    named = {family for members in GROUPS.values() for family in members}
    placed = [number for number in everything if test[number].family in named]
    short = [one for one in found if one.model not in long_names]
    long = [one for one in found if one.model in long_names]
    parts: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("Questions about a place or a moment", COLUMNS, _table(test, placed, short, AVERAGE)),
        ("All questions", COLUMNS, _table(test, everything, short, AVERAGE)),
    ]
    heads = [f"{ratio} {what}" for ratio in ("18x", "9x", "4x") for what in ("average", "guided", "p")]
    parts.append((f"By family: average and {guided}", ("family", "questions", *heads), _families(test, short, guided)))
    if long:
        title = "Prompts longer than the context of the text tower: questions about a place or a moment"
        parts.append((title, COLUMNS, _table(test, placed, long, long_names[-1])))
        if len(long_names) > 1:
            bare = long_names[1]
            columns: Sequence[str] = (*COLUMNS[:6], f"against '{bare}'", *COLUMNS[7:])
            parts.append(("The same, against the context as it was", columns, _table(test, placed, long, bare)))
    for part in parts:
        show(*part)
    keys = ("clips", "questions", "frames", "steps", "long_steps", "test_clips", "learning_rate")
    weights = {name: _fingerprint(getattr(arguments, name)) for name in ("pair", "base")}
    payload = {
        "machine": machine(),
        "weights": weights,
        "settings": {key: getattr(arguments, key) for key in keys},
        "questions": [{"id": item.id, "family": item.family} for item in test],
        "answers": [
            {"model": one.model, "fewer": one.ratio, "trained": one.trained, "tokens": one.tokens}
            | {"right": "".join("01"[mark] for mark in one.right)}
            for one in found
        ],
    }
    notes = (
        f"{len(test)} questions about {len(_clips(test, everything))} clips of {arguments.frames} frames that no "
        f"training has seen; {arguments.steps} steps of 4 clips with up to {arguments.questions} questions each.",
        f"start: weights with the SHA-256 {weights['pair']} (pair) and {weights['base']} (video LLM).",
        "before training: the same weights, pooled in this way without any training.",
        "95 %: Wilson's interval for the effective number of questions, as those about one clip are not independent.",
        "McNemar p: exact, on the same questions. p by clip: exact sign-flip test of the clips' differences.",
        *(f"about {name}: {', '.join(members)}." for name, members in GROUPS.items()),
        "all tokens: compared with average pooling at 18x.",
        "subsampled patches: the middle patch of every window. subsampled frames: whole frames, at least one.",
    )
    path = write(arguments.output, "ppllava_world", payload, "PPLLaVA trained on the bundled world", parts, notes)
    print(f"written: {path}")
