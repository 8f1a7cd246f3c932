"""PPLLaVA on cached features of its frozen tower, with many questions per clip: the fast path of `ppllava_world`.

A clip goes through the tower once for all models and all steps. What a clip becomes without the question (average
pooling, fewer frames, all tokens) is read once by the language model and shared by the clip's questions, as in the
training of the bundled models; pooling that the question guides gives every question a sequence of its own.
`tests/world/test_ppllava_cached.py` shows that answers are those of the public path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from tokensieve.models.ppllava.pooling import prompt_guided_pool
from tokensieve.models.ppllava.relevance import cosine_map, relevance_map
from tokensieve.world.draw import draw
from tokensieve.world.questions import Question
from tokensieve.world.scene import scene_of
from tokensieve.world.training import attention
from tokensieve.world.training.precision import autocast
from tokensieve.world.training.tower import normalised
from tokensieve.world.training.turns import IGNORED, Turns, opening, separate, token_ids

__all__ = ["Reader", "answer_loss", "encode", "lengthened", "right_answers"]

SENTENCES = (
    "see the video and answer the question with a single word.",
    "you can see many objects in the video, and a texture in the background.",
    "this is a video of many objects on a moving background.",
    "any object can change colour at the end of the clip or in the middle.",
    "please find the object in the question and tell me the answer.",
    "the clip has many frames, and any object can move and appear.",
    "describe nothing, only answer with the word that you find.",
)
"""Instructions in the words of the world, which stand in front of the question in long prompts."""

LONG = 31
"""Tokens in front of the question of a long prompt, at least: all that the bundled text tower reads are 30, 66 when its
context is extended."""


@torch.no_grad()
def encode(model: Any, split: str, clips: int, frames: int, file: Path) -> Tensor:
    """Features of the tower, computed once and kept in ``file``.

    Parameters
    ----------
    model : PPLlavaForConditionalGeneration
        Gives the tower.
    split : str
        Of the world.
    clips, frames : int
        Clips from the first on, and frames of each.
    file : Path
        A safetensors file.

    Returns
    -------
    Tensor
        ``[clips, frames, N, Dv]`` in half precision.
    """
    if file.is_file():
        found = load_file(file)["features"]
        if found.shape[:2] == (clips, frames):
            return found
    parts = []
    for index in range(clips):
        pixels = normalised(torch.from_numpy(draw(scene_of(split, index, frames))))
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        parts.append(states[model.config.vision_feature_layer][:, 1:].half())
    file.parent.mkdir(parents=True, exist_ok=True)
    found = torch.stack(parts)
    save_file({"features": found}, file)
    return found


def lengthened(asked: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Questions of one clip as long prompts: an earlier question with its answer and instructions come first."""
    found = []
    for question in asked:
        other = asked[int(rng.integers(len(asked)))]
        words = [] if other is question else f"{other.text} {other.answer}.".split()
        for number in rng.permutation(len(SENTENCES)):
            if len(token_ids(" ".join(words))) < LONG:
                words += SENTENCES[int(number)].split()
        found.append(replace(question, text=" ".join([*words, question.text])))
    return found


