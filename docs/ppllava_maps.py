"""Draws ``docs/img/ppllava_maps.png``: one clip, two questions, and how well each patch fits either of them.

python docs/ppllava_maps.py [--model FOLDER] [--clip NUMBER]

Without a folder the bundled pair and video LLM are put together, untrained. Printed beside it: the share of the
relevance (the softmax over the whole clip that pooling weighs with) that lies on what each question names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tokensieve.models.ppllava import assemble, assemble_processor, register, relevance_map
from tokensieve.world import bundled, scene_of
from tokensieve.world.draw import draw
from tokensieve.world.scene import Scene

SHOWN = 8


def parts(folder: Path | None) -> tuple[Any, Any]:
    """A model and its processor."""
    register()
    if folder is not None:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(
            folder
        )
    base = AutoModelForImageTextToText.from_pretrained(bundled(), dtype=torch.float32)
    pair = AutoModel.from_pretrained(bundled("clip-pair"), dtype=torch.float32)
    words = AutoProcessor.from_pretrained(bundled())
    model = assemble(pair, base=base, weighting="window_renorm").float()
    question_words = AutoTokenizer.from_pretrained(bundled("clip-pair"))
    pixels = {"image_mean": words.video_processor.image_mean, "image_std": words.video_processor.image_std}
    processor = assemble_processor(model, words.tokenizer, question_words, chat_template=words.chat_template, **pixels)
    return model, processor


@torch.no_grad()
def cosines(model: Any, processor: Any, frames: np.ndarray, question: str) -> np.ndarray:
    """The map ``[T, h, w]`` of one question."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos=[frames])
    return model(**inputs, output_visual_attention=True).visual_attention[0][0].numpy()


def place_of(scene: Scene, index: int, frame: int, side: int, pixels: int) -> np.ndarray | None:
    """Which patches ``[side, side]`` an object covers, or None while it is not there."""
    thing = scene.things[index]
    if not thing.first <= frame < thing.stop:
        return None
    centre = np.asarray(thing.start) + frame * np.asarray(thing.velocity)
    middles = (np.arange(side) + 0.5) * pixels / side
    reach = thing.radius + pixels / side / 2
    return (np.abs(middles - centre[1]) < reach)[:, None] & (np.abs(middles - centre[0]) < reach)[None]


def share_on(relevance: np.ndarray, scene: Scene, index: int, pixels: int) -> tuple[float, float]:
    """Share of the relevance on the patches of an object, and the share that these are of all patches."""
    there = [place_of(scene, index, frame, relevance.shape[1], pixels) for frame in range(len(relevance))]
    mask = np.stack([np.zeros(relevance.shape[1:], bool) if one is None else one for one in there])
    return float(relevance[mask].sum()), float(mask.mean())


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="folder of a PPLLaVA model")
    parser.add_argument("--clip", type=int, default=2, help="of the test split")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "img" / "ppllava_maps.png")
    arguments = parser.parse_args()
    model, processor = parts(arguments.model)
    scene = scene_of("test", arguments.clip, arguments.frames)
    frames = draw(scene)
    mover = next(i for i, thing in enumerate(scene.things) if thing.role == "mover")
    event = next(i for i, thing in enumerate(scene.things) if thing.role == "event")
    asked = [
        (f"which way does the {scene.things[mover].name} move?", mover),
        (f"in which quarter does the {scene.things[event].name} appear?", event),
    ]
    shown = np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)
    figure = Figure(figsize=(1.35 * SHOWN, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, SHOWN)
    for column, frame in enumerate(shown):
        axes[0, column].imshow(frames[frame])
        axes[0, column].set_title(f"frame {frame}", fontsize=8)
    for row, (question, index) in enumerate(asked, 1):
        cosine = cosines(model, processor, frames, question)
        scale = model.model.prompt_alignment.logit_scale.detach().exp()
        share, even = share_on(relevance_map(torch.from_numpy(cosine), scale).numpy(), scene, index, frames.shape[1])
        print(f"{question} {share:.1%} of the relevance lies on it; its patches are {even:.1%} of all")
        low, high = np.quantile(cosine, 0.5), cosine.max()
        for column, frame in enumerate(shown):
            axes[row, column].imshow(frames[frame].mean(-1), cmap="gray", vmin=0, vmax=400)
            heat = cosine[frame].repeat(8, 0).repeat(8, 1)
            strength = np.clip((heat - low) / (high - low), 0, 1)
            axes[row, column].imshow(heat, cmap="inferno", vmin=low, vmax=high, alpha=0.15 + 0.75 * strength)
        axes[row, SHOWN // 2].set_title(question, fontsize=10, x=0, ha="center")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
