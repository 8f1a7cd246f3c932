"""Asking a model: how a question is written, how its answer is taken, and when it counts as right."""

from __future__ import annotations

import inspect
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from tokensieve.bench.data import Item
from tokensieve.errors import BenchError, HostError

__all__ = ["PROMPTS", "PromptStyle", "answer", "check_style", "default_style", "is_right", "normalised", "write"]

PromptStyle = Literal["open", "letters"]
PROMPTS: tuple[PromptStyle, ...] = get_args(PromptStyle)

MOST_NEW_TOKENS = 8
"""Length of a free answer; candidates are single words or short phrases."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def default_style(items: Sequence[Item], model_config: Any = None) -> PromptStyle:
    """How to ask unless the user says.

    A model may state the style that it was trained with (``tokensieve_prompt`` in its configuration); otherwise letters
    where every question has candidates, and free answers elsewhere.
    """
    stated = getattr(model_config, "tokensieve_prompt", None)
    if stated in PROMPTS:
        return stated
    return "letters" if all(item.candidates for item in items) else "open"


def check_style(style: str, items: Sequence[Item]) -> PromptStyle:
    """The style itself, or a BenchError when it is unknown or does not fit the dataset."""
    if style not in PROMPTS:
        raise BenchError(f"There is no prompt style {style!r}; use {' or '.join(PROMPTS)}.")
    free = next((item for item in items if not item.candidates), None)
    if style == "letters" and free is not None:
        raise BenchError(f"The question {free.id} has no candidates to letter; use --prompt open.")
    return "letters" if style == "letters" else "open"


def write(item: Item, style: PromptStyle) -> str:
    """The question as the model reads it."""
    if style == "open":
        return item.question
    letters = string.ascii_uppercase[: len(item.candidates)]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, item.candidates, strict=True))
    return f"{item.question}\n{options}\nAnswer with the letter of the right option only."


def answer(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], items: Sequence[Item], style: PromptStyle
) -> list[str]:
    """Answers to a batch of prompts, one row per question.

    ``open``: greedy decoding of at most eight tokens. ``letters``: the candidate whose letter has the highest logit
    behind the prompt; nothing is decoded.

    Parameters
    ----------
    model : PreTrainedModel
        With or without methods attached.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    inputs : mapping
        Tensors on the model's device, padded on the left.
    items : sequence of Item
        What the rows ask.

    Raises
    ------
    HostError
        If the model computes NaN.
    """
    with torch.inference_mode():
        if style == "open":
            return _decoded(model, tokenizer, inputs)
        return _lettered(model, tokenizer, inputs, items)


def _decoded(model: Any, tokenizer: Any, inputs: Mapping[str, Any]) -> list[str]:
    produced = model.generate(
        **inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False, num_beams=1, logits_processor=[_FiniteLogits()]
    )
    new = produced[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


class _FiniteLogits:
    """Passes scores on; greedy decoding of NaN would look like an answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are, or a HostError."""
        if bool(torch.isnan(scores).any()):
            raise HostError("The model computes NaN; check its weights and the dtype (bfloat16 instead of float16).")
        return scores


def _lettered(model: Any, tokenizer: Any, inputs: Mapping[str, Any], items: Sequence[Item]) -> list[str]:
    limit = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(**inputs, use_cache=False, **limit).logits[:, -1]
    scores = _FiniteLogits()(inputs["input_ids"], logits.float())
    found = []
    for row, item in zip(scores, items, strict=True):
        letters = [letter_ids(tokenizer, letter) for letter in string.ascii_uppercase[: len(item.candidates)]]
        best = max(range(len(letters)), key=lambda place: float(row[letters[place]].max()))
        found.append(item.candidates[best])
    return found


def letter_ids(tokenizer: Any, letter: str) -> list[int]:
    """Tokens that begin an answer with a letter: alone and behind a blank.

    Raises
    ------
    BenchError
        When the tokenizer has none.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = []
    for text in (letter, f" {letter}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != unknown:
            found.append(int(ids[0]))
    if not found:
        raise BenchError(f"This model's tokenizer has no token for the letter {letter}; use --prompt open.")
    return list(dict.fromkeys(found))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks, compatibility forms unified."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(" " if unicodedata.category(character)[0] == "P" else character for character in plain)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def is_right(given: str, item: Item) -> bool:
    """Whether an answer equals the right one after `normalised`."""
    return normalised(given) == normalised(item.answer)
