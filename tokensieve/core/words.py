"""Signals that come from the words of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.signals import SIGNALS, SignalRequest
from tokensieve.errors import HostError, SignalError
from tokensieve.hosts.base import Host
from tokensieve.pairing import Question, TextPair, find_question, find_tokenizer, resolve_pair

__all__ = ["PromptWords", "pair_for", "prompt_requests"]


def prompt_requests(method: Any, facts: Any) -> list[str]:
    """Names of the prompt signals that a method asks for."""
    return [text for text in method.signals(facts) if text.startswith("prompt.")]


def pair_for(base: nn.Module, host: Host, methods: Sequence[Any], facts: Any) -> TextPair | None:
    """The text tower that the methods need, loaded and checked; None where none of their signals needs it.

    Models without weights (on the meta device), of which only the structure is asked, load none.

    Raises
    ------
    SignalError
        If none is known for the host's tower, the named one does not fit it, or it is of the wrong kind.
    HostError
        If it cannot be loaded.
    """
    if next(host.tower_module(base).parameters()).is_meta:
        return None
    for method in methods:
        kinds = [SIGNALS[name].pair for name in _names(method.signals(facts)) if name in SIGNALS and SIGNALS[name].pair]
        if kinds:
            pair = resolve_pair(host.tower_module(base), getattr(method, "text_tower", None))
            if any(pair.kind not in accepted for accepted in kinds):
                raise SignalError(f"{method.name} needs a text tower of another kind than {pair.kind}.")
            return pair
    return None


class PromptWords:
    """Gives every prompt row of a forward pass the prompt signals that a method asked for.

    Parameters
    ----------
    model
        The model as the user holds it; says which checkpoint its tokenizer is of.
    base
        The composite model without head.
    host
        Its family.
    method
        The method that asks, with its options ``question`` and ``tokenizer``.
    requests
        Prompt signals.
    pair
        Text tower, where a signal needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Any,
        host: Host,
        method: Any,
        requests: Sequence[str],
        pair: TextPair | None,
    ) -> None:
        self.model, self.base, self.requests, self.pair = model, base, list(requests), pair
        self.given: str | None = getattr(method, "question", None)
        self._named = getattr(method, "tokenizer", None)
        places = (host.placeholder_id(base, "image"), host.placeholder_id(base, "video"))
        self._visual = {number for number in places if number is not None}
        self._ids: Tensor | None = None
        self._kept: dict[tuple[str, str], Tensor] = {}
        if pair is not None and any(SIGNALS[name].pair for name in self.requests):
            # A text tower without tokenizer is better met before the model runs; this raises when there is none.
            _ = pair.tokenizer

    def begin(self, ids: Tensor) -> None:
        """Take the token ids [B, L] of a forward pass."""
        self._ids = ids.cpu()
        self._kept = {}

    def row(self, row: int) -> dict[str, Tensor]:
        """Signals of one prompt row, by request; rows that ask the same share them.

        Raises
        ------
        HostError
            If the prompt asks nothing, or there is no tokenizer to read it with.
        """
        if not self.requests:
            return {}
        question = self._question(row) if set(self.requests) - {"prompt.newline"} else None
        return {name: self._signal(name, question) for name in self.requests}

    def text(self, row: int) -> str:
        """Words of the question of one prompt row."""
        return self._question(row).text

    def _question(self, row: int) -> Question:
        if self.given is not None:
            ids = torch.empty(0, dtype=torch.long)
            if "prompt.question_words" in self.requests:
                words = self._words()
                ids = words([self.given], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            return Question(self.given.strip(), ids[:0], ids)
        if self._ids is None:
            raise HostError("The question cannot be read without input_ids; give it as question=....")
        return find_question(self._tokenizer(), self._ids[row], self._visual)

    def _signal(self, name: str, question: Question | None) -> Tensor:
        key = (name, "" if question is None else question.text)
        if key not in self._kept:
            self._kept[key] = self._newline() if question is None else self._make(name, question)
        return self._kept[key]

    def _make(self, name: str, question: Question) -> Tensor:
        if name == "prompt.newline":
            return self._newline()
        if name == "prompt.question_words":
            return self._embedded(question.ids)
        assert self.pair is not None
        if name == "prompt.similarity_scale":
            return torch.tensor(self.pair.logit_scale)
        make: dict[str, Callable[[str], Tensor]] = {
            "prompt.question_embedding": self.pair.embed_question,
            "prompt.question_segments": self.pair.embed_segments,
            "prompt.question_last_state": self.pair.last_state,
        }
        # The released code of the method that reads the last position cuts the prompt at its first line break.
        words = question.text.splitlines()[0] if name == "prompt.question_last_state" else question.text
        return make[name](words)

    def _newline(self) -> Tensor:
        """Embedding of a line break [D]; of the last token where several spell it, [0] where none does."""
        ids = self._words()("\n", add_special_tokens=False)["input_ids"]
        return self._embedded(torch.tensor(ids[-1:]))[0] if ids else torch.empty(0)

    def _embedded(self, ids: Tensor) -> Tensor:
        table = self.base.get_input_embeddings()
        with torch.no_grad():
            embedded: Tensor = table(ids.to(table.weight.device))
        return embedded

    def _tokenizer(self) -> Any:
        return find_tokenizer(self._named, self.model)

    def _words(self) -> Any:
        found = self._tokenizer()
        return getattr(found, "tokenizer", found)


def _names(requests: Sequence[str]) -> list[str]:
    return [SignalRequest.parse(text).name for text in requests]
