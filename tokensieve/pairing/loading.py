"""Which pair belongs to a host's vision tower: by name, by geometry, loaded once per host."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokensieve.errors import HostError, SignalError
from tokensieve.pairing.geometry import VisionGeometry, find_source
from tokensieve.pairing.pair import ClipPair, SiglipPair, TextPair

__all__ = ["load_pair", "resolve_pair"]

logger = logging.getLogger("tokensieve")

_PAIRS: Mapping[str, type[TextPair]] = {"clip": ClipPair, "siglip": SiglipPair}


def load_pair(source: str | Path | TextPair | nn.Module, tokenizer: Any = None) -> TextPair:
    """A pair from a folder, a hub name, or a model object.

    Parameters
    ----------
    source
        Folder or hub name of a CLIP or SigLIP checkpoint (safetensors), a `CLIPModel` or `SiglipModel`, or a pair,
        which is returned as it is.
    tokenizer
        Of the text tower; that of the checkpoint by default.

    Raises
    ------
    HostError
        If there is no such checkpoint, it is no pair, or it has no safetensors weights.
    """
    if isinstance(source, TextPair):
        return source
    model: Any = source
    if not isinstance(source, nn.Module):
        model = _load_model(str(Path(source).expanduser() if Path(source).expanduser().is_dir() else source))
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    if kind not in _PAIRS:
        raise HostError(f"A model of type {kind!r} is no pair of towers; give a CLIP or SigLIP model as text_tower.")
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return _PAIRS[kind](model.eval(), tokenizer, name)


_LOADED: weakref.WeakKeyDictionary[nn.Module, dict[str, TextPair]] = weakref.WeakKeyDictionary()
"""Pairs that were loaded for a tower, by location; they go when the host goes."""


def resolve_pair(tower: nn.Module, given: str | Path | TextPair | nn.Module | None = None) -> TextPair:
    """The pair of a host's vision tower, checked against it.

    What is loaded by name is loaded once per host and kept as long as the host lives.

    Parameters
    ----------
    tower
        The host's vision tower.
    given
        What the user named; by default the pair that is known for the geometry of the tower.

    Raises
    ------
    SignalError
        If no pair is known for the tower, or the named one does not fit it.
    HostError
        If the pair cannot be loaded.
    """
    config = tower.config
    source = given
    if source is None:
        known = find_source(config)
        if known is None:
            geometry = VisionGeometry.of(config)
            what = f"this {geometry}" if geometry is not None else f"a {getattr(config, 'model_type', 'unknown')}"
            raise SignalError(f"No text tower is known for {what}; give the CLIP or SigLIP model it was taken from.")
        source = known.location
    if isinstance(source, (TextPair, nn.Module)):
        pair = load_pair(source)
        _compare(pair, tower)
        return pair
    kept = _LOADED.setdefault(tower, {})
    if str(source) not in kept:
        pair = load_pair(source)
        _compare(pair, tower)
        kept[str(source)] = pair
    pair = kept[str(source)]
    device = next(tower.parameters()).device
    for part in (pair.text_model, getattr(pair, "text_projection", None)):
        if isinstance(part, nn.Module):
            part.to(device)
    return pair


def _compare(pair: TextPair, tower: nn.Module) -> None:
    """Refuse a pair of another shape; mention one whose vision half was trained on in the host."""
    found = pair.check(tower)
    if found.tuned:
        logger.info(
            "The vision tower was trained further since it left %s (%d of %d small weights differ), so that its text "
            "tower knows an older one.",
            pair.source,
            found.compared - found.equal,
            found.compared,
        )


def _load_model(name: str) -> Any:
    from transformers import AutoConfig, AutoModel

    from tokensieve.library_errors import brief_error, library_errors

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type in _PAIRS:
            return AutoModel.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)
    except library_errors() as error:
        raise HostError(
            f"The text tower {name} cannot be loaded ({brief_error(error)}); give the folder of a CLIP or SigLIP model "
            "with safetensors weights as text_tower."
        ) from error
    raise HostError(f"{name} is a {config.model_type}, no CLIP or SigLIP pair; give such a model as text_tower.")
