"""From tokens to text as they come, whole characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens one after the other.

    Text is held back while its last character is incomplete, and while it may be the beginning of a stop.

    Parameters
    ----------
    tokenizer
        Of the model; not shared with other threads.
    stop : sequence of str
        Texts that end the answer.

    Attributes
    ----------
    stopped : bool
        Whether a stop has been met; nothing comes after it.
    count : int
        Tokens so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped, self.count = False, 0
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._shown = 0
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; the text that can be shown now, possibly empty."""
        if self.stopped:
            return ""
        self.count += len(ids)
        self._ids += ids
        # The tokens already shown go along, since a tokenizer may join what it decodes together.
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED) or len(text) <= len(before):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[: self._shown])
        rest = self._decode(self._ids)[len(before) :]
        text = self._release(rest) + self._held
        self._held = ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, text: str) -> str:
        """Add text to what is held back and let go what no stop can begin with."""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
