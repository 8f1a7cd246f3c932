"""Encoded clips for the second stage, made block by block in a process of their own.

The image tower and the projector are frozen then, so a clip is encoded once and used for several steps.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel

from tokensieve.world.draw import draw
from tokensieve.world.models import WIDTH
from tokensieve.world.scene import Scene, practice, scene_of
from tokensieve.world.training import attention
from tokensieve.world.training.labels import clip_targets
from tokensieve.world.training.precision import autocast
from tokensieve.world.training.state import Checkpoint
from tokensieve.world.training.tower import build, normalised, pooled


class Eye(nn.Module):
    """The frozen image tower up to the layer that the video LLM reads, the projector, and the pooling."""

    def __init__(self, tower: CLIPVisionModel, projector: nn.Module) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector

    @torch.no_grad()
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """``uint8 [F, H, W, 3]`` to ``bfloat16 [F, 36, D]``."""
        with autocast():
            states = self.tower(pixel_values=normalised(frames), output_hidden_states=True).hidden_states[-2]
            return pooled(self.projector(states[:, 1:])).bfloat16()


def load_eye(tower_folder: Path, seed: int) -> tuple[Eye, torch.Tensor]:
    """The eye after the first stage, and the word embeddings trained with it."""
    stage, _ = build(seed)
    if Checkpoint(tower_folder).load({"stage": stage}, {}) == 0:
        raise FileNotFoundError(f"No trained tower in {tower_folder}; run the first stage before the second.")
    stage.clip.vision_model.config._attn_implementation = attention.NAME
    return Eye(stage.clip.vision_model, stage.projector).eval(), stage.embeddings.weight.detach().clone()


def training_scenes(first: int, number: int, frames: int, focus: bool) -> list[Scene]:
    """Consecutive scenes of the training split, for exercise or as they are asked about in the end."""
    indices = range(first, first + number)
    return [practice(i, frames) if focus else scene_of("train", i, frames) for i in indices]


def encode_clips(eye: Eye, scenes: Sequence[Scene]) -> torch.Tensor:
    """Features ``bfloat16 [number, F, 36, D]`` of clips of one length."""
    frames = scenes[0].frames
    found = torch.empty(len(scenes), frames, 36, WIDTH, dtype=torch.bfloat16)
    together = max(1, 64 // frames)
    for begin in range(0, len(scenes), together):
        drawn = [torch.from_numpy(draw(scene)) for scene in scenes[begin : begin + together]]
        found[begin : begin + together] = eye(torch.cat(drawn)).view(len(drawn), frames, 36, WIDTH)
    return found


def _work(tower_folder: str, seed: int, file: str, first: int, number: int, frames: int, focus: bool) -> None:
    torch.set_num_threads(1)
    eye, _ = load_eye(Path(tower_folder), seed)
    scenes = training_scenes(first, number, frames, focus)
    features = encode_clips(eye, scenes)
    part = f"{file}.part"
    targets = [clip_targets(scene) for scene in scenes]
    parts = {
        name: torch.from_numpy(np.stack(values))
        for name, values in zip(("words", "motion", "fates"), zip(*targets, strict=True), strict=True)
    }
    save_file({"features": features, **parts}, part)
    Path(part).replace(file)


class Blocks:
    """Encoded blocks of training clips, the next one made while the current one is used.

    Parameters
    ----------
    folder
        Where blocks wait; removed after use.
    tower_folder, seed
        The first stage.
    """

    def __init__(self, folder: Path, tower_folder: Path, seed: int) -> None:
        self.folder, self.tower_folder, self.seed = folder, tower_folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._running: dict[Path, BaseProcess] = {}

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running.values():
            process.terminate()

    def request(self, first: int, number: int, frames: int, focus: bool) -> Path:
        """Start to make a block unless it exists or is being made; returns its file."""
        file = self.folder / f"clips-{frames}-{first}-{number}{'-focus' if focus else ''}.safetensors"
        if not file.exists() and file not in self._running:
            arguments = (str(self.tower_folder), self.seed, str(file), first, number, frames, focus)
            process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._running[file] = process
        return file

    def take(self, first: int, number: int, frames: int, focus: bool) -> dict[str, torch.Tensor]:
        """``features [number, F, 36, D]``, and ``words``, ``motion``, ``fates`` of the tokens as in ``clip_targets``.

        Waits until they are ready and removes the file.
        """
        file = self.request(first, number, frames, focus)
        process = self._running.pop(file, None)
        if process is not None:
            process.join()
        if not file.exists():
            raise RuntimeError(f"Encoding of clips {first} to {first + number} failed; see the messages above.")
        found: dict[str, torch.Tensor] = load_file(file)
        file.unlink()
        return found
