"""Second stage: the language model learns to answer, on a frozen eye.

Most turns see the video and themselves only, so that every question is answered from the frames; in every sixth step
the turns of a clip form one conversation. Clips grow from 4 to 32 frames. In about a third of the steps random visual
tokens or frames are missing, as the large models that compression is made for have seen clips of every length and
resolution.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from tokensieve.world.models import VIDEO_LLM, video_llm
from tokensieve.world.scene import Scene, scene_of
from tokensieve.world.training import attention
from tokensieve.world.training.clips import Blocks, Eye, encode_clips, load_eye, training_scenes
from tokensieve.world.training.curriculum import Phase, batches
from tokensieve.world.training.grounding import (
    fact_head,
    fact_loss,
    pointer_loss,
    relation_head,
    relation_loss,
    sight_head,
    sight_loss,
)
from tokensieve.world.training.optimise import optimisers, set_rate
from tokensieve.world.training.precision import autocast
from tokensieve.world.training.state import Checkpoint, append_log
from tokensieve.world.training.turns import IGNORED, Turns, choose, conversation, opening, separate, token_ids
from tokensieve.world.words import FAMILIES

TALK_EVERY = 6
"""One step in so many trains on conversations."""

WEIGHTS: dict[str, float] = {"counting": 4.0, "order": 3.0, "one-frame": 3.0, "two-places": 4.0}
FOCUS_WEIGHTS: dict[str, float] = {"counting": 3.0, "one-frame": 6.0, "two-places": 3.0}
"""Families that lag behind, and how much more their answers count: from nothing, and in phases with a focus."""

SIGHT_LAYER, SIGHT_WEIGHT = 2, 0.2
FACT_LAYER, RELATION_LAYER, FACT_WEIGHT = 3, 4, 0.3
"""Layers after which the auxiliary heads read, and the weights of their losses."""

POINTER_HEAD, POINTER_WEIGHT = 2, 0.5
"""Attention head of the layer :data:`FACT_LAYER` that is taught where a flash can be known from."""

REFINED_RATE = 0.7
"""Factor on the learning rates where saved models are trained further."""


class Aside(NamedTuple):
    """Output of the auxiliary heads: for each visual token ``[B, M, S]``, and twice for each mention ``[m, G]``.

    Then how one attention head looks from each mention at the visual tokens, logits ``[m, M]``.
    """

    sights: torch.Tensor
    facts: torch.Tensor
    relations: torch.Tensor
    pointers: torch.Tensor


class Answerer(nn.Module):
    """The trained parts of the second stage over cached visual tokens."""

    def __init__(self, llm: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.decoder = llm.model.language_model
        self.newline = llm.model.image_newline
        self.sights, self.facts, self.relations = sight_head(), fact_head(), relation_head()
        self.decoder.config._attn_implementation = attention.NAME
        self.register_buffer("opening", torch.tensor(opening()), persistent=False)

    def forward(self, visual: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, Aside]:
        """Answers, and what the auxiliary heads read.

        Parameters
        ----------
        visual
            Visual tokens ``[B, M, D]``.
        turns
            Questions with answers.

        Returns
        -------
        tuple of torch.Tensor and Aside
            Logits ``[n, V]`` of the positions with a target, in the order of ``turns.targets`` without the ignored
            ones, and what the heads read on the way.
        """
        batch, number, length = turns.ids.shape
        table = self.decoder.embed_tokens
        start = table(self.opening).expand(batch, -1, -1)
        newline = self.newline.expand(batch, 1, -1)
        prefix = torch.cat([start, visual.to(start.dtype), newline], 1)
        states = torch.cat([prefix, table(turns.ids).flatten(1, 2)], 1)
        size = prefix.shape[1]
        own = torch.arange(length) + size
        positions = torch.cat([torch.arange(size), own.repeat(number)])[None]
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            self.decoder.layers[i].register_forward_hook(lambda _, __, out, i=i: seen.update({i: out}))
            for i in (SIGHT_LAYER, FACT_LAYER, RELATION_LAYER)
        ]
        before: dict[str, torch.Tensor] = {}
        hooks.append(
            self.decoder.layers[FACT_LAYER].register_forward_pre_hook(
                lambda _, args, given: before.update(
                    states=args[0], cosine=given["position_embeddings"][0], sine=given["position_embeddings"][1]
                ),
                with_kwargs=True,
            )
        )
        try:
            last = self.decoder(
                inputs_embeds=states, position_ids=positions, use_cache=False, layout=(size, number, length)
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        wanted = turns.targets.flatten(1) != IGNORED
        visible = slice(start.shape[1], size - 1)
        clip = torch.tensor([one.clip for one in turns.mentions], dtype=torch.long)
        place = [size + one.turn * length + one.position for one in turns.mentions]
        at = (clip, torch.tensor(place, dtype=torch.long))
        aside = Aside(
            self.sights(seen[SIGHT_LAYER][:, visible]),
            self.facts(seen[FACT_LAYER][at]),
            self.relations(seen[RELATION_LAYER][at]),
            _looks(self.decoder.layers[FACT_LAYER], before, at, visible),
        )
        return F.linear(last[:, size:][wanted], table.weight), aside


def _looks(
    layer: nn.Module, before: dict[str, torch.Tensor], at: tuple[torch.Tensor, torch.Tensor], visible: slice
) -> torch.Tensor:
    """Attention logits ``[m, M]`` of :data:`POINTER_HEAD` of a layer from the tokens ``at`` to the visible ones."""
    attention: Any = layer.self_attn
    size, groups = attention.head_dim, attention.num_key_value_groups
    inputs = layer.input_layernorm(before["states"])  # type: ignore[operator]
    cosine, sine = before["cosine"][0], before["sine"][0]
    query = attention.q_proj(inputs[at]).unflatten(-1, (-1, size))[:, POINTER_HEAD]
    key = attention.k_proj(inputs[:, visible]).unflatten(-1, (-1, size))[:, :, POINTER_HEAD // groups]
    query = query * cosine[at[1]] + rotate_half(query) * sine[at[1]]
    key = key * cosine[visible] + rotate_half(key) * sine[visible]
    return torch.einsum("md,mnd->mn", query.float(), key[at[0]].float()) * size**-0.5


def thinned(
    features: torch.Tensor, rng: np.random.Generator, missing: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[B, F, 36, D]`` to ``[B, M, D]``: all tokens, or random tokens or frames left out.

    Also returns the positions ``[B, M]`` of the tokens that are left, None if all are.
    """
    batch, frames, cells, _ = features.shape
    flat = features.flatten(1, 2)
    if rng.random() >= missing:
        return flat, None
    if rng.random() < 0.3:
        kept = max(2, round(frames * rng.uniform(0.25, 1)))
        picks = np.stack([np.sort(rng.permutation(frames)[:kept]) for _ in range(batch)])
        idx = (picks[:, :, None] * cells + np.arange(cells)).reshape(batch, -1)
    else:
        kept = max(16, round(frames * cells * rng.uniform(0.1, 1)))
        idx = np.stack([np.sort(rng.permutation(frames * cells)[:kept]) for _ in range(batch)])
    at = torch.from_numpy(idx)
    return flat.gather(1, at[..., None].expand(-1, -1, flat.shape[-1])), at


