"""PPLLaVA trained on the bundled world: does the question help at equal tokens?

    python -m benchmarks.ppllava_world --work FOLDER [--clips 480] [--test-clips 300]

Models start from the same contrastive pair and the same video LLM, see the same clips and questions in the same
order for as many steps, and differ in their pooling alone: guided by the question (two weightings), plain average,
fewer patches or frames, all tokens. A model is trained on three window sizes in turn and asked with each of them: 18,
9 and 4 times fewer tokens. Then the guided model goes on with prompts that are longer than the context of the text
tower, with and without its extension. All answer the same test questions, and differences are tested pairwise on them.
A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarks.ppllava_cached import Reader, answer_loss, encode, lengthened, right_answers
from benchmarks.ppllava_world_report import Answered, report
from benchmarks.results import RESULTS
from tokensieve.models.ppllava import assemble, assemble_processor
from tokensieve.train.freeze import set_trainable
from tokensieve.world import bundled
from tokensieve.world.items import WorldItem, items
from tokensieve.world.questions import Question
from tokensieve.world.scene import scene_of
from tokensieve.world.training.optimise import optimisers
from tokensieve.world.training.state import Checkpoint, append_log
from tokensieve.world.training.turns import choose

__all__ = ["MODELS", "Model", "main"]

KERNELS = {"18x": (2, 3, 3), "9x": (1, 3, 3), "4x": (1, 2, 2)}
ONE = (1, 1, 1)
ORDER = ("18x", "9x", "18x", "4x")
"""Window sizes of the training steps, in turn."""

TOGETHER = 4
"""Clips of a step."""

SAVE_EVERY = 20
GUIDED = "guided, window_renorm"
LONG_NAMES = {True: "guided, context extended", False: "guided, context as it was"}
LONG_AVERAGE = "average, long prompts"


@dataclass(frozen=True)
class Model:
    """One way to make few tokens of a clip.

    Attributes
    ----------
    kind : str
        ``"pool"``, or without pooling: ``"subsample"`` (the middle patch of every window), ``"frames"`` (some whole
        frames, as many as come nearest to the tokens of the pooled clip), ``"all"`` (every token).
    weighting : str
        Of the pooling.
    """

    kind: str = "pool"
    weighting: str = "average"

    def at(self, ratio: str, features: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Features ``[T', N, Dv]`` and window that a clip ``[T, N, Dv]`` is shown with."""
        kernel = KERNELS[ratio]
        if self.kind == "all":
            return features, ONE
        if self.kind != "frames":
            return features, kernel
        count = max(1, round(len(features) / (kernel[0] * kernel[1] * kernel[2])))
        picks = [int((number + 0.5) * len(features) / count) for number in range(count)]
        return features[picks], ONE


MODELS: dict[str, Model] = {
    GUIDED: Model(weighting="window_renorm"),
    "average": Model(),
    "subsampled patches": Model("subsample"),
    "guided, window_softmax (released)": Model(weighting="window_softmax"),
    "all tokens": Model("all"),
    "subsampled frames": Model("frames"),
}


@dataclass(frozen=True)
class Parts:
    """What all models start from, and the clips that all are trained on and asked about."""

    arguments: argparse.Namespace
    train: Tensor
    test: Tensor
    test_items: list[list[WorldItem]]


