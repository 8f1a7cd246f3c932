"""Accuracies and scores from answers and verdicts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from tokensieve.evaluate.questions import EvaluationError

__all__ = ["chosen_letter", "score_choices", "score_verdicts"]


def chosen_letter(response: str, options: Sequence[str] = ()) -> str | None:
    """Letter that an answer begins with, or that of the only option it names word for word.

    ``"(B) a dog"``, ``"B."``, ``"b"`` and ``"B) ..."`` choose B; a word such as ``"Because"`` chooses nothing.
    """
    match = re.match(r"\W*([A-Za-z])(?![A-Za-z])", response)
    if match is not None:
        return match.group(1).upper()
    named = [number for number, text in enumerate(options) if text and text.lower().strip(". ") in response.lower()]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


def score_choices(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of multiple-choice answers.

    Parameters
    ----------
    rows : iterable of dict
        Lines of an answer file.

    Returns
    -------
    dict
        ``accuracy`` over all questions, ``groups`` (accuracy and count of each), ``mean_of_groups`` (what MVBench
        reports), and ``unreadable``, the number of answers without a letter, which count as wrong.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    unreadable = 0
    for row in rows:
        letter = chosen_letter(str(row["response"]), row.get("options") or ())
        unreadable += letter is None
        right[str(row.get("group", ""))].append(letter == str(row["answer"]).strip().upper())
    if not right:
        raise EvaluationError("There are no answers to score.")
    groups = {name: {"accuracy": _mean(marks), "count": len(marks)} for name, marks in sorted(right.items())}
    every = [mark for marks in right.values() for mark in marks]
    return {
        "accuracy": _mean(every),
        "count": len(every),
        "mean_of_groups": _mean([entry["accuracy"] for entry in groups.values()]),
        "groups": groups,
        "unreadable": unreadable,
    }


def score_verdicts(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy and mean score of judged answers, by axis where there are axes.

    Returns
    -------
    dict
        Per axis (``"answer"`` for right or wrong) ``score``, ``count``, ``unjudged`` and, where the judge said yes or
        no, ``accuracy``; ``mean_score`` over the axes. Answers without a verdict are left out and counted.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row.get("axis") or "answer"].append(row)
    if not found:
        raise EvaluationError("There are no verdicts to score.")
    axes: dict[str, dict[str, Any]] = {}
    for axis, verdicts in found.items():
        judged = [row for row in verdicts if row["score"] is not None]
        entry: dict[str, Any] = {"count": len(judged), "unjudged": len(verdicts) - len(judged)}
        if judged:
            entry["score"] = _mean([row["score"] for row in judged])
        if judged and all(row.get("pred") for row in judged):
            entry["accuracy"] = _mean([row["pred"] == "yes" for row in judged])
        axes[axis] = entry
    scored = [entry["score"] for entry in axes.values() if "score" in entry]
    return {"axes": axes, "mean_score": _mean(scored) if scored else None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
