"""Methods that need the text tower of the vision tower, or the words of the question."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tokensieve.core.method import Method
from tokensieve.errors import MethodError

__all__ = ["GuidedMethod", "PairedMethod", "ReadingMethod"]

_PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


@dataclass
class _NamingMethod(Method):
    """Options may be objects; they are shown by what they were loaded from."""

    def options(self) -> dict[str, object]:
        """Hyper-parameters as a plain dictionary; objects by the name of what they were loaded from."""
        found = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {name: value if isinstance(value, _PLAIN) else _named(value) for name, value in found.items()}


@dataclass
class PairedMethod(_NamingMethod):
    """Base of methods that ask for signals of the pair of towers that the host's vision tower was taken from.

    Parameters
    ----------
    text_tower
        The CLIP or SigLIP model whose vision half the host's tower is: folder, hub name, `CLIPModel`, `SiglipModel`
        or `tokensieve.pairing.TextPair`. None takes the one that is known for the geometry of the tower.
    """

    text_tower: Any = field(default=None, kw_only=True)


@dataclass
class ReadingMethod(_NamingMethod):
    """Base of methods that need the tokenizer of the language model.

    Parameters
    ----------
    tokenizer
        Processor or tokenizer that built the prompts (or folder or hub name of it); None loads that of the checkpoint
        the model came from.
    """

    tokenizer: Any = field(default=None, kw_only=True, repr=False)


@dataclass
class GuidedMethod(PairedMethod, ReadingMethod):
    """Base of methods that ask for the words of the question (``prompt.*`` signals).

    Parameters
    ----------
    question
        Words to compare with, for all prompts; None reads them out of each prompt.
    text_tower
        See `PairedMethod`.
    tokenizer
        See `ReadingMethod`.
    """

    question: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question is not None and not (isinstance(self.question, str) and self.question.strip()):
            raise MethodError(f"question is {self.question!r}, but it must be words; leave it out to read the prompt.")


def _named(value: Any) -> str:
    names = (getattr(value, name, None) for name in ("source", "name_or_path"))
    return next((str(name) for name in names if name), type(value).__name__)
