"""What both stages share: arguments of transformers' Trainer, curves, frames that change with the epoch."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tokensieve.train.config import TrainConfig, TrainingError
from tokensieve.train.freeze import require

__all__ = ["BaseTrainer", "Curves", "EpochFrames", "draw_curves", "training_arguments"]

BESIDE_FILE = "beside-adapters.safetensors"
_REDRAW_SECONDS = 60.0
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"

_SCALES = {"epoch", "step", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def training_arguments(config: TrainConfig, show_progress: bool = True) -> TrainingArguments:
    """Arguments of the Trainer for a recipe.

    Parameters
    ----------
    config : TrainConfig
        Recipe; its ``trainer`` fields win.
    show_progress : bool
        Whether a bar is drawn.

    Returns
    -------
    transformers.TrainingArguments

    Raises
    ------
    TrainingError
        If accelerate is missing, or ``trainer`` names an unknown field or a value that transformers refuses.
    """
    require("accelerate", "Training")
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    # Renamed in transformers 5.23.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    fields: dict[str, Any] = {
        "output_dir": config.output,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        checkpointing: config.gradient_checkpointing,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "save_steps": config.save_steps,
        "save_total_limit": config.keep_checkpoints,
        "dataloader_num_workers": config.workers,
        "seed": config.seed,
        "report_to": "none",
        "remove_unused_columns": False,
        # The end of the temporal branch, for one, never reaches the language model.
        "ddp_find_unused_parameters": True,
        "disable_tqdm": not show_progress,
    }
    if config.gradient_checkpointing:
        fields[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    unknown = sorted(set(config.trainer) - known)
    if unknown:
        raise TrainingError(f"trainer has the unknown field {unknown[0]!r}; use fields of TrainingArguments.")
    if config.trainer.get("deepspeed"):
        require("deepspeed", "The field trainer.deepspeed")
    try:
        return TrainingArguments(**{**fields, **config.trainer})
    except (ValueError, TypeError, ImportError) as error:
        message = " ".join(str(error).split())
        raise TrainingError(
            f"transformers refuses the recipe ({message[:300]}); change the fields named there."
        ) from error


class BaseTrainer(Trainer):
    """The Trainer of transformers, silent, whose checkpoints of LoRA hold what is trained beside the adapters too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)

    def _beside_adapters(self, model: Any) -> list[str]:
        """Names of trained parameters that PEFT does not save."""
        if not hasattr(model, "peft_config"):
            return []
        return [name for name, value in model.named_parameters() if value.requires_grad and "lora_" not in name]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        # Pickled, and read by nobody: a resumed run has the recipe.
        (folder / "training_args.bin").unlink(missing_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        names = self._beside_adapters(model)
        if names:
            weights = model.state_dict() if state_dict is None else state_dict
            save_file({name: weights[name].contiguous() for name in names}, folder / BESIDE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        target = self.accelerator.unwrap_model(model or self.model)
        file = Path(resume_from_checkpoint) / BESIDE_FILE
        if self._beside_adapters(target) and file.is_file():
            target.load_state_dict(load_file(file), strict=False)


class EpochFrames(TrainerCallback):
    """Tells a data set which epoch runs, so that other frames are drawn."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


class Curves(TrainerCallback):
    """Appends every logged row to ``metrics.jsonl`` and draws ``curves.png`` at the end and at checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run from the start begins a new file; a resumed one forgets the rows behind its checkpoint."""
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in _rows(self.folder) if row["step"] <= state.global_step]
        text = "".join(json.dumps(row) + "\n" for row in kept if state.global_step)
        (self.folder / METRICS_FILE).write_text(text, encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero and logs:
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        # A picture takes longer than a step of a small model.
        if state.is_world_process_zero and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            draw_curves(self.folder)
            self._drawn = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero:
            draw_curves(self.folder)


def _rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / METRICS_FILE
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def draw_curves(folder: Path) -> Path | None:
    """Draw one panel per logged quantity over the updates.

    Parameters
    ----------
    folder : Path
        With ``metrics.jsonl``.

    Returns
    -------
    Path or None
        The picture; None while there is nothing to draw.
    """
    rows = [row for row in _rows(folder) if "loss" in row]
    names = sorted({name for row in rows for name in row} - _SCALES, key=lambda name: (name != "loss", name))
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), number)
        shown = [row for row in rows if name in row]
        axes.plot([row["step"] for row in shown], [row[name] for row in shown], marker=".", linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    path = folder / CURVES_FILE
    figure.savefig(path, dpi=100)
    return path
