"""Arguments of a benchmark, and what follows from them: the model, the questions, the identity of the run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokensieve
from tokensieve.bench.data import Item, choose, digest, item_like, read_items
from tokensieve.bench.settings import Setting
from tokensieve.errors import BenchError

__all__ = ["RETENTIONS", "BenchConfig", "identity", "load_items", "resolved"]

RETENTIONS = (0.25, 0.1)
"""Default retentions: one at which most methods hold, one at which they differ."""

_SMALL_WEIGHTS = 1 << 30
_WHOLE_HASH = 256 << 20


@dataclass(frozen=True)
class BenchConfig:
    """What is benchmarked.

    Parameters
    ----------
    model
        Folder or hub name of a model; None for the one that comes with tokensieve.
    data
        JSONL file (see `tokensieve.bench.data.read_items`); None for the clips of `tokensieve.world`.
    methods
        Notations, or ``"all"``.
    retentions
        Shares of visual tokens to keep.
    clips
        Number of clips; None for all of a file.
    questions
        Questions per clip, spread evenly over the families; None for two of the world's and all of a file's.
    families
        Question families; None for all.
    split
        Part of the world that clips are taken from, ``"test"`` or ``"long"``.
    frames
        Frames per clip; None for 16, or 128 of the split ``"long"``.
    prompt
        ``"open"`` or ``"letters"``; None for what suits model and dataset.
    seed
        Of the choice of clips and of methods that draw at random.
    dtype, device, attn
        As `tokensieve.load.load_model`.
    batch
        Most questions about a clip that run as one batch.
    text_tower
        For methods that compare frames with the question in a shared space; the one known for the model's vision tower
        unless given.
    """

    model: str | None = None
    data: str | None = None
    methods: tuple[str, ...] = ("all",)
    retentions: tuple[float, ...] = RETENTIONS
    clips: int | None = None
    questions: int | None = None
    families: tuple[str, ...] | None = None
    split: str = "test"
    frames: int | None = None
    prompt: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    batch: int = 8
    text_tower: str | None = None

    @property
    def frames_per_clip(self) -> int:
        """Frames that are shown of every clip."""
        return self.frames or (128 if self.data is None and self.split == "long" else 16)

    @property
    def options(self) -> dict[str, Any]:
        """Options for the methods that have them."""
        return {} if self.text_tower is None else {"text_tower": self.text_tower}


def resolved(config: BenchConfig) -> BenchConfig:
    """The configuration with the bundled model's own folder, way of asking and precision filled in.

    Raises
    ------
    HostError
        When no model is named and this installation comes without one.
    """
    if config.model is not None:
        return config
    from tokensieve.world.bundled import bundled

    # Few processors are faster at bfloat16 on prompts this short, and float32 holds the stored weights exactly.
    dtype = "float32" if config.dtype == "auto" and not on_gpu(config.device) else config.dtype
    return replace(config, model=str(bundled()), dtype=dtype, prompt=config.prompt or "open")


def on_gpu(device: str) -> bool:
    """Whether a device name means a CUDA device here."""
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def load_items(config: BenchConfig) -> list[Item]:
    """Questions of a benchmark, the same in every process.

    Raises
    ------
    BenchError
        When dataset, families or numbers cannot be used.
    """
    if config.frames is not None and config.frames < 1:
        raise BenchError(f"The number of frames must be 1 or more, not {config.frames}.")
    if config.data is not None:
        everything = read_items(config.data, config.frames_per_clip)
        return choose(everything, config.clips, config.families, config.questions, config.seed)
    from tokensieve.world.items import items as world_items
    from tokensieve.world.words import FAMILIES

    number = 300 if config.clips is None else config.clips
    per_clip = 2 if config.questions is None else config.questions
    families = FAMILIES if config.families is None else config.families
    try:
        found = world_items(config.split, number, families, per_clip=per_clip, frames=config.frames_per_clip)
    except ValueError as error:
        raise BenchError(str(error)) from error
    if not found:
        raise BenchError(f"The clips of the split {config.split!r} have no question of {', '.join(families)}.")
    return [item_like(one) for one in found]


def identity(
    config: BenchConfig, model_name: str, items: Sequence[Item], settings: Sequence[Setting], style: str
) -> dict[str, Any]:
    """Everything that the answers depend on, as plain data; two runs with the same can share a journal."""
    import torch
    import transformers

    return {
        "model": model_identity(model_name),
        "dataset": digest(items),
        "settings": [setting.key for setting in settings],
        "prompt": style,
        "frames": config.frames_per_clip,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": config.device,
        "attention": config.attn,
        "batch": config.batch,
        "text tower": config.text_tower,
        "versions": {
            "tokensieve": tokensieve.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def model_identity(name: str) -> str:
    """A fingerprint of a folder's configuration and weights, or the name itself for the hub.

    Weights of more than 256 MB are told apart by size and by their first and last megabyte.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    found = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    large = sum(file.stat().st_size for file in weights) > _WHOLE_HASH
    for file in (folder / "config.json", *weights):
        found.update(f"{file.name}:{file.stat().st_size};".encode())
        with file.open("rb") as content:
            if large and file.suffix == ".safetensors":
                found.update(content.read(1 << 20))
                content.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            while block := content.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]


def default_workers(name: str, device: str) -> int:
    """Processes that suit a model: one per core for a small one on the CPU, otherwise one."""
    folder = Path(name).expanduser()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else _SMALL_WEIGHTS
    if on_gpu(device) or size >= _SMALL_WEIGHTS:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)