def train_answerer(
    folder: Path,
    tower_folder: Path,
    phases: tuple[Phase, ...],
    seed: int = 0,
    *,
    start: Path | None = None,
    every: int = 48,
    save_every: int = 1,
    examine_every: int = 240,
) -> Iterator[dict[str, float]]:
    """Train the second stage, going on from a checkpoint in ``folder`` if there is one.

    Parameters
    ----------
    folder, tower_folder
        Checkpoints and the log of this stage, and those of the first.
    phases
        The curriculum.
    seed
        Of weights and data; the same as in the first stage.
    start
        Folder of saved models to go on from.
    every, save_every, examine_every
        Steps between records of the log, between checkpoints, and between tests on validation clips.

    Yields
    ------
    dict
        Loss and accuracy per family since the record before.
    """
    model, eye = build_answerer(tower_folder, seed, start)
    peak = 1.0 if start is None else REFINED_RATE
    found = optimisers([model], muon=3.5e-3 * peak, adam=2e-3 * peak)
    checkpoint = Checkpoint(folder)
    done = checkpoint.load({"answerer": model}, found)
    examination, tally, began = Examination(eye), Tally(), time.monotonic()
    steps = sum(phase.steps for phase in phases)
    with Blocks(folder / "blocks", tower_folder, seed) as blocks:
        for step, phase, batch, first in batches(blocks, phases, done, seed):
            rate = set_rate(found, step, steps)
            rng = np.random.default_rng((5, seed, step))
            scenes = training_scenes(first, phase.clips, phase.frames, phase.focus)
            turns = _turns_of(step, phase, scenes, rng)
            visual, idx = thinned(batch["features"], rng, phase.missing)
            with autocast():
                logits, aside = model(visual, turns)
            logits, targets = logits.float(), turns.targets[turns.targets != IGNORED]
            # Where tokens are missing, so is some of the evidence; all families count the same then.
            of_family = {} if idx is not None else FOCUS_WEIGHTS if phase.focus else WEIGHTS
            weights = _weights(turns, of_family)
            loss = _loss(logits, targets, turns, weights)
            sight = sight_loss(aside.sights, batch["words"], batch["motion"], batch["fates"], idx)
            fact = fact_loss(aside.facts, turns.mentions, scenes, weights)
            fact = fact + relation_loss(aside.relations, turns.mentions, scenes, weights)
            if idx is None:
                fact = fact + POINTER_WEIGHT * pointer_loss(aside.pointers, turns, batch["fates"])
            (loss + SIGHT_WEIGHT * sight + FACT_WEIGHT * fact).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in found.values():
                optimiser.step()
                optimiser.zero_grad()
            tally.add(loss, logits, targets, turns)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                checkpoint.save(step + 1, {"answerer": model}, found)
            if (step + 1) % every == 0 or step + 1 == steps:
                record = {"step": step + 1, "frames": phase.frames, "rate": rate, "seconds": time.monotonic() - began}
                record |= {"sights": float(sight.detach()), "facts": float(fact.detach())} | tally.close()
                if (step + 1) % examine_every == 0 or step + 1 == steps:
                    record |= {f"held out {name}": hits for name, hits in examination(model, phase.frames).items()}
                append_log(folder / "log.jsonl", record)
                yield record


