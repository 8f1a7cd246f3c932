"""Judging open answers by a language model behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tokensieve.evaluate.questions import EvaluationError

__all__ = ["AXES", "Judge", "judge_all", "judge_prompt"]

AXES: dict[str, str] = {
    "correctness": "Is what the answer says true to the reference, without mistakes or things made up?",
    "detail": "Does the answer cover the important points of the reference, and as precisely?",
    "context": "Does the answer grasp what the video as a whole is about, as the reference does?",
    "temporal": "Does the answer get the order and the timing of what happens right, as the reference does?",
    "consistency": "Do both answers to the same question in two wordings say the same, in line with the reference?",
}
"""Axes of VCG-Bench and what each asks of an answer."""

_GROUP_AXES = {
    "generic": ("correctness", "detail", "context"),
    "temporal": ("temporal",),
    "consistency": ("consistency",),
}
_LARGEST_REPLY = 2**20


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect becomes an error."""
        return None


_OPENER = urllib.request.build_opener(_StayHere)


@dataclass
class Judge:
    """A chat model that grades answers.

    Parameters
    ----------
    url : str
        Base of an OpenAI-compatible service, such as ``http://127.0.0.1:8000/v1``.
    model : str
        Its name there.
    key : str, optional
        Sent as bearer token.
    timeout : float
        Seconds per request.
    attempts : int
        Requests per verdict before it is given up.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    attempts: int = 3

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise EvaluationError(
                f"The judge's address {self.url!r} is no http(s) URL; give for example http://host/v1."
            )

    def ask(self, prompt: str) -> str:
        """Reply to one prompt.

        Raises
        ------
        EvaluationError
            If the service cannot be reached, refuses, or does not reply in the format of OpenAI.
        """
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with _OPENER.open(request, timeout=self.timeout) as reply:
                data = json.loads(reply.read(_LARGEST_REPLY))
            return str(data["choices"][0]["message"]["content"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EvaluationError(
                f"The judge at {self.url} gave no usable reply ({error}); check address and model."
            ) from error

    def verdict(self, prompt: str) -> dict[str, Any] | None:
        """The JSON object of a reply with ``score`` from 0 to 5 (and ``pred``); None if none came in all attempts.

        Raises
        ------
        EvaluationError
            If not even one request was answered.
        """
        failure: EvaluationError | None = None
        for _ in range(self.attempts):
            try:
                found = _parse(self.ask(prompt))
            except EvaluationError as error:
                failure = error
                continue
            failure = None
            if found is not None:
                return found
        if failure is not None:
            raise failure
        return None


def _parse(reply: str) -> dict[str, Any] | None:
    match = re.search(r"\{[^{}]*\}", reply)
    if match is None:
        return None
    text = match.group()
    try:
        # Some models write Python instead of JSON.
        found = json.loads(text if '"' in text else text.replace("'", '"'))
        score = float(found["score"])
    except (ValueError, KeyError, TypeError):
        return None
    pred = str(found.get("pred", "")).strip().lower()
    if not 0 <= score <= 5 or pred not in ("", "yes", "no"):
        return None
    return {"score": score} | ({"pred": pred} if pred else {})


def judge_prompt(row: dict[str, Any], axis: str | None = None, other: str | None = None) -> str:
    """What the judge is asked about one answer.

    Parameters
    ----------
    row : dict
        ``question``, ``answer`` (the reference) and ``response``.
    axis : str, optional
        Of VCG-Bench; None asks whether the answer is right.
    other : str, optional
        Answer to the second wording, for consistency.
    """
    lines = [
        "Grade an answer about a video that you cannot see. Wording does not matter, meaning does.",
        f"Question: {row['question']}",
        f"Reference answer: {row['answer']}",
        f"Answer to grade: {row['response']}",
    ]
    if other is not None:
        lines.append(f"Answer of the same system to another wording of the question: {other}")
    if axis is None:
        lines.append(
            'Reply with JSON alone: {"pred": "yes" or "no" (is it right?), "score": whole number from 0 to 5}.'
        )
    else:
        lines += [AXES[axis], 'Reply with JSON alone: {"score": whole number from 0 (not at all) to 5 (fully)}.']
    return "\n".join(lines)


def judge_all(
    judge: Judge, rows: Sequence[dict[str, Any]], progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """Verdicts on all open answers.

    Parameters
    ----------
    judge : Judge
        Who grades.
    rows : sequence of dict
        Lines of an answer file. Groups of VCG-Bench are graded by axis.
    progress : callable, optional
        Called with the number of answers done.

    Returns
    -------
    list of dict
        ``id``, ``axis`` (None for right or wrong), ``score`` and ``pred``; both None where the judge gave no verdict.
    """
    by_id = {row["id"]: row for row in rows}
    found = []
    for number, row in enumerate(rows, 1):
        group = row.get("group")
        axes: tuple[str | None, ...] = _GROUP_AXES.get(group, (None,)) if isinstance(group, str) else (None,)
        second = None
        if group == "consistency":
            if not row["id"].endswith(".1"):
                continue
            pair = by_id.get(row["id"][:-1] + "2")
            second = None if pair is None else str(pair["response"])
        for axis in axes:
            verdict = judge.verdict(judge_prompt(row, axis, second)) or {}
            found.append({"id": row["id"], "axis": axis, "score": verdict.get("score"), "pred": verdict.get("pred")})
        if progress is not None:
            progress(number)
    return found
