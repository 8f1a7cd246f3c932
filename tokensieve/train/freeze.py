"""Which parameters learn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from tokensieve.train.config import GROUPS, LoraOptions, Stage, TrainingError

__all__ = ["add_lora", "default_groups", "group_of", "require", "set_trainable", "without_lora"]

_FROZEN = ("logit_scale", "logit_bias", "embeddings.position_embedding")
"""Never trained: temperature and bias of the pair, and the first of the two position tables."""


def require(package: str, purpose: str) -> None:
    """Raise TrainingError unless a package of the extra ``train`` is there."""
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f'{purpose} needs the package {package}; install it with pip install "tokensieve[train]".')


def group_of(name: str) -> str:
    """Group of a parameter of `PPLlavaForConditionalGeneration` by its name; ``"frozen"`` for those never trained."""
    if name.endswith(_FROZEN):
        return "frozen"
    if "btadapter_" in name:
        return "bt_adapter"
    for part, group in (
        ("prompt_alignment.clip_text_model.", "text_tower"),
        ("prompt_alignment.", "alignment"),
        ("multi_modal_projector.", "projector"),
        ("vision_tower.", "vision_tower"),
        ("image_newline", "newline"),
    ):
        if part in name:
            return group
    return "language_model"


def default_groups(stage: Stage, pair: str) -> list[str]:
    """Groups that the published recipes train.

    Parameters
    ----------
    stage : str
        ``"sft"`` or ``"dpo"`` (language model alone).
    pair : str
        ``"clip"``, whose text tower stays frozen, or ``"siglip"``, whose text tower learns.
    """
    if stage == "dpo":
        return ["language_model"]
    groups = ["language_model", "projector", "alignment", "bt_adapter"]
    return [*groups, "text_tower"] if pair == "siglip" else groups


def set_trainable(model: Any, groups: Sequence[str]) -> dict[str, int]:
    """Let these groups learn and freeze all others.

    Parameters
    ----------
    model : PPLlavaForConditionalGeneration
        Changed in place.
    groups : sequence of str
        Of `GROUPS`.

    Returns
    -------
    dict
        Trainable parameters per group.

    Raises
    ------
    TrainingError
        If nothing is left to train.
    """
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = group_of(name)
        parameter.requires_grad_(group in groups)
        if parameter.requires_grad:
            counts[group] += parameter.numel()
    if not sum(counts.values()):
        raise TrainingError(f"The groups {', '.join(groups)} hold no parameters of this model; name others.")
    return {group: count for group, count in counts.items() if count}


def add_lora(model: Any, options: LoraOptions) -> Any:
    """Put low-rank adapters into the language model; its own weights stay frozen.

    Parameters
    ----------
    model : PPLlavaForConditionalGeneration
        Groups already set; changed in place.
    options : LoraOptions
        Sizes and layers.

    Returns
    -------
    peft.PeftModel
        Around ``model``.
    """
    require("peft", "LoRA")
    from peft import LoraConfig, get_peft_model

    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and group_of(name) != "language_model"
    ]
    names = "|".join(options.targets)
    found = any(
        name.startswith("model.language_model.") and name.rpartition(".")[2] in options.targets
        for name, _ in model.named_modules()
    )
    if not found:
        raise TrainingError(f"The language model has no layers {names!r}; give the names of its linear layers.")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=rf".*language_model\..*\.({names})",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    for parameter in others:
        parameter.requires_grad_(True)
    return wrapped


def without_lora(model: Any) -> Any:
    """The plain model, with adapters merged into its weights; a plain model comes back as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
