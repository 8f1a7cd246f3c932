"""The whole training from nothing to saved models, and what is written with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from tokensieve.world.models import CLIP_PAIR, VIDEO_LLM, clip_processor, video_llm, video_processor
from tokensieve.world.training.answerer import build_answerer, train_answerer
from tokensieve.world.training.curriculum import curriculum, refinement
from tokensieve.world.training.state import Checkpoint
from tokensieve.world.training.tower import build, train_tower

TOWER_STEPS = 900

PROJECTOR_STEPS = 200
"""Steps of the first stage where saved models are trained further."""


def train(
    folder: Path, seed: int = 0, scale: float = 1.0, start: Path | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """Train both stages and save the models, going on from whatever a killed run left in ``folder``.

    Parameters
    ----------
    folder
        Checkpoints, logs, and at the end the models ``clip-pair`` and ``video-llm``.
    seed
        Of the initial weights and of everything drawn at random.
    scale
        Factor on the number of steps; 1 is the published training.
    start
        Folder with saved models ``clip-pair`` and ``video-llm`` to go on from: projector and language model are
        trained further. None trains everything from nothing.

    Yields
    ------
    tuple of str and dict
        Stage, and a record of the log.
    """
    steps = max(2, round((TOWER_STEPS if start is None else PROJECTOR_STEPS) * scale))
    for record in train_tower(folder / "tower", steps, seed, start=start):
        yield "tower", record
    phases = curriculum(scale) if start is None else refinement(scale)
    for record in train_answerer(folder / "answerer", folder / "tower", phases, seed, start=start):
        yield "answerer", record
    export(folder, folder, seed)


def export(folder: Path, target: Path, seed: int = 0) -> None:
    """Save what the checkpoints under ``folder`` hold as ordinary models in bf16.

    Raises
    ------
    FileNotFoundError
        If a stage has no checkpoint.
    """
    stage, _ = build(seed)
    if Checkpoint(folder / "tower").load({"stage": stage}, {}) == 0:
        raise FileNotFoundError(f"No trained tower in {folder / 'tower'}.")
    clip = stage.clip
    clip.vision_model.config._attn_implementation = "sdpa"
    clip.to(torch.bfloat16).save_pretrained(target / CLIP_PAIR)
    clip_processor().save_pretrained(target / CLIP_PAIR)

    answerer, _ = build_answerer(folder / "tower", seed)
    if Checkpoint(folder / "answerer").load({"answerer": answerer}, {}) == 0:
        raise FileNotFoundError(f"No trained language model in {folder / 'answerer'}.")
    model = video_llm()
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.multi_modal_projector.load_state_dict(stage.projector.state_dict())
    model.model.language_model.load_state_dict(answerer.decoder.state_dict())
    model.model.image_newline.data.copy_(answerer.newline)
    model.tie_weights()
    # Read by `tokensieve bench`: this model answers questions without options.
    model.config.tokensieve_prompt = "open"
    model.generation_config.max_new_tokens = 4
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    model.to(torch.bfloat16).save_pretrained(target / VIDEO_LLM)
    video_processor().save_pretrained(target / VIDEO_LLM)
