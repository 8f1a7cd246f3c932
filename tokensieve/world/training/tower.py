"""First stage: the CLIP pair, the projector and the word embeddings, on single frames.

Three losses share one pass of the image tower: captions against frames (class token, as CLIP), phrases against patches
(so that the shared space also says *where*), and the words of each pooled token through the projector of the video LLM
against its word embeddings (so that the LLM starts from visual tokens that resemble words it knows). A small head that
is dropped afterwards reads row and column from each pooled token, so that the projector does not discard them; a
penalty keeps them quiet, where they would drown everything else.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel, LlavaOnevisionForConditionalGeneration

from tokensieve.world.draw import draw
from tokensieve.world.models import CLIP_PAIR, MEAN, POOLED, STD, VIDEO_LLM, WIDTH, clip_pair, tokenizer, video_llm
from tokensieve.world.scene import crowd, scene_of
from tokensieve.world.training import attention
from tokensieve.world.training.labels import CELL_WORDS, PHRASES, label, phrase_sentences
from tokensieve.world.training.optimise import optimisers, set_rate
from tokensieve.world.training.precision import autocast
from tokensieve.world.training.state import Checkpoint, append_log

BATCH = 64

PLACE_SHARE, PLACE_WEIGHT = 0.1, 10.0
"""Share of the variance of visual tokens that row and column may have, and the weight of what lies above."""


class Frames(Dataset):
    """Batches of labelled frames by step: three quarters crowded single frames, one quarter frames of clips."""

    def __init__(self, first: int, stop: int, seed: int, batch: int = BATCH) -> None:
        self.first, self.stop, self.seed, self.batch = first, stop, seed, batch
        self.words = tokenizer(for_clip=True)

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        if item >= len(self):
            raise IndexError(item)
        step = self.first + item
        rng = np.random.default_rng((7, self.seed, step))
        frames, labels = [], []
        for i in range(self.batch):
            if i % 4:
                scene, at = crowd((self.seed, step, i)), 0
                frames.append(draw(scene)[0])
            else:
                scene = scene_of("train", int(rng.integers(1 << 30)), 4)
                at = int(rng.integers(4))
                frames.append(draw(scene)[at])
            labels.append(label(scene, at, rng))
        captions = self._encode([one.caption for one in labels])
        phrases = self._encode(phrase_sentences(rng))
        return {
            "frames": torch.from_numpy(np.stack(frames)),
            "words": torch.from_numpy(np.stack([one.words for one in labels])),
            "patches": torch.from_numpy(np.stack([one.patches for one in labels])),
            **{f"caption_{k}": v for k, v in captions.items()},
            **{f"phrase_{k}": v for k, v in phrases.items()},
        }

    def _encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        found = self.words(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def normalised(frames: torch.Tensor) -> torch.Tensor:
    """``uint8 [..., H, W, 3]`` to the normalised ``float32 [..., 3, H, W]`` that the tower reads."""
    scaled = (frames.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.movedim(-1, -3).contiguous()


class TowerStage(nn.Module):
    """The trained parts of the first stage: ``clip``, and ``projector`` and ``embeddings`` of the video LLM."""

    def __init__(self, clip: CLIPModel, llm: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.clip = clip
        self.projector = llm.model.multi_modal_projector
        self.embeddings = llm.get_input_embeddings()
        self.bias = nn.Parameter(torch.full((len(CELL_WORDS),), -3.0))
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.places = nn.Linear(WIDTH, 2 * POOLED)
        self.patch_scale = nn.Parameter(torch.tensor(2.0))
        ids = tokenizer().convert_tokens_to_ids(list(CELL_WORDS))
        self.register_buffer("word_ids", torch.tensor(ids))

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses and accuracies of one batch."""
        vision = self.clip.vision_model(pixel_values=normalised(batch["frames"]), output_hidden_states=True)
        patches = vision.hidden_states[-2][:, 1:]
        if not patches.requires_grad:
            return self._words(patches, batch["words"])
        return {
            **self._words(patches, batch["words"]),
            **self._phrases(patches, batch),
            **self._captions(vision.pooler_output, batch),
        }

    def _words(self, patches: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = pooled(self.projector(patches))
        rows, columns = self.places(tokens).float().split(POOLED, -1)
        along = torch.arange(POOLED).expand(len(tokens), POOLED, POOLED)
        place = F.cross_entropy(rows.flatten(0, 1), along.transpose(1, 2).flatten())
        place = place + F.cross_entropy(columns.flatten(0, 1), along.flatten())
        table = self.embeddings(self.word_ids)
        logits = (tokens @ table.T).float() * self.scale + self.bias
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / target.sum()
        with torch.no_grad():
            there = target.sum(-1) == 3
            top = logits[there].topk(3, -1).indices
            right = target[there].gather(-1, top).sum(-1) == 3
        return {"words": loss, "words_right": right.float().mean(), "places": place, "place_share": place_share(tokens)}

    def _phrases(self, patches: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image = self.clip.visual_projection(self.clip.vision_model.post_layernorm(patches))
        text = self.clip.text_projection(self._text(batch, "phrase"))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        target = batch["patches"]
        empty = len(PHRASES) - 1
        # As many empty patches as others are enough; every ninth of them is about that.
        chosen = (target >= 0) & ((target != empty) | (torch.arange(target.shape[1]) * 5 % 9 == 0))
        logits = image[chosen] @ text.T * self.patch_scale.exp()
        right = (logits.argmax(-1) == target[chosen])[target[chosen] != empty]
        return {"phrases": F.cross_entropy(logits, target[chosen]), "phrases_right": right.float().mean()}

    def _captions(self, pooled_image: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image = F.normalize(self.clip.visual_projection(pooled_image).float(), dim=-1)
        text = F.normalize(self.clip.text_projection(self._text(batch, "caption")).float(), dim=-1)
        logits = image @ text.T * self.clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"captions": loss, "captions_right": (logits.argmax(-1) == target).float().mean()}

    def _text(self, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return self.clip.text_model(
            input_ids=batch[f"{kind}_input_ids"], attention_mask=batch[f"{kind}_attention_mask"]
        ).pooler_output


def pooled(tokens: torch.Tensor) -> torch.Tensor:
    """Pool ``[B, 144, D]`` to ``[B, 36, D]`` as LLaVA-OneVision does with frames: the mean of 2 x 2."""
    grid = tokens.unflatten(1, (POOLED, 2, POOLED, 2))
    return grid.mean((2, 4)).flatten(1, 2)


def place_share(tokens: torch.Tensor) -> torch.Tensor:
    """Share of the variance of tokens ``[B, 36, D]`` that the cell alone explains, over many frames."""
    tokens = tokens.float()
    middle = tokens.mean((0, 1))
    return (tokens.mean(0) - middle).square().mean(0).sum() / (tokens - middle).square().mean((0, 1)).sum()


def build(seed: int) -> tuple[TowerStage, LlavaOnevisionForConditionalGeneration]:
    """The untrained stage and the video LLM whose projector and embeddings it trains."""
    torch.manual_seed(seed)
    clip, llm = clip_pair(), video_llm()
    clip.vision_model.config._attn_implementation = attention.NAME
    nn.init.normal_(llm.get_input_embeddings().weight, std=WIDTH**-0.5)
    return TowerStage(clip, llm), llm


def take_over(stage: TowerStage, start: Path) -> None:
    """Load a saved CLIP pair and the projector and embeddings of a saved video LLM; only the projector learns."""
    clip = CLIPModel.from_pretrained(start / CLIP_PAIR, dtype=torch.float32)
    llm = LlavaOnevisionForConditionalGeneration.from_pretrained(start / VIDEO_LLM, dtype=torch.float32)
    stage.clip.load_state_dict(clip.state_dict())
    stage.projector.load_state_dict(llm.model.multi_modal_projector.state_dict())
    stage.embeddings.load_state_dict(llm.get_input_embeddings().state_dict())
    stage.clip.requires_grad_(False)
    stage.embeddings.requires_grad_(False)


def train_tower(
    folder: Path,
    steps: int,
    seed: int = 0,
    *,
    start: Path | None = None,
    batch: int = BATCH,
    every: int = 100,
    save_every: int = 1,
) -> Iterator[dict[str, float]]:
    """Train the first stage, going on from a checkpoint in ``folder`` if there is one.

    Parameters
    ----------
    folder
        Checkpoints and the log.
    steps
        Steps in all; the learning rate falls towards the last.
    seed
        Of weights and data.
    start
        Folder of saved models to go on from; then the CLIP pair and the word embeddings stay as they are and the
        projector alone is trained.
    batch
        Frames per step.
    every, save_every
        Steps between records of the log, and between checkpoints.

    Yields
    ------
    dict
        Averages since the record before.
    """
    stage, _ = build(seed)
    if start is not None:
        take_over(stage, start)
    found = optimisers([stage], muon=4e-3, adam=2e-3)
    checkpoint = Checkpoint(folder)
    done = checkpoint.load({"stage": stage}, found)
    loader = DataLoader(Frames(done, steps, seed, batch), batch_size=None, num_workers=1, prefetch_factor=4)
    began = time.monotonic()
    sums: dict[str, list[float]] = defaultdict(list)
    for step, frames in enumerate(loader, start=done):
        factor = set_rate(found, step, steps)
        with autocast():
            parts = stage.losses(frames)
            loss = parts["words"] + parts["places"] + PLACE_WEIGHT * F.relu(parts["place_share"] - PLACE_SHARE)
            if "phrases" in parts:
                loss = loss + parts["phrases"] + 0.2 * parts["captions"]
        loss.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        for optimiser in found.values():
            optimiser.step()
            optimiser.zero_grad()
        for name, value in parts.items():
            sums[name].append(float(value.detach()))
        last = step + 1 == steps
        if last or (step + 1) % save_every == 0:
            checkpoint.save(step + 1, {"stage": stage}, found)
        if last or (step + 1) % every == 0:
            record = {"step": step + 1, "rate": factor, "seconds": time.monotonic() - began}
            record |= {name: sum(values) / len(values) for name, values in sums.items()}
            sums.clear()
            append_log(folder / "log.jsonl", record)
            yield record
