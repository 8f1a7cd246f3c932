"""Write tiny checkpoints to folders, once, and safely when several processes want the same one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    initialization,
)

from tokensieve.errors import HostError
from tokensieve.hosts.tiny import recipes_llava, recipes_qwen
from tokensieve.hosts.tiny.families import family_of
from tokensieve.hosts.tiny.recipe import Overrides
from tokensieve.hosts.tiny.weights import enliven
from tokensieve.models import llava_video

__all__ = ["build", "build_in_memory", "cached", "load"]

RECIPES = {**recipes_llava.RECIPES, **recipes_qwen.RECIPES}
"""Recipe of every family by its slug."""

_CONSTRUCTION = threading.Lock()

MARKER = "tiny.json"
"""File that says from which recipe a folder was built; folders without it are never touched."""


def build_in_memory(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    **overrides: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make the model and the processor of a family without writing anything.

    Parameters
    ----------
    family : str
        Slug of the family, a key of `FAMILIES`.
    seed : int
        Seed of the weights.
    dtype : torch.dtype or str
        Type of the weights (``torch.bfloat16`` or ``"bfloat16"``); they are drawn in float32 and rounded.
    device : torch.device or str
        Where the model is put.
    attn_implementation : str, optional
        Attention kernel; the library's choice unless given.
    **overrides : mapping
        Any of `text`, `vision`, `config`, `image_processor`, `video_processor`, each a mapping of fields; see
        `Overrides`. ``text={"hidden_size": 896, "num_hidden_layers": 24, ...}`` gives a larger language
        model.

    Returns
    -------
    tuple of PreTrainedModel and ProcessorMixin
        The model in evaluation mode, and the processor.

    Raises
    ------
    HostError
        For an unknown family, override or type, or a vocabulary smaller than the tokenizer.
    """
    recipe = RECIPES[family_of(family).slug](_overrides_of(overrides))
    tokenizer = recipe.processor.tokenizer
    options: dict[str, Any] = {"dtype": _dtype_of(dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    # Every parameter is drawn below, so the library's own initialisation, which takes most of the time of a large
    # model, is skipped. It is switched off for the whole process, hence the lock.
    uninitialised = getattr(initialization, "no_init_weights", nullcontext)
    with _CONSTRUCTION, torch.random.fork_rng(devices=()), torch.device(device), uninitialised():
        model = AutoModelForImageTextToText.from_config(recipe.config, **options)
    model.tie_weights()
    enliven(model, seed=seed, silent_ids=_silent_ids(tokenizer, recipe.config.text_config.vocab_size))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), recipe.processor


def build(
    family: str,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a checkpoint folder that the Auto classes of transformers load like any other.

    The folder is written beside its final place and then renamed, so it is never seen half done. A folder
    that was built from the same recipe is left as it is; one from another recipe is replaced.

    Parameters
    ----------
    family : str
        Slug of the family, a key of `FAMILIES`.
    directory : path
        The folder to write; its parents are made.
    seed, dtype, **overrides
        As in `build_in_memory`.

    Returns
    -------
    Path
        `directory`, holding `config.json`, `model.safetensors`, `generation_config.json`, the tokenizer, the
        processor and the chat template.

    Raises
    ------
    HostError
        As in `build_in_memory`, or if the folder holds anything that was not built here.
    """
    target = Path(directory)
    if family == "llava_video":
        llava_video.register()
    fingerprint = _fingerprint(family, seed, dtype, overrides)
    if _is_built(target, fingerprint):
        return target
    if target.exists() and not (target / MARKER).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise HostError(f"{target} holds other files; name a new or an empty folder for the tiny checkpoint.")
    model, processor = build_in_memory(family, seed=seed, dtype=dtype, **overrides)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(draft, safe_serialization=True)
        processor.save_pretrained(draft)
        (draft / MARKER).write_text(json.dumps({"family": family, "fingerprint": fingerprint}), encoding="utf-8")
        draft.chmod(0o755)
        _move_into_place(draft, target, fingerprint)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def cached(
    family: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    **overrides: Any,
) -> Path:
    """Give the checkpoint folder of a family, building it the first time it is asked for on this machine.

    Parameters
    ----------
    family : str
        Slug of the family, a key of `FAMILIES`.
    cache_dir : path, optional
        Where to keep the checkpoints; ``$XDG_CACHE_HOME/tokensieve/tiny`` or ``~/.cache/tokensieve/tiny``
        unless given.
    seed, dtype, **overrides
        As in `build_in_memory`.

    Returns
    -------
    Path
        ``<cache_dir>/<family>-<hash>``; the hash covers the recipe and the release of transformers.
    """
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = Path(base) / "tokensieve" / "tiny"
    fingerprint = _fingerprint(family, seed, dtype, overrides)
    return build(family, Path(cache_dir) / f"{family}-{fingerprint}", seed=seed, dtype=dtype, **overrides)


def load(
    family: str, cache_dir: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the cached checkpoint of a family through the Auto classes, as a user loads a model from the hub.

    Parameters
    ----------
    family : str
        Slug of the family, a key of `FAMILIES`.
    cache_dir : path, optional
        As in `cached`.
    **options
        Arguments of `AutoModelForImageTextToText.from_pretrained` (``attn_implementation="eager"``).

    Returns
    -------
    tuple of PreTrainedModel and ProcessorMixin
        A fresh model in evaluation mode, and a fresh processor.
    """
    folder = cached(family, cache_dir)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def _overrides_of(overrides: Mapping[str, Mapping[str, Any]]) -> Overrides:
    known = set(Overrides.__dataclass_fields__)
    if unknown := set(overrides) - known:
        raise HostError(f"Unknown override {sorted(unknown)[0]!r}; use one of {', '.join(sorted(known))}.")
    return Overrides(**overrides)


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise HostError(f"{dtype!r} is no floating-point type of torch; use float32, bfloat16 or float16.")
    return resolved


def _silent_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> list[int]:
    """Entries that are no readable text: special tokens, lone bytes, blanks, rows beyond the tokenizer."""
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([token_id]).strip() for token_id in range(len(tokenizer))]
    unreadable = [
        token_id
        for token_id, text in enumerate(texts)
        if token_id in special or not (text and text.isascii() and text.isprintable())
    ]
    return unreadable + list(range(len(tokenizer), vocabulary_size))


def _fingerprint(family: str, seed: int, dtype: torch.dtype | str, overrides: Mapping[str, Any]) -> str:
    """Hash all that decides the content of a checkpoint, the source of the recipes included."""
    family_of(family)
    settings = asdict(_overrides_of(overrides))
    described = json.dumps(
        [family, seed, str(_dtype_of(dtype)), settings, transformers.__version__], sort_keys=True, default=str
    )
    digest = hashlib.sha256(described.encode())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(llava_video.__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _is_built(directory: Path, fingerprint: str) -> bool:
    """Whether the folder was built from this recipe."""
    marker = directory / MARKER
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["fingerprint"] == fingerprint


def _move_into_place(draft: Path, target: Path, fingerprint: str) -> None:
    """Rename the draft; a process that was faster with the same recipe wins, an older recipe gives way."""
    try:
        draft.rename(target)
    except OSError:
        if _is_built(target, fingerprint):
            return
        outdated = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        target.rename(outdated / target.name)
        draft.rename(target)
        shutil.rmtree(outdated, ignore_errors=True)
