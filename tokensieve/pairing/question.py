"""The question of a prompt: which of its tokens ask, and what they say."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import HostError

__all__ = ["Question", "find_question", "find_tokenizer"]

_MARKS = ("FIRSTQUESTION", "FIRSTANSWER", "LASTQUESTION")


@dataclass(frozen=True)
class Question:
    """What a prompt asks.

    Attributes
    ----------
    text
        Words of the question, without special tokens and without the words of the chat template.
    positions : Tensor [T]
        Its tokens in the prompt, ascending int64; empty where the question was given apart from the prompt.
    ids : Tensor [T]
        Token ids of the language model.
    """

    text: str
    positions: Tensor
    ids: Tensor


def find_question(tokenizer: Any, ids: Tensor, visual_ids: Collection[int]) -> Question:
    """The question in a prompt: the text behind the last visual token of the last user turn.

    Where the visuals stand behind the words of that turn, the words in front of them are the question. What the chat
    template adds in front of and behind the words of a turn is found by rendering it once.

    Parameters
    ----------
    tokenizer
        Processor or tokenizer of the model, with its chat template.
    ids : Tensor
        ``[L]`` token ids of one prompt, padding included.
    visual_ids
        Ids of image and video placeholders.

    Raises
    ------
    HostError
        If the prompt holds no words behind the template's own.
    """
    words = getattr(tokenizer, "tokenizer", tokenizer)
    head, tail = _frame(tokenizer)
    sequence = ids.tolist()
    added = {number for number, token in words.added_tokens_decoder.items() if token.special}
    special = added | set(words.all_special_ids) | set(visual_ids)
    end = _without_tail(words, sequence, special, tail)
    start = _turn_start(words, sequence[:end], visual_ids, head)
    seen = [place for place in range(start, end) if sequence[place] in visual_ids]
    spans = [(seen[-1] + 1, end), (start, seen[0])] if seen else [(start, end)]
    for first, last in spans:
        places = [place for place in range(first, last) if sequence[place] not in special]
        text = words.decode([sequence[place] for place in places]).strip()
        if text:
            places = _trimmed(words, sequence, places)
            positions = torch.tensor(places, dtype=torch.long)
            return Question(text, positions, ids.cpu()[positions])
    raise HostError("The prompt asks nothing: no words stand beside its pictures; give them as question=....")


def find_tokenizer(given: Any, model: Any) -> Any:
    """The tokenizer that built the prompts of a model.

    Parameters
    ----------
    given
        Processor or tokenizer object, or a folder or hub name; None takes the checkpoint that the model came from.
    model
        A Hugging Face model.

    Raises
    ------
    HostError
        If there is none.
    """
    if given is not None and not isinstance(given, str):
        return given
    name = given or getattr(model, "name_or_path", "") or ""
    if not name:
        raise HostError(
            "The model does not say which checkpoint it came from, so that there is no tokenizer to read its prompts "
            "with; give its processor as tokenizer=...."
        )
    return _load_tokenizer(str(name))


@lru_cache(maxsize=4)
def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from tokensieve.library_errors import brief_error, library_errors

    try:
        return AutoTokenizer.from_pretrained(name)
    except library_errors() as error:
        raise HostError(
            f"The tokenizer of {name} cannot be loaded to read prompts ({brief_error(error)}); give the model's "
            "processor as tokenizer=...."
        ) from error


def _frame(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes in front of every user turn and behind the last one, without outer blanks."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", ""
    from jinja2 import TemplateError

    for wrap in (lambda text: [{"type": "text", "text": text}], str):
        turns = [("user", _MARKS[0]), ("assistant", _MARKS[1]), ("user", _MARKS[2])]
        messages = [{"role": role, "content": wrap(text)} for role, text in turns]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            # Some templates take parts, some plain words; one that takes neither has no frame to know.
            continue
        if all(text.count(mark) == 1 for mark in _MARKS):
            first, rest = text.split(_MARKS[0])
            later, tail = rest.split(_MARKS[1])[1].split(_MARKS[2])
            return _shared_ending(first, later), tail.strip()
    return "", ""


def _shared_ending(first: str, later: str) -> str:
    """Last line of what both texts end with: the header of a turn, without a system message in front of it."""
    pairs = zip(reversed(first), reversed(later), strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    lines = first[len(first) - length :].strip().splitlines()
    return lines[-1].strip() if lines else ""


def _without_tail(words: Any, sequence: list[int], special: Collection[int], tail: str) -> int:
    """Where the words of the last turn end: in front of the template's own and of padding."""
    end = len(sequence)
    pad = words.pad_token_id
    while end and sequence[end - 1] == pad:
        end -= 1
    if tail:
        first = max(0, end - 4 * len(tail))
        for place in range(end, first - 1, -1):
            ending = words.decode(sequence[place:end]).strip()
            if len(ending) > len(tail) + 8:
                break
            if ending == tail:
                return place
    while end and sequence[end - 1] in special:
        end -= 1
    return end


def _turn_start(words: Any, sequence: list[int], visual_ids: Collection[int], header: str) -> int:
    """First token behind the last header of a user turn; 0 where the template has none."""
    if not header:
        return 0
    for place in range(len(sequence) - 1, -1, -1):
        # A header is spelled by at most as many tokens as it has letters.
        window = sequence[place : place + len(header) + 1]
        if window[0] not in visual_ids and words.decode(window).lstrip().startswith(header):
            return place + _covered(words, window, header)
    return 0


def _covered(words: Any, sequence: list[int], header: str) -> int:
    """Number of tokens that spell a header."""
    for count in range(1, len(sequence) + 1):
        if len(words.decode(sequence[:count]).strip()) >= len(header):
            return count
    return len(sequence)


def _trimmed(words: Any, sequence: list[int], places: list[int]) -> list[int]:
    """Places without those of blank tokens at either end."""
    while places and not words.decode([sequence[places[0]]]).strip():
        places = places[1:]
    while places and not words.decode([sequence[places[-1]]]).strip():
        places = places[:-1]
    return places
