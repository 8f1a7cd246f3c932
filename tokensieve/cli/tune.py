"""``tokensieve tune``: find or train what single methods need for a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import MethodError

if TYPE_CHECKING:
    from tokensieve.cli._common import Loaded

tune_app = typer.Typer(help="Find or train what single methods need for a model.", no_args_is_help=True)

_MAX_BYTES = 1 << 28

Samples = Annotated[
    Path,
    typer.Option(
        "--samples",
        "-s",
        help='Prompts as JSON lines: {"video": path, "question": text}, and "answer" where the right one is known. '
        "Paths count from the file's folder.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)]


@dataclass(frozen=True)
class Line:
    """One prompt of a file of samples."""

    video: str
    question: str
    answer: str | None = None


def read_samples(path: Path) -> list[Line]:
    """Prompts of a JSON lines file; a MethodError names the line that is wrong."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise MethodError(f"{path} is larger than 256 MiB; pass a smaller set of samples.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MethodError(f"{path} cannot be read ({error}); pass a file of JSON lines.") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            video, question, answer = str(entry["video"]), str(entry["question"]), entry.get("answer")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MethodError(
                f'line {number} of {path} is no sample ({error}); write {{"video": ..., "question": ...}}.'
            ) from error
        if "://" not in video:
            video = str(path.parent / video)
        found.append(Line(video, question, None if answer is None else str(answer)))
    if not found:
        raise MethodError(f"{path} holds no samples; write one JSON object a line.")
    return found


def _inputs(loaded: Loaded, lines: list[Line], frames: int) -> Iterator[dict[str, Any]]:
    """Inputs of the model, prompt by prompt."""
    from tokensieve.cli import _common as common
    from tokensieve.prompt import build_prompt

    for line in lines:
        clip = common.read_frames(line.video, frames, None, None, None, False)
        yield build_prompt(loaded.processor, clip, line.question, whole_frames=True).on(loaded.model)


@tune_app.command("vflowopt")
def tune_vflowopt(
    samples: Samples,
    output: Output,
    model: options.Model = None,
    retention: Annotated[
        float, typer.Option("--retention", "-r", help="Average share of the visual tokens over the layers.")
    ] = 0.25,
    calls: Annotated[int, typer.Option("--calls", help="Evaluations in all.")] = 50,
    initial: Annotated[int, typer.Option("--initial", help="Evaluations before the search learns.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the search.")] = 42,
    frames: options.Frames = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Search VFlowOpt's parameters for a model; about 30 prompts without answers are enough.

    The course is kept beside the output (.search.json); the same command goes on where it stopped.
    """
    from tokensieve.cli import _common as common
    from tokensieve.methods.vflowopt.search import Progress, search

    lines = read_samples(samples)
    show = not no_progress
    with quiet_transformers():
        loaded = common.open_model(model, dtype, device, attn, False, show)
        with step("preparing the prompts", show, len(lines)) as advance:
            inputs = []
            for prepared in _inputs(loaded, lines, frames):
                inputs.append(prepared)
                advance(len(inputs), len(lines))
        with step("searching", show, calls) as advance:

            def tick(state: Progress) -> None:
                advance(state.call, state.calls)

            found = search(
                loaded.model,
                inputs,
                retention,
                calls=calls,
                initial=initial,
                seed=seed,
                state=output.with_name(output.name + ".search.json"),
                progress=tick,
                name=loaded.name,
            )
    found.save(output)
    if as_json:
        show_json({"output": str(output), "similarity": found.value, **found.strategy._asdict()})
        return
    shares = ", ".join(f"{ratio:.3f}" for ratio in found.strategy.ratios)
    out.print(
        Text(
            f"cosine similarity {found.value:.4f} with shares {shares}, threshold {found.strategy.threshold:.2f}, grid "
            f"{found.strategy.grid:.2f}, alpha {found.strategy.alpha:.3f}; use it as --method "
            f"vflowopt:strategy={output}"
        ),
        soft_wrap=True,
    )


@tune_app.command("labels")
def tune_labels(
    samples: Samples,
    output: Output,
    model: options.Model = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer that is explained.")] = 16,
    frames: options.Frames = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Label prompts with the relevance of their visual tokens, for explainability-compression.

    Prompts whose answer is known count only if the model gives it. Labels that the output folder has are kept.
    """
    from tokensieve.cli import _common as common
    from tokensieve.methods.explainability_compression.dataset import LabelFolder, LabelledPrompt, make_labels

    lines = read_samples(samples)
    show = not no_progress
    folder = LabelFolder(output)
    with quiet_transformers():
        loaded = common.open_model(model, dtype, device, None, False, show)
        tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
        made = 0
        with step("labelling", show, len(lines)) as advance:
            for number, line in enumerate(lines):
                if not folder.done(number):
                    prompts = (LabelledPrompt(prepared, line.answer) for prepared in _inputs(loaded, [line], frames))
                    made += make_labels(
                        loaded.model,
                        prompts,
                        folder,
                        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                        max_new_tokens=max_new_tokens,
                        name=loaded.name,
                        first=number,
                    )
                advance(number + 1, len(lines))
    labels = len(list(output.glob("*.safetensors")))
    if as_json:
        show_json({"output": str(output), "prompts": len(lines), "labelled": labels, "new": made})
        return
    out.print(Text(f"{labels} of {len(lines)} prompts are labelled in {output}, {made} of them now"), soft_wrap=True)


@tune_app.command("mapper")
def tune_mapper(
    labels: Annotated[
        Path, typer.Option("--labels", "-l", help="Folder that 'tokensieve tune labels' wrote.", show_default=False)
    ],
    output: Output,
    modality: Annotated[str, typer.Option("--modality", help="Items to learn from: image, video or any.")] = "any",
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the labels.")] = 100,
    batch: Annotated[int, typer.Option("--batch-size", "-b", help="Labels a step.")] = 128,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of Adam.")] = 1e-3,
    held_out: Annotated[float, typer.Option("--held-out", help="Share of the labels that only measures.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, split and order.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Train the relevance mapper of explainability-compression on labels; the same command goes on where it stopped."""
    from tokensieve.methods.explainability_compression import MapperConfig
    from tokensieve.methods.explainability_compression.dataset import LabelFolder
    from tokensieve.methods.explainability_compression.training import Epoch, Settings, train

    if not labels.is_dir():
        raise MethodError(f"{labels} is no folder; pass one that 'tokensieve tune labels' wrote.")
    config = MapperConfig(modality=modality)  # type: ignore[arg-type]
    found, facts = LabelFolder(labels).load(config.modality)
    config = replace(config, host=facts["host"], decoder_layers=int(facts["decoder_layers"]), model=facts["model"])
    with step("training", not no_progress, epochs) as advance:

        def tick(epoch: Epoch) -> None:
            advance(epoch.number, epochs)

        settings = Settings(epochs, batch, learning_rate, held_out, seed)
        trained = train(found, config, settings, folder=output, device=device, progress=tick)
    best = trained.best
    if as_json:
        show_json({"output": str(output), "epoch": best.number, "loss": best.held_out_loss, "overlap": best.overlap})
        return
    out.print(
        Text(
            f"divergence {best.held_out_loss:.4f} and {best.overlap:.1%} of the relevant half found (chance 50 %) at "
            f"epoch {best.number}; use it as --method explainability-compression:weights={output}"
        ),
        soft_wrap=True,
    )
