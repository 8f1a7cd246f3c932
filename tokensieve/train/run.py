"""A training run from recipe to saved model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokensieve.train.check import DataReport, load_samples
from tokensieve.train.collate import Collator
from tokensieve.train.config import TrainConfig, TrainingError
from tokensieve.train.freeze import add_lora, default_groups, require, set_trainable, without_lora
from tokensieve.train.records import RecordDataset, Sample

__all__ = ["TrainResult", "load_parts", "train"]

logger = logging.getLogger("tokensieve")

FINAL = "model"
"""Folder of the trained model inside of the output."""

REFERENCE_FILE = "reference.safetensors"
"""Log-probabilities of the answers of DPO under the first model, inside of the output."""


@dataclass
class TrainResult:
    """What a run gives.

    Attributes
    ----------
    model, processor
        As saved; LoRA is merged.
    folder : Path or None
        Of the saved model.
    steps : int
        Updates in all.
    metrics : list of dict
        Logged rows: loss, learning rate and, for DPO, margins.
    trainable : dict
        Trained parameters per group, adapters of LoRA under ``"lora"``.
    data : DataReport or None
        Of the data check; None for a data set of one's own.
    """

    model: Any
    processor: Any
    folder: Path | None
    steps: int
    metrics: list[dict[str, Any]]
    trainable: dict[str, int]
    data: DataReport | None = field(repr=False, default=None)


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    processor: Any = None,
    dataset: Sequence[Sample] | Any = None,
    resume: bool | str = False,
    callbacks: Sequence[Any] = (),
    show_progress: bool = True,
    on_record: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a PPLLaVA model.

    Parameters
    ----------
    config : TrainConfig
        Recipe.
    model, processor : optional
        A model in memory and its processor; by default what the recipe names. The model is changed.
    dataset : sequence of Sample, optional
        Data of one's own with ``__len__`` and ``__getitem__``, and optionally ``set_epoch``; by default the files of
        the recipe.
    resume : bool or str
        Go on from the last checkpoint in the output folder, or from this one.
    callbacks : sequence of TrainerCallback
        Of one's own.
    show_progress : bool
        Whether a bar is drawn.
    on_record : callable, optional
        Called with the number of records that the data check has seen.

    Returns
    -------
    TrainResult

    Raises
    ------
    TrainingError
        If recipe or data cannot be trained on, or there is no checkpoint to resume from.
    """
    require("accelerate", "Training")
    from transformers import set_seed

    from tokensieve.train.loop import Curves, EpochFrames, training_arguments

    output = Path(config.output)
    arguments = training_arguments(config, show_progress)
    checkpoint = _checkpoint(output, resume)
    report = None
    if dataset is None:
        # Before anything large is loaded.
        dataset, report = _records(config, on_record)
    if (model is None) != (processor is None):
        raise TrainingError("A model in memory needs its processor; give both or neither.")
    set_seed(config.seed)
    if model is None:
        model, processor = load_parts(config)
    groups = config.trainable if config.trainable is not None else default_groups(config.stage, model.config.pair)
    counts = set_trainable(model, groups)
    model.config.text_config.use_cache = False
    if config.lora is not None:
        model = add_lora(model, config.lora)
        counts.pop("language_model", None)
        counts["lora"] = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    logger.info("trainable parameters: %s", counts)
    trainer = _trainer(config, arguments, model, processor, dataset, checkpoint is not None)
    for callback in (EpochFrames(dataset), Curves(output), *callbacks):
        trainer.add_callback(callback)
    output.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        (output / "recipe.json").write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
        if report is not None:
            (output / "data-check.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)
    folder = _save(trainer, processor, output / FINAL, config)
    trained = without_lora(trainer.accelerator.unwrap_model(trainer.model))
    trained.config.text_config.use_cache = True
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return TrainResult(trained.eval(), processor, folder, trainer.state.global_step, rows, counts, report)


def _records(config: TrainConfig, on_record: Callable[[int], None] | None) -> tuple[RecordDataset, DataReport]:
    if not config.data:
        raise TrainingError("The recipe names no data; add annotation files under data.")
    samples, report = load_samples(config.data, config.check, config.on_broken, on_record)
    if config.stage == "dpo":
        samples = [sample for sample in samples if sample.rejected is not None]
        if not samples:
            raise TrainingError(
                "DPO needs preference pairs, but the data hold none; give records with chosen and rejected."
            )
    else:
        for sample in samples:
            # A pair teaches its preferred answer; the other one would only be carried along.
            sample.rejected = None
    # The reference of DPO is computed once, so its frames may not change.
    fixed = config.stage == "dpo"
    return RecordDataset(samples, config.frames, config.seed, fixed=fixed, on_broken=config.on_broken), report


def _trainer(config: TrainConfig, arguments: Any, model: Any, processor: Any, dataset: Any, resumed: bool) -> Any:
    from tokensieve.train.loop import BaseTrainer

    collator = Collator(processor, config.question_text, config.max_length, pairs=config.stage == "dpo")
    if config.stage == "sft":
        return BaseTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    from tokensieve.train.dpo import DpoTrainer, Indexed, PairCollator

    trainer = DpoTrainer(
        model=model,
        args=arguments,
        train_dataset=Indexed(dataset),
        data_collator=PairCollator(collator),
        beta=config.beta,
        alpha=config.alpha,
        gamma=config.gamma,
    )
    if config.lora is None:
        _reference(trainer, Path(config.output) / REFERENCE_FILE, resumed)
    return trainer


def _reference(trainer: Any, file: Path, resumed: bool) -> None:
    """Reference log-probabilities: those of the first run, or new ones."""
    from safetensors.torch import load_file, save_file

    if resumed and file.is_file():
        stored = load_file(file)["log_probabilities"]
        if stored.shape[0] == len(trainer.train_dataset):
            trainer.train_dataset.reference = stored
            return
        raise TrainingError(
            f"{file} holds {stored.shape[0]} pairs, but the data {len(trainer.train_dataset)}; resume with the data of "
            "the first run."
        )
    values = trainer.prepare_reference()
    if trainer.is_world_process_zero():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"log_probabilities": values.contiguous()}, file)


