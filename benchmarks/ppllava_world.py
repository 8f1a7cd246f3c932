"""PPLLaVA trained on the bundled world: does the question help at equal tokens?

    python -m benchmarks.ppllava_world --pair CLIP --base MODEL --work FOLDER [--clips 4000] [--epochs 2]

Models are trained from the same contrastive pair and the same video LLM on the same clips, and differ in their pooling
alone: guided by the question (released and stronger weighting), plain average, fewer frames, all tokens. Every model
answers the same test questions; differences are tested pairwise on them. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bench.statistics import mcnemar, wilson
from tokensieve.models.ppllava import PPLlavaProcessor, assemble, assemble_processor
from tokensieve.models.ppllava.modeling import PPLlavaForConditionalGeneration
from tokensieve.train import TrainConfig, train
from tokensieve.train.world import WorldSamples
from tokensieve.world.items import WorldItem, items

__all__ = ["VARIANTS", "Variant", "main"]

COLUMNS = ("model", "tokens", "accuracy", "95 %", "against average at equal tokens", "p")
PLACES = ("moment", "one-frame", "reading", "spatial", "two-places", "attributes")
"""Families whose answer lies at one place or moment of the clip."""


@dataclass(frozen=True)
class Variant:
    """One way to pool.

    Attributes
    ----------
    kernel
        Window and stride.
    weighting, temperature
        Of the pooling.
    share
        Frames of the clip that are shown: one of so many.
    extend
        Whether the context of the text tower is stretched.
    """

    kernel: tuple[int, int, int]
    weighting: str = "window_softmax"
    temperature: float = 0.01
    share: int = 1
    extend: bool = True


def _at(kernel: tuple[int, int, int], factor: str) -> dict[str, Variant]:
    return {
        f"average {factor}": Variant(kernel, "average"),
        f"guided {factor}": Variant(kernel),
        f"guided {factor}, temperature 0.001": Variant(kernel, temperature=0.001),
        f"guided {factor}, renormalised": Variant(kernel, "window_renorm"),
    }


VARIANTS: dict[str, Variant] = {
    **_at((2, 3, 3), "18x"),
    **_at((1, 3, 3), "9x"),
    **_at((1, 2, 2), "4x"),
    "guided 18x, renormalised, context as it was": Variant((2, 3, 3), "window_renorm", extend=False),
    "one frame of 16": Variant((1, 1, 1), "average", share=16),
    "two frames of 16": Variant((1, 1, 1), "average", share=8),
    "four frames of 16": Variant((1, 1, 1), "average", share=4),
    "all tokens": Variant((1, 1, 1), "average"),
}
"""Models that are compared; a start of a name chooses several on the command line."""


def build(
    variant: Variant, pair: Any, base: Any, words: Any
) -> tuple[PPLlavaForConditionalGeneration, PPLlavaProcessor]:
    """A model of a variant and its processor; ``words`` are the base model's processor and the pair's tokenizer."""
    processor, question_tokenizer = words
    model = assemble(
        pair,
        base=base,
        extend=variant.extend,
        video_kernel=variant.kernel,
        weighting=variant.weighting,
        pooling_temperature=variant.temperature,
    ).float()
    pixels = processor.video_processor
    made = assemble_processor(
        model,
        processor.tokenizer,
        question_tokenizer,
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
        chat_template=processor.chat_template,
    )
    return model, made


def thinned(clip: Any, share: int) -> Any:
    """One frame of so many, from the middle of each stretch."""
    return clip[min(share // 2, len(clip) - 1) :: share].copy()


class Thinned:
    """A data set of which every clip shows one frame of so many."""

    def __init__(self, inner: WorldSamples, share: int) -> None:
        self.inner, self.share = inner, share

    def set_epoch(self, epoch: int) -> None:
        """Go on to the clips of an epoch."""
        self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        sample = self.inner[index]
        sample.videos = [thinned(clip, self.share) for clip in sample.videos]
        return sample


@torch.no_grad()
def ask(model: Any, processor: Any, asked: Sequence[WorldItem], variant: Variant, batch: int = 8) -> list[bool]:
    """Whether each question is answered word for word; questions about one clip share its encoding."""
    right: list[bool] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        clips: dict[str, Any] = {}
        for item in part:
            clips.setdefault(item.clip, thinned(item.read_frames()[0], variant.share))
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": item.question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for item in part
        ]
        inputs = processor(text=texts, videos=[clips[item.clip] for item in part], padding_side="left")
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        right += [given.strip() == item.answer for given, item in zip(answers, part, strict=True)]
    return right


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppllava_world", description=__doc__.splitlines()[0])
    parser.add_argument("--pair", required=True, help="folder of the CLIP pair")
    parser.add_argument("--base", required=True, help="folder of the video LLM")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and answers")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="starts of names")
    parser.add_argument("--clips", type=int, default=4000, help="training clips of an epoch")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--test-clips", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    chosen = {name: VARIANTS[name] for name in VARIANTS if any(name.startswith(start) for start in arguments.variants)}
    if not chosen:
        parser.error(f"--variants chooses none of {', '.join(VARIANTS)}")
    test = items("test", arguments.test_clips, frames=arguments.frames)
    answers: dict[str, list[bool]] = {}
    tokens: dict[str, int] = {}
    for name, variant in chosen.items():
        answers[name], tokens[name] = _one(name, variant, arguments, test)
    _report(arguments, chosen, test, answers, tokens)
    return 0


def _one(
    name: str, variant: Variant, arguments: argparse.Namespace, test: Sequence[WorldItem]
) -> tuple[list[bool], int]:
    """Train and test one variant, or read what an earlier run found."""
    folder = arguments.work / name.replace(" ", "-").replace(",", "")
    file = folder / "answers.json"
    settings = [arguments.clips, arguments.epochs, arguments.frames, arguments.test_clips, arguments.learning_rate]
    if file.is_file():
        stored = json.loads(file.read_text())
        if stored["settings"] == settings:
            return stored["right"], stored["tokens"]
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    pair = AutoModel.from_pretrained(arguments.pair, dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(arguments.base, dtype=torch.float32)
    words = AutoProcessor.from_pretrained(arguments.base), AutoTokenizer.from_pretrained(arguments.pair)
    model, processor = build(variant, pair, base, words)
    config = TrainConfig(
        output=str(folder),
        epochs=arguments.epochs,
        batch=arguments.batch,
        accumulation=1,
        learning_rate=arguments.learning_rate,
        precision="fp32",
        gradient_checkpointing=False,
        workers=0,
        log_steps=20,
        save_steps=200,
        trainable=["language_model", "projector", "alignment", "newline"],
        trainer={"use_cpu": True},
    )
    data = Thinned(WorldSamples(arguments.clips, frames=arguments.frames), variant.share)
    resume = any(folder.glob("checkpoint-*"))
    result = train(config, model=model, processor=processor, dataset=data, resume=resume, show_progress=False)
    right = ask(result.model, processor, test, variant)
    count, rows, columns = processor.pooled(-(-arguments.frames // variant.share), variant.kernel)
    stored = {"settings": settings, "right": right, "tokens": count * rows * columns}
    file.write_text(json.dumps(stored))
    return right, stored["tokens"]


def _report(
    arguments: argparse.Namespace,
    chosen: dict[str, Variant],
    test: Sequence[WorldItem],
    answers: dict[str, list[bool]],
    tokens: dict[str, int],
) -> None:
    """Tables: all questions, and those about a place or a moment."""
    parts = []
    for title, families in (("all questions", None), ("questions about a place or a moment", PLACES)):
        places = [number for number, item in enumerate(test) if families is None or item.family in families]
        rows = []
        for name in chosen:
            right = [answers[name][number] for number in places]
            low, high = wilson(sum(right) / len(right), len(right))
            row = [name, str(tokens[name]), f"{sum(right) / len(right):.1%}", f"{low:.1%} to {high:.1%}"]
            yardstick = next(
                (other for other in chosen if other.startswith("average") and tokens[other] == tokens[name]), None
            )
            if yardstick in (None, name):
                row += ["", ""]
            else:
                before = [answers[str(yardstick)][number] for number in places]
                won = sum(b and not a for a, b in zip(before, right, strict=True))
                lost = sum(a and not b for a, b in zip(before, right, strict=True))
                row += [f"{(won - lost) / len(places):+.1%}", f"{mcnemar(lost, won):.3g}"]
            rows.append(row)
        show(f"PPLLaVA on the world: {title}", COLUMNS, rows)
        parts.append((title, COLUMNS, rows))
    families_right: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in chosen}
    for name, right in answers.items():
        for item, mark in zip(test, right, strict=True):
            families_right[name][item.family].append(mark)
    payload = {
        "machine": machine(),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "right": answers,
        "tokens": tokens,
        "families": {
            name: {family: sum(marks) / len(marks) for family, marks in found.items()}
            for name, found in families_right.items()
        },
    }
    notes = (
        "p: exact McNemar test on the same questions, against average pooling to as many tokens.",
        f"{len(test)} questions about {arguments.test_clips} clips that no training has seen.",
    )
    path = write(arguments.output, "ppllava_world", payload, "PPLLaVA trained on the bundled world", parts, notes)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
