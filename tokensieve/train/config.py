"""What a training recipe may say, and how it is read."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokensieve.errors import TokensieveError
from tokensieve.world.bundled import bundled

__all__ = ["GROUPS", "DataSource", "LoraOptions", "TrainConfig", "TrainingError", "read_config"]

Stage = Literal["sft", "dpo"]
Policy = Literal["skip", "stop"]
Depth = Literal["none", "files", "decode"]
QuestionText = Literal["question", "conversation"]
Precision = Literal["bf16", "fp16", "fp32"]

GROUPS = (
    "language_model",
    "projector",
    "alignment",
    "text_tower",
    "vision_tower",
    "bt_adapter",
    "newline",
)
"""Groups of parameters that ``trainable`` may name."""

_LARGEST = 2**20

RECIPES = Path(__file__).parent / "recipes"

BUNDLED = "bundled:"
"""Names of models that come with the package start with it: ``bundled:video-llm``."""


class TrainingError(TokensieveError):
    """A recipe or its data cannot be trained on."""


@dataclass
class DataSource:
    """One annotation file.

    Parameters
    ----------
    path : str
        JSON list or JSON lines.
    media : str
        Folder that the paths of the records start from; by default that of the annotation file.
    format : str
        ``"auto"`` or one of the formats of `tokensieve.train.records`.
    limit : int, optional
        Take the first records only.
    repeat : int
        Take all of them so many times in an epoch.
    """

    path: str
    media: str | None = None
    format: Literal["auto", "conversations", "questions", "preference"] = "auto"
    limit: int | None = None
    repeat: int = 1


@dataclass
class LoraOptions:
    """Low-rank adapters in the language model instead of its full weights.

    Parameters
    ----------
    rank, alpha : int
        Size and scale.
    dropout : float
        On the input of the adapters.
    targets : list of str
        Names of linear layers; the option of the released code adapts q and v.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class TrainConfig:
    """A training run.

    Relative paths of a recipe file start from the folder of that file.

    Parameters
    ----------
    stage : str
        ``"sft"`` (answers by cross-entropy) or ``"dpo"`` (preferred against rejected answers).
    output : str
        Folder for checkpoints, curves and the trained model.
    data : list of DataSource
        Mixed inside of every batch.
    model : str, optional
        Folder or hub name of a saved PPLLaVA model to go on from. Otherwise a new one is put together from ``pair``
        and ``base`` or ``language_model``.
    pair : str, optional
        Folder or hub name of a CLIP or SigLIP model, or ``bundled:clip-pair``.
    base, language_model : str, optional
        Folder or hub name of a LLaVA model (or ``bundled:video-llm``), or of a causal language model.
    model_fields : dict
        Fields of `PPLlavaConfig` for a new model.
    frames : int
        Frames of every video.
    question_text : str
        What the text tower reads in training: ``"question"``, as in use, or ``"conversation"``, questions and answers
        together, as the published models were trained.
    trainable : list of str
        Groups that learn, of `GROUPS`; None: those of the published recipe for the stage.
    lora : LoraOptions, optional
        Adapters instead of the full language model.
    epochs, max_steps : float, int
        Length; ``max_steps`` above 0 wins.
    batch, accumulation : int
        Samples per device and step, and steps per update.
    learning_rate, schedule, warmup, weight_decay
        AdamW with a schedule of transformers; ``warmup`` is a share of all updates.
    max_grad_norm : float
        Clip the gradient at this norm.
    precision : str
        ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    gradient_checkpointing : bool
        Compute activations again in the backward pass.
    max_length : int, optional
        Longest sequence; what is behind is cut off.
    beta, alpha, gamma : float
        DPO: temperature, weight of the preference loss, weight of the cross-entropy of the preferred answer.
    check : str
        Look at the records before the first step: ``"files"`` (text and paths), ``"decode"`` (read every file once)
        or ``"none"``.
    on_broken : str
        ``"skip"`` leaves broken records out, ``"stop"`` ends before the first step.
    save_steps, keep_checkpoints, log_steps : int
        Every so many updates.
    workers : int
        Processes that read data.
    seed : int
        Of everything that is drawn.
    trainer : dict
        Further `transformers.TrainingArguments`, for example ``deepspeed`` or ``fsdp``; they win.
    """

    stage: Stage = "sft"
    output: str = "ppllava-output"
    data: list[DataSource] = field(default_factory=list)
    model: str | None = None
    pair: str | None = None
    base: str | None = None
    language_model: str | None = None
    model_fields: dict[str, Any] = field(default_factory=dict)
    frames: int = 32
    question_text: QuestionText = "question"
    trainable: list[str] | None = None
    lora: LoraOptions | None = None
    epochs: float = 1.0
    max_steps: int = -1
    batch: int = 8
    accumulation: int = 2
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    max_length: int | None = None
    beta: float = 0.1
    alpha: float = 1.0
    gamma: float = 0.0
    check: Depth = "files"
    on_broken: Policy = "skip"
    save_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 10
    workers: int = 4
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("frames", "batch", "accumulation", "save_steps", "log_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1:
            raise TrainingError(
                f"learning_rate is {self.learning_rate} and warmup {self.warmup}; the first has to be above 0, the "
                "second a share below 1."
            )
        unknown = sorted(set(self.trainable or ()) - set(GROUPS))
        if unknown:
            raise TrainingError(f"trainable names the unknown group {unknown[0]!r}; choose of {', '.join(GROUPS)}.")


def read_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a recipe file.

    Parameters
    ----------
    path : str or Path
        YAML (or JSON) with the fields of `TrainConfig`, or the name of a recipe that comes with the package
        (``"ppllava-world-sft"``), whose relative paths start from the current folder.
    changes : mapping, optional
        Fields that win over those of the file.

    Returns
    -------
    TrainConfig
        With absolute paths.

    Raises
    ------
    TrainingError
        If the file cannot be read, or a field is unknown or of the wrong type.
    """
    import yaml  # type: ignore[import-untyped]

    file = Path(path).expanduser()
    folder = file.resolve().parent
    if not file.exists() and (RECIPES / f"{path}.yaml").is_file():
        file, folder = RECIPES / f"{path}.yaml", Path.cwd()
    try:
        if file.stat().st_size > _LARGEST:
            raise TrainingError(f"{path} is larger than 1 MiB, which no recipe is; check the path.")
        stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"The recipe {path} cannot be read ({error.strerror}); check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is no YAML ({' '.join(str(error).split())[:160]}); correct it.") from error
    if not isinstance(stated, dict):
        raise TrainingError(f"{path} holds no fields; write lines such as 'stage: sft'.")
    config = _build(TrainConfig, {**stated, **(changes or {})}, str(path))
    _resolve_paths(config, folder)
    return config


def _resolve_paths(config: TrainConfig, folder: Path) -> None:
    config.output = str(_from(folder, config.output))
    for source in config.data:
        source.path = str(_from(folder, source.path))
        source.media = str(_from(folder, source.media)) if source.media else str(Path(source.path).parent)
    for name in ("model", "pair", "base", "language_model"):
        value = getattr(config, name)
        if value and value.startswith(BUNDLED):
            setattr(config, name, str(bundled(value.removeprefix(BUNDLED))))
        # A name on the hub is left alone.
        elif value and (folder / Path(value).expanduser()).exists():
            setattr(config, name, str(_from(folder, value)))


def _from(folder: Path, path: str) -> Path:
    return folder / Path(path).expanduser()


def _build(kind: Any, stated: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a mapping, with checked names and types."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(map(str, stated)) - set(hints))
    if unknown:
        raise TrainingError(f"{where} has the unknown field {unknown[0]!r}; the fields are {', '.join(sorted(hints))}.")
    needed = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    lost = [name for name in needed if name not in stated]
    if lost:
        raise TrainingError(f"{where} lacks the field {lost[0]!r}; add it.")
    return kind(**{name: _convert(value, hints[name], f"{where}: {name}") for name, value in stated.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A value of the hinted type, or an error that says what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(part for part in arguments if part is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise TrainingError(f"{where} is {value!r}; choose one of {', '.join(map(str, arguments))}.")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise TrainingError(f"{where} is {value!r}; give its fields, one per line.")
        return _build(hint, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise TrainingError(f"{where} is {value!r}; give a list.")
        return [_convert(item, arguments[0], where) for item in value]
    expected = dict if origin is dict else hint
    if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            # YAML takes 2e-5 for text.
            return float(value)
        except ValueError as error:
            raise TrainingError(f"{where} is {value!r}; give a number.") from error
    if expected is Any or (isinstance(value, expected) and not (expected is int and isinstance(value, bool))):
        return value
    raise TrainingError(f"{where} is {value!r}; give a value of type {expected.__name__}.")