def _checkpoint(output: Path, resume: bool | str) -> str | None:
    if not resume:
        return None
    from transformers.trainer_utils import get_last_checkpoint

    found = str(resume) if isinstance(resume, str) else get_last_checkpoint(str(output)) if output.is_dir() else None
    if found is None or not Path(found).is_dir():
        raise TrainingError(f"There is no checkpoint to resume from in {found or output}; train from the start.")
    return found


def _save(trainer: Any, processor: Any, folder: Path, config: TrainConfig) -> Path:
    """Save the trained model with merged adapters, and its processor, as transformers loads them."""
    if config.lora is None:
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        unwrapped.config.text_config.use_cache = True
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        merged = without_lora(trainer.accelerator.unwrap_model(trainer.model))
        merged.config.text_config.use_cache = True
        merged.save_pretrained(folder)
        trainer.model = merged
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder)
    return folder


def load_parts(config: TrainConfig) -> tuple[Any, Any]:
    """The model that a recipe names, and its processor.

    Parameters
    ----------
    config : TrainConfig
        Its fields ``model``, or ``pair`` with ``base`` or ``language_model``.

    Returns
    -------
    model, processor
        In float32: mixed precision keeps its master weights there.

    Raises
    ------
    TrainingError
        If the recipe names too much or too little.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from tokensieve.models.ppllava import assemble, assemble_processor, register
    from tokensieve.models.ppllava.processing import PPLlavaProcessor

    starts = [name for name in ("base", "language_model") if getattr(config, name)]
    new = bool(config.pair) and len(starts) == 1
    if bool(config.model) == new or (config.model and (config.pair or starts)):
        raise TrainingError("A recipe names either model, or pair with one of base and language_model; correct it.")
    register()
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    try:
        if config.model:
            model = AutoModelForImageTextToText.from_pretrained(config.model, **options)
            processor = AutoProcessor.from_pretrained(config.model)
            if not isinstance(processor, PPLlavaProcessor):
                raise TrainingError(f"{config.model} is no PPLLaVA model; name it as base and give a pair.")
            for name, value in config.model_fields.items():
                setattr(model.config, name, value)
            processor.video_kernel = list(model.config.video_kernel)
            processor.image_kernel = list(model.config.image_kernel)
            return model, processor
        pair = AutoModel.from_pretrained(config.pair, **options)
        if config.base:
            start: dict[str, Any] = {"base": AutoModelForImageTextToText.from_pretrained(config.base, **options)}
        else:
            start = {"language_model": AutoModelForCausalLM.from_pretrained(config.language_model, **options)}
        model = assemble(pair, **start, **config.model_fields)
        tokenizer = AutoTokenizer.from_pretrained(config.base or config.language_model)
        return model, assemble_processor(model, tokenizer, AutoTokenizer.from_pretrained(config.pair))
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise TrainingError(f"The model of the recipe cannot be loaded ({message[:300]}); check its name.") from error
