"""From samples to model inputs and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokensieve.train.config import QuestionText, TrainingError
from tokensieve.train.records import Sample, Turn

__all__ = ["IGNORED", "Collator"]

IGNORED = -100
"""Label of tokens that no loss is taken of."""

_CUT = "\u2063"
"""Stands between the pieces of a conversation while placeholders are written; no text may hold it."""


@dataclass
class Collator:
    """Makes one batch of samples that may show videos, images, several images, or nothing.

    A conversation is written by the chat template and tokenised piece by piece, split where an answer begins and
    ends, so that the tokens of a prompt are those of use. Only answers and their end count in the loss.

    Parameters
    ----------
    processor : PPLlavaProcessor
        Of the model.
    question_text : str
        ``"question"``: the text tower reads what the user says. ``"conversation"``: the whole conversation with
        roles, placeholder and answers, as the published models were trained. Preference pairs always use the
        question.
    max_length : int, optional
        Cut sequences behind so many tokens.
    pairs : bool
        Return preferred answers in the first half of the batch and the others in the second.
    """

    processor: Any
    question_text: QuestionText = "question"
    max_length: int | None = None
    pairs: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Model inputs with ``labels``; rows are padded behind.

        Raises
        ------
        TrainingError
            If a sample has no answer, or ``max_length`` cuts into what it shows.
        """
        if self.pairs:
            rows = [(sample, sample.chosen) for sample in samples] + [(sample, sample.rejected) for sample in samples]
        else:
            rows = [(sample, sample.chosen) for sample in samples]
        pieces = [self._pieces(sample, answer) for sample, answer in rows]
        images = [list(sample.images) for sample, _ in rows]
        videos = [clip for sample, _ in rows for clip in sample.videos]
        written, data = self.processor.expand([_CUT.join(row) for row in pieces], images, videos or None)
        tokens = [self._tokens(text.split(_CUT), sample) for text, (sample, _) in zip(written, rows, strict=True)]
        data |= self.processor.read_questions([self._question(sample, answer) for sample, answer in rows])
        return {**_pad(tokens, self.processor.tokenizer.pad_token_id), **data}

    def _pieces(self, sample: Sample, answer: str | None) -> list[str]:
        """Prompt, answer, prompt, answer, ... as the chat template writes them."""
        messages = self._messages(sample, answer)
        pieces, written = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], True)
            whole = self._render(messages[: number + 1], False)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise TrainingError(
                    "The chat template changes earlier turns when later ones follow, so that answers cannot be told "
                    "from prompts; give the processor a template such as tokensieve's VICUNA or CHATML."
                )
            pieces += [prompt[len(written) :], whole[len(prompt) :]]
            written = whole
        if not pieces or any(_CUT in piece for piece in pieces):
            raise TrainingError(
                f"{sample.name or 'A sample'} has no answer, or holds the character U+2063; correct it."
            )
        return pieces

    def _messages(self, sample: Sample, answer: str | None) -> list[dict[str, Any]]:
        turns = [*sample.turns, Turn("assistant", answer)] if answer is not None else list(sample.turns)
        shown = [{"type": "image"} for _ in sample.images] + [{"type": "video"} for _ in sample.videos]
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [{"type": "text", "text": turn.text}]
            if turn.role == "user" and shown:
                content, shown = [*shown, *content], []
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))

    def _question(self, sample: Sample, answer: str | None) -> str:
        """What the text tower reads."""
        if self.question_text == "conversation" and not self.pairs:
            return self._render(self._messages(sample, answer), False)
        return " ".join(turn.text for turn in sample.turns if turn.role == "user")

    def _tokens(self, pieces: Sequence[str], sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation."""
        tokenizer = self.processor.tokenizer
        ids: list[int] = []
        labels: list[int] = []
        if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None:
            ids, labels = [tokenizer.bos_token_id], [IGNORED]
        for number, piece in enumerate(pieces):
            part = tokenizer(piece, add_special_tokens=False)["input_ids"]
            # An answer ends with its end token; what a template writes behind it is no part of it.
            end = part.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in part else len(part)
            answered = end if number % 2 else 0
            ids += part
            labels += part[:answered] + [IGNORED] * (len(part) - answered)
        visual = (self.processor.image_token_id, self.processor.video_token_id)
        if self.max_length is not None and len(ids) > self.max_length:
            if any(token in visual for token in ids[self.max_length :]):
                raise TrainingError(
                    f"{sample.name or 'A sample'} takes {len(ids)} tokens, and max_length {self.max_length} cuts into "
                    "its visual tokens; raise max_length or take fewer frames."
                )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        return ids, [IGNORED if token in visual else label for token, label in zip(ids, labels, strict=True)]


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Rows of ids and labels as tensors ``[B, L]`` with their mask."""
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows]),
    }