def _turns_of(step: int, phase: Phase, scenes: list[Scene], rng: np.random.Generator) -> Turns:
    asked = [choose(scene, phase.turns, rng, phase.focus) for scene in scenes]
    if step % TALK_EVERY == TALK_EVERY - 1:
        return conversation([clip[:8] for clip in asked])
    return separate(asked)


def build_answerer(tower_folder: Path, seed: int, start: Path | None = None) -> tuple[Answerer, Eye]:
    """The language model, untrained but for the word embeddings of the first stage or as saved, and the eye."""
    eye, embeddings = load_eye(tower_folder, seed)
    torch.manual_seed(seed + 1)
    if start is not None:
        saved = LlavaOnevisionForConditionalGeneration.from_pretrained(start / VIDEO_LLM, dtype=torch.float32)
        model = Answerer(saved)
        # The folder of a training also has the auxiliary heads, which the saved models lack.
        Checkpoint(start / "answerer").load({"answerer": model}, {})
        return model, eye
    llm = video_llm()
    with torch.no_grad():
        llm.get_input_embeddings().weight.copy_(embeddings)
        for name, parameter in llm.model.language_model.named_parameters():
            # Small outputs of every block at first: the residual stream begins as the word-like visual tokens.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.3)
    return Answerer(llm), eye


def _weights(turns: Turns, of_family: dict[str, float]) -> torch.Tensor:
    """How much each turn counts, ``[B, K]``: 1 for families that are not named."""
    return torch.tensor([[of_family.get(name, 1.0) for name in names] for names in turns.families])


def _loss(logits: torch.Tensor, targets: torch.Tensor, turns: Turns, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; the token that ends an answer is easy and counts a tenth."""
    each = F.cross_entropy(logits, targets, reduction="none")
    clip, turn, _ = (turns.targets != IGNORED).nonzero(as_tuple=True)
    weight = torch.where(targets == _end(), 0.1, 1.0) * weights[clip, turn]
    return (each * weight).sum() / weight.sum()


def _end() -> int:
    return token_ids("<|im_end|>")[0]


class Tally:
    """Running loss and accuracy per family."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.right: dict[str, list[int]] = defaultdict(list)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, turns: Turns) -> None:
        """Note one step."""
        self.losses.append(float(loss.detach()))
        answers = targets != _end()
        right = (logits.argmax(-1) == targets)[answers].tolist()
        rows = (turns.targets != IGNORED).nonzero()[answers.nonzero()[:, 0]]
        for hit, (i, j, _) in zip(right, rows.tolist(), strict=True):
            self.right[turns.families[i][j]].append(hit)

    def close(self) -> dict[str, float]:
        """Averages since the last call."""
        found = {"loss": sum(self.losses) / max(1, len(self.losses))}
        found |= {name: float(np.mean(self.right[name])) for name in (*FAMILIES, "conversation") if self.right[name]}
        self.losses.clear()
        self.right.clear()
        return found


class Examination:
    """Accuracy on clips of the validation split, every visual token present."""

    def __init__(self, eye: Eye, clips: int = 32) -> None:
        self.eye, self.clips = eye, clips
        self.cache: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: Answerer, frames: int) -> dict[str, float]:
        """Accuracy per family."""
        if frames not in self.cache:
            scenes = [scene_of("validation", i, frames) for i in range(self.clips)]
            self.cache = {frames: encode_clips(self.eye, scenes)}
        tally, rng = Tally(), np.random.default_rng(1)
        for begin in range(0, self.clips, 8):
            features = self.cache[frames][begin : begin + 8]
            asked = [choose(scene_of("validation", begin + i, frames), 64, rng) for i in range(len(features))]
            turns = separate(asked)
            with autocast():
                logits = model(features.flatten(1, 2), turns)[0].float()
            targets = turns.targets[turns.targets != IGNORED]
            tally.add(_loss(logits, targets, turns, _weights(turns, {})), logits, targets, turns)
        return tally.close()