def build(folders: tuple[Path, Path], kind: Model, extend: bool = True) -> Reader:
    """A model in its first state, from the folders of a contrastive pair and of a video LLM."""
    pair = AutoModel.from_pretrained(folders[0], dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(folders[1], dtype=torch.float32)
    model = assemble(pair, base=base, extend=extend, weighting=kind.weighting).float()
    words = AutoProcessor.from_pretrained(folders[1])
    processor = assemble_processor(
        model,
        words.tokenizer,
        AutoTokenizer.from_pretrained(folders[0]),
        image_mean=words.video_processor.image_mean,
        image_std=words.video_processor.image_std,
        chat_template=words.chat_template,
    )
    return Reader(model, processor, subsample=kind.kind == "subsample")


def batches(parts: Parts, long: bool, steps: int) -> Iterator[tuple[int, list[int], list[list[Question]]]]:
    """Clips and questions of every step; the same for every model."""
    clips, frames = parts.train.shape[:2]
    order = np.concatenate([np.random.default_rng((3, number)).permutation(clips) for number in range(64)])
    for step in range(steps):
        rng = np.random.default_rng((4, int(long), step))
        chosen = [int(clip) for clip in order[step * TOGETHER : (step + 1) * TOGETHER]]
        asked = [choose(scene_of("train", clip, frames), parts.arguments.questions, rng) for clip in chosen]
        yield step, chosen, [lengthened(clip, rng) for clip in asked] if long else asked


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: rises over a tenth of the steps, then falls to nothing."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def teach(reader: Reader, model: Model, parts: Parts, folder: Path, steps: int, long: bool) -> None:
    """Train one model, going on from its checkpoint if there is one."""
    groups = ["language_model", "projector", "alignment", *(["text_tower"] if long else [])]
    set_trainable(reader.model, groups)
    peak = parts.arguments.learning_rate
    found = optimisers([reader.model], muon=peak, adam=peak / 2)
    checkpoint = Checkpoint(folder)
    done = checkpoint.load({"model": reader.model}, found)
    began = time.process_time()
    for step, chosen, asked in batches(parts, long, steps):
        if step < done:
            continue
        factor = rate(step, steps)
        for optimiser in found.values():
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
        ratio = "18x" if long else ORDER[step % len(ORDER)]
        shown = [model.at(ratio, parts.train[clip]) for clip in chosen]
        loss = answer_loss(reader, [clip for clip, _ in shown], asked, shown[0][1])
        loss.backward()
        nn.utils.clip_grad_norm_([value for value in reader.model.parameters() if value.requires_grad], 1.0)
        for optimiser in found.values():
            optimiser.step()
            optimiser.zero_grad()
        append_log(
            folder / "log.jsonl",
            {"step": step, "ratio": ratio, "loss": float(loss.detach()), "seconds": time.process_time() - began},
        )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            checkpoint.save(step + 1, {"model": reader.model}, found)


def examine(reader: Reader, model: Model, parts: Parts, ratio: str, long: bool = False) -> tuple[list[bool], int]:
    """Right answers to the test questions, and the visual tokens that they saw."""
    right: list[bool] = []
    tokens = 0
    for start in range(0, len(parts.test), TOGETHER):
        shown = [model.at(ratio, clip) for clip in parts.test[start : start + TOGETHER]]
        asked = []
        for number in range(start, start + len(shown)):
            clip = [_question(item) for item in parts.test_items[number]]
            asked.append(lengthened(clip, np.random.default_rng((6, number))) if long else clip)
        clips, kernel = [clip for clip, _ in shown], shown[0][1]
        right += right_answers(reader, clips, asked, kernel)
        count, rows, columns = reader.processor.pooled(len(clips[0]), kernel)
        tokens = count * rows * columns
    return right, tokens


def _question(item: WorldItem) -> Question:
    return Question(item.family, item.question, item.candidates, item.answer)


def _kept(folder: Path, key: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run with the same settings has found, or what ``make`` finds."""
    file = folder / "answers.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        if stored["settings"] == key:
            return stored["answers"]
    answers = make()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": key, "answers": answers}))
    return answers


def _folder(parts: Parts, name: str) -> Path:
    return parts.arguments.work / "".join(c if c.isalnum() else "-" for c in name)


def _short(parts: Parts, name: str, model: Model) -> dict[str, Any]:
    """Answers of one model before and after its training, by window size."""
    arguments, found = parts.arguments, {}
    reader = build((arguments.pair, arguments.base), model)
    ratios = ["18x"] if model.kind == "all" else list(KERNELS)
    for ratio in ratios:
        found[f"{ratio} untrained"] = examine(reader, model, parts, ratio)
    teach(reader, model, parts, _folder(parts, name), arguments.steps, False)
    for ratio in ratios:
        found[ratio] = examine(reader, model, parts, ratio)
    _save(reader, _folder(parts, name))
    return found


def _save(reader: Reader, folder: Path) -> None:
    """The model as transformers loads it; not where another model only goes on from it."""
    reader.model.model.language_model.config._attn_implementation = "sdpa"
    reader.model.save_pretrained(folder / "model")
    reader.processor.save_pretrained(folder / "model")


def _long(parts: Parts, name: str, model: Model, start: str, extend: bool) -> dict[str, Any]:
    """Answers to long prompts of a trained model that went on with such prompts."""
    arguments = parts.arguments
    reader = build((arguments.pair, arguments.base), model, extend)
    before = build((arguments.pair, arguments.base), model)
    Checkpoint(_folder(parts, start)).load({"model": before.model}, {})
    # Only the first positions have been in use; the tables of both lengths agree in them.
    weights = {key: value for key, value in before.model.state_dict().items() if "position_embedding" not in key}
    reader.model.load_state_dict(weights, strict=False)
    found = {"18x untrained": examine(reader, model, parts, "18x", long=True)}
    teach(reader, model, parts, _folder(parts, name), arguments.long_steps, True)
    found["18x"] = examine(reader, model, parts, "18x", long=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppllava_world", description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=Path, default=None, help="folder of the CLIP pair; the bundled one")
    parser.add_argument("--base", type=Path, default=None, help="folder of the video LLM; the bundled one")
    parser.add_argument("--work", type=Path, required=True, help="folder for features, checkpoints and answers")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="starts of names")
    parser.add_argument("--clips", type=int, default=480, help="training clips")
    parser.add_argument("--questions", type=int, default=8, help="per clip and step, at most")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=240, help=f"of {TOGETHER} clips")
    parser.add_argument("--long-steps", type=int, default=60, help="further ones on long prompts; 0 leaves them out")
    parser.add_argument("--test-clips", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Muon; half of it for AdamW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.pair = arguments.pair or bundled("clip-pair")
    arguments.base = arguments.base or bundled("video-llm")
    chosen = {name: MODELS[name] for name in MODELS if any(name.startswith(start) for start in arguments.models)}
    if not chosen:
        parser.error(f"--models chooses none of {', '.join(MODELS)}")
    parts = _prepare(arguments)
    keys = ("clips", "questions", "frames", "steps", "test_clips", "learning_rate")
    settings = [getattr(arguments, key) for key in keys]
    answers: dict[str, dict[str, Any]] = {}
    for name, model in chosen.items():
        answers[name] = _kept(_folder(parts, name), settings, partial(_short, parts, name, model))
        _report(parts, answers)
    long = [*settings, arguments.long_steps]
    plans = [(LONG_NAMES[extend], MODELS[GUIDED], GUIDED, extend) for extend in (True, False)]
    plans.append((LONG_AVERAGE, MODELS["average"], "average", True))
    for name, model, start, extend in plans if arguments.long_steps else []:
        if start in chosen:
            make = partial(_long, parts, name, model, start, extend)
            answers[name] = _kept(_folder(parts, name), long, make)
            _report(parts, answers)
    return 0


def _prepare(arguments: argparse.Namespace) -> Parts:
    reader = build((arguments.pair, arguments.base), Model())
    sets = {
        split: encode(reader.model, split, clips, arguments.frames, arguments.work / f"{split}-{clips}.safetensors")
        for split, clips in (("train", arguments.clips), ("test", arguments.test_clips))
    }
    asked: dict[str, list[WorldItem]] = {}
    for item in items("test", arguments.test_clips, per_clip=4, frames=arguments.frames):
        asked.setdefault(item.clip, []).append(item)
    return Parts(arguments, sets["train"], sets["test"], list(asked.values()))


def _report(parts: Parts, answers: dict[str, dict[str, Any]]) -> None:
    """Tables of all that is known so far."""
    test = [item for clip in parts.test_items for item in clip]
    found = [
        Answered(model, name.split()[0], "untrained" not in name, tokens, tuple(right))
        for model, by_ratio in answers.items()
        for name, (right, tokens) in by_ratio.items()
    ]
    report(parts.arguments, test, found, (*LONG_NAMES.values(), LONG_AVERAGE), GUIDED)


if __name__ == "__main__":
    sys.exit(main())
