"""Prompts of the evaluation protocols, in words of our own."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokensieve.evaluate.questions import EvaluationError, Question, Subtitle

__all__ = ["PROTOCOLS", "Protocol", "protocol_for"]


@dataclass(frozen=True)
class Protocol:
    """How a question is put.

    Attributes
    ----------
    system : str
        System text; empty for none.
    user : str
        With ``{question}``, ``{options}`` and ``{subtitles}``.
    prime : str
        Beginning of the answer that the model goes on from.
    option : str
        One option, with ``{letter}`` and ``{text}``.
    list_options : bool
        Write the options as one list in brackets instead of one per line.
    frames : int
        Frames of a video.
    new_tokens : int
        Longest answer.
    """

    system: str = ""
    user: str = "{question}"
    prime: str = ""
    option: str = "({letter}) {text}"
    list_options: bool = False
    frames: int = 32
    new_tokens: int = 200

    def options(self, question: Question) -> str:
        """Options as they are written."""
        letters = string.ascii_uppercase
        written = [
            self.option.format(letter=letters[number], text=text) for number, text in enumerate(question.options)
        ]
        return str(written) if self.list_options else "\n".join(written)

    def text(self, question: Question, shown: Sequence[Subtitle] = ()) -> str:
        """Words of the user, with the subtitles that belong to the sampled frames."""
        lines = "\n".join(subtitle.text for subtitle in shown)
        said = f"Subtitles of the video:\n{lines}\n" if lines else ""
        return self.user.format(question=question.question, options=self.options(question), subtitles=said)

    def for_text_tower(self, question: Question) -> str:
        """What PPLLaVA's text tower reads: the question and its options, no instruction and no subtitles."""
        return "\n".join(filter(None, (question.question, self.options(question))))


PROTOCOLS: dict[str, Protocol] = {
    "open": Protocol(
        user=(
            "These are key frames of one video in the order of time. Answer the question about it in a few words "
            "first, and then name the events, people and objects that matter for the answer.\n{question}"
        ),
        prime="In the video,",
    ),
    "vcg": Protocol(new_tokens=512),
    "mvbench": Protocol(
        system=(
            "Watch the video closely: what happens and in which order, how people and things look, move and stand to "
            "each other. Then choose the best of the options for the question."
        ),
        user="Question: {question}\nOptions:\n{options}\nReply with the best option alone.",
        prime="Best option: (",
        new_tokens=8,
    ),
    "videomme": Protocol(
        system="Answer the question about the video and its subtitles with the letter of one option, and nothing else.",
        user="{subtitles}{question}\n{options}\nWhich letter is right?",
        prime="The best option is: (",
        option="{letter}. {text}",
        list_options=True,
        new_tokens=8,
    ),
}
"""By task; `replace` a field to word a prompt differently."""


def protocol_for(task: str, **changes: object) -> Protocol:
    """Protocol of a task, with fields changed.

    Raises
    ------
    EvaluationError
        If the task or a field is unknown.
    """
    name = "open" if task == "activitynet" else task
    if name not in PROTOCOLS:
        raise EvaluationError(f"The task {task!r} has no protocol; choose one of {', '.join(PROTOCOLS)}.")
    try:
        return replace(PROTOCOLS[name], **changes)  # type: ignore[arg-type]
    except TypeError as error:
        raise EvaluationError(f"A protocol has no such field ({error}).") from error