class Reader(nn.Module):
    """A PPLLaVA model that answers questions about cached features.

    Parameters
    ----------
    model : PPLlavaForConditionalGeneration
        What is trained, shared with the caller.
    processor : PPLlavaProcessor
        Its tokenizers.
    subsample : bool
        Take the middle patch of every window instead of pooling it.
    """

    def __init__(self, model: Any, processor: Any, *, subsample: bool = False) -> None:
        super().__init__()
        self.subsample = subsample
        self.model = model
        self.processor = processor
        model.model.language_model.config._attn_implementation = attention.NAME

    def guided(self) -> bool:
        """Whether the question guides the pooling."""
        return bool(self.model.config.weighting != "average")

    def embed(self, questions: Sequence[str]) -> Tensor:
        """Questions in the joint space, as the text tower reads them (cut where its context ends)."""
        words = self.processor.question_tokenizer(
            list(questions),
            padding=True,
            truncation=True,
            max_length=self.processor.question_length,
            return_tensors="pt",
        )
        alignment = self.model.model.prompt_alignment
        learns = any(value.requires_grad for value in alignment.clip_text_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            pooled = alignment.clip_text_model(words["input_ids"], words["attention_mask"]).pooler_output
        return alignment.clip_text_projection(pooled)

    def visual(self, features: Tensor, questions: Sequence[str] | None, kernel: Sequence[int]) -> Tensor:
        """Visual tokens of one clip.

        Parameters
        ----------
        features : Tensor
            ``[T, N, Dv]``.
        questions : sequence of str, optional
            K questions; None averages.
        kernel : sequence of int
            Window and stride.

        Returns
        -------
        Tensor
            ``[K, tokens, D]``; K is 1 without questions.
        """
        config, inner = self.model.config, self.model.model
        grid = (config.side, config.side)
        window = (min(kernel[0], len(features)), kernel[1], kernel[2])
        projected = inner.multi_modal_projector(features)[None]
        if self.subsample:
            starts = zip((0, *(size // 2 for size in window[1:])), window, strict=True)
            picks = tuple(slice(first, None, step) for first, step in starts)
            return projected.unflatten(2, grid)[:, *picks].flatten(1, 3)
        if questions is None:
            return prompt_guided_pool(projected, grid=grid, kernel=window).flatten(1, 3)
        text = self.embed(questions)
        patches = inner.prompt_alignment.embed_patches(features)
        cosine = cosine_map(patches.expand(len(text), *patches.shape), text).unflatten(-1, grid)
        relevance = relevance_map(cosine, inner.prompt_alignment.logit_scale.detach().exp())
        return prompt_guided_pool(
            projected.expand(len(text), -1, -1, -1),
            relevance,
            grid=grid,
            kernel=window,
            weighting=config.weighting,
            temperature=config.pooling_temperature,
        ).flatten(1, 3)

    def forward(
        self, features: Sequence[Tensor], asked: Sequence[Sequence[Question]], kernel: Sequence[int]
    ) -> tuple[Tensor, Turns]:
        """Logits ``[B, K, L, V]`` (behind every token) of K questions about each of B clips, and their tokens."""
        turns = separate([list(clip) for clip in asked])
        texts = [[question.text for question in clip] for clip in asked]
        ids = turns.ids
        if self.guided():
            parts = [self.visual(clip.float(), text, kernel) for clip, text in zip(features, texts, strict=True)]
            # A row per question; clips may have a different number of them.
            rows = [(i, j) for i, clip in enumerate(texts) for j in range(len(clip))]
            places = torch.tensor(rows).T
            logits = self._answer(torch.cat(parts), ids[places[0], places[1]][:, None])[:, 0]
            found = logits.new_zeros(*ids.shape, logits.shape[-1])
            return found.index_put((places[0], places[1]), logits), turns
        visual = torch.cat([self.visual(clip.float(), None, kernel) for clip in features])
        return self._answer(visual, ids), turns

    def _answer(self, visual: Tensor, ids: Tensor) -> Tensor:
        """Logits of turns ``[B, K, L]`` that see the visual tokens ``[B, M, D]`` and themselves."""
        decoder = self.model.model.language_model
        batch, number, length = ids.shape
        table = decoder.embed_tokens
        start = table(torch.tensor(opening())).expand(batch, -1, -1)
        states = torch.cat([start, visual, table(ids).flatten(1, 2)], 1)
        size = states.shape[1] - number * length
        positions = torch.cat([torch.arange(size), (torch.arange(length) + size).repeat(number)])[None]
        last = decoder(
            inputs_embeds=states, position_ids=positions, use_cache=False, layout=(size, number, length)
        ).last_hidden_state
        return linear(last[:, size:], self.model.lm_head.weight).unflatten(1, (number, length))


def answer_loss(reader: Reader, features: Sequence[Tensor], asked: Any, kernel: Sequence[int]) -> Tensor:
    """Cross-entropy of the answers and their ends."""
    with autocast():
        logits, turns = reader(features, asked, kernel)
    wanted = turns.targets != IGNORED
    return cross_entropy(logits[wanted].float(), turns.targets[wanted])


@torch.no_grad()
def right_answers(reader: Reader, features: Sequence[Tensor], asked: Any, kernel: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives each answer word for word, clip after clip.

    That is so exactly if every token of the answer and its end is the most likely one behind those before it.
    """
    logits, turns = reader(features, asked, kernel)
    right = ((logits.argmax(-1) == turns.targets) | (turns.targets == IGNORED)).all(-1)
    return [bool(right[i, j]) for i, clip in enumerate(asked) for j in range(len(clip))]
