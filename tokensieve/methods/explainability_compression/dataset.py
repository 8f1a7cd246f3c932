"""Labels on disk: one safetensors file for every prompt, so that making them can stop and go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokensieve.core.runtime import base_model
from tokensieve.errors import MethodError
from tokensieve.hosts.registry import host_for
from tokensieve.methods.explainability_compression.labels import Inputs, Label, answer, label
from tokensieve.methods.explainability_compression.mapper import Modality

FORMAT = "tokensieve-relevance-labels-1"


@dataclass(frozen=True)
class LabelledPrompt:
    """One prompt of a set.

    Attributes
    ----------
    inputs
        What the processor gives for it.
    reference
        Right answer; prompts that the model answers otherwise are left out. None takes any answer.
    """

    inputs: Inputs
    reference: str | None = None


class LabelFolder:
    """A folder of labels of one model.

    Parameters
    ----------
    path
        The folder; it is made if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def done(self, number: int) -> bool:
        """Whether a prompt was labelled or left out."""
        return self._file(number).exists() or self._mark(number).exists()

    def add(self, number: int, labels: Sequence[Label], facts: dict[str, str]) -> None:
        """Write the labels of one prompt; ``facts`` say which model they are of."""
        tensors = {}
        for index, one in enumerate(labels):
            tensors[f"{index}.attention"] = one.attention.contiguous()
            tensors[f"{index}.relevance"] = one.relevance.contiguous()
        part = self._file(number).with_suffix(".part")
        save_file(tensors, part, metadata={"format": FORMAT, "kinds": ",".join(x.kind for x in labels), **facts})
        part.replace(self._file(number))

    def leave_out(self, number: int) -> None:
        """Remember that a prompt gives no labels."""
        self._mark(number).touch()

    def load(self, modality: Modality = "any") -> tuple[list[Label], dict[str, str]]:
        """All labels of a kind in the order of the prompts, and which model they are of.

        Raises
        ------
        MethodError
            If there are none, a file cannot be read, or they are of several models.
        """
        found: list[Label] = []
        facts: dict[str, str] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            labels, own = _read(path)
            if facts and own != facts:
                raise MethodError(f"{self.path} mixes labels of several models ({facts} and {own}); keep them apart.")
            facts = own
            found += [one for one in labels if modality in ("any", one.kind)]
        if not found:
            raise MethodError(f"{self.path} holds no labels of {modality} items; make some first.")
        return found, facts

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.safetensors"

    def _mark(self, number: int) -> Path:
        return self.path / f"{number:06d}.left-out"


def _read(path: Path) -> tuple[list[Label], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MethodError(f"{path} is not of the format {FORMAT}; remove it from the folder.")
            kinds: list[Any] = metadata.get("kinds", "").split(",")
            labels = [
                Label(kind, file.get_tensor(f"{i}.attention"), file.get_tensor(f"{i}.relevance"))
                for i, kind in enumerate(kinds)
            ]
    except (OSError, SafetensorError) as error:
        raise MethodError(f"{path} cannot be read as labels ({error}); remove it and make it anew.") from error
    return labels, {name: metadata.get(name, "") for name in ("host", "decoder_layers", "model")}


def agrees(given: str, reference: str) -> bool:
    """Whether an answer is the reference, up to case and punctuation, or contains it as whole words.

    A reference of one letter (a choice) must be the first word of the answer.
    """
    words, wanted = (re.findall(r"\w+", text.lower()) for text in (given, reference))
    if not wanted:
        return False
    if len(wanted) == 1 and len(wanted[0]) == 1:
        return words[:1] == wanted
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def make_labels(
    model: nn.Module,
    prompts: Iterable[LabelledPrompt],
    folder: LabelFolder,
    *,
    decode: Callable[[Tensor], str] | None = None,
    max_new_tokens: int = 16,
    recompute: bool = True,
    name: str = "",
    first: int = 0,
    progress: Callable[[int, bool], None] | None = None,
) -> int:
    """Label a set of prompts; those that the folder has already are passed over.

    Parameters
    ----------
    model
        A supported model without a method attached.
    prompts
        One prompt each, in the same order in every run.
    folder : LabelFolder
        Where the labels go.
    decode
        Token ids to words, needed where prompts have references.
    max_new_tokens
        Longest answer; every token costs a backward pass.
    recompute
        See `labels.label`.
    name
        Name of the model, kept with the labels.
    first
        Number of the first of these prompts in the set.
    progress
        Called with the number of a prompt and whether it gave labels.

    Returns
    -------
    int
        Prompts that gave labels in this run.
    """
    host = host_for(model)
    layers = len(host.layers(base_model(model)))
    facts = {"host": host.slug, "decoder_layers": str(layers), "model": name}
    made = 0
    for number, prompt in enumerate(prompts, first):
        if folder.done(number):
            continue
        if prompt.reference is not None and decode is None:
            raise MethodError(f"prompt {number} has a reference; pass decode= to compare the answer with it.")
        ids = answer(model, prompt.inputs, max_new_tokens)
        right = prompt.reference is None or (decode is not None and agrees(decode(ids), prompt.reference))
        labels = label(model, prompt.inputs, ids, recompute) if right and ids.numel() else []
        if labels:
            folder.add(number, labels, facts)
            made += 1
        else:
            folder.leave_out(number)
        if progress is not None:
            progress(number, bool(labels))
    return made
