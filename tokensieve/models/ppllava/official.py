"""Reading checkpoints of the released PPLLaVA code.

Their weights carry the names of LLaVA-NeXT in transformers 4 and, below ``multi_modal_projector``, those of the text
tower and of the projections to the joint space. The released code loads them without checking; here every weight
that is missing, left over or of another shape is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import HostError
from tokensieve.models.ppllava.configuration import PPLlavaConfig
from tokensieve.models.ppllava.modeling import PPLlavaForConditionalGeneration

__all__ = ["LoadReport", "config_of_official", "load_official", "new_name"]

_TEXT = "multi_modal_projector.clip_text_model."
_RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^image_newline$", "model.image_newline"),
    (r"^multi_modal_projector\.(clip_|logit_)", r"model.prompt_alignment.\1"),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|_mask\d*)$")
"""Entries of old checkpoints that are computed today."""

_LARGEST_CONFIG = 2**22


@dataclass
class LoadReport:
    """What became of the weights of a checkpoint.

    Attributes
    ----------
    loaded : int
        Weights that were taken over.
    missing : list of str
        Weights of the model that the checkpoint lacks, by the names of the model; they keep their start values.
    unexpected : list of str
        Weights of the checkpoint that the model has no place for, by the names of the checkpoint.
    mismatched : list of str
        Weights whose shapes differ, with both shapes; not taken over.
    """

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every weight found its place."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.loaded} weights loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                lines.append(f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
        return "; ".join(lines)


def new_name(name: str, adapter: bool) -> str:
    """Name in `PPLlavaForConditionalGeneration` of a weight of the released code.

    Parameters
    ----------
    name : str
        In the checkpoint.
    adapter : bool
        Whether the vision tower has the temporal branch, which keeps the level ``vision_model``.

    Returns
    -------
    str
        Unknown names come back as they are.
    """
    for pattern, replacement in _RENAMED:
        changed = re.sub(pattern, replacement, name)
        if changed != name:
            name = changed
            break
    if name.startswith("model.vision_tower.vision_model.") and not adapter:
        name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return name.replace("clip_text_model.text_model.", "clip_text_model.", 1)


def config_of_official(
    weights: Mapping[str, Tensor], text_config: Mapping[str, Any], vision_config: Mapping[str, Any], **fields: Any
) -> PPLlavaConfig:
    """Configuration of a checkpoint whose own one describes the two LLaVA towers only.

    Parameters
    ----------
    weights : mapping
        State dict of the checkpoint; text tower, joint space and temporal branch are read off its shapes. The text
        tower has heads of 64, as all released CLIP and SigLIP towers up to width 1024; SigLIP so400m has 16 of 72.
    text_config, vision_config : mapping
        Fields of the language model's and the vision tower's configuration.
    **fields
        Fields of `PPLlavaConfig` that win over what was found, for example ``prompt_config``.

    Returns
    -------
    PPLlavaConfig

    Raises
    ------
    HostError
        If the checkpoint has no text tower.
    """
    names = {name.replace(".text_model.", ".", 1): name for name in weights if name.startswith(_TEXT)}
    token_name = f"{_TEXT}embeddings.token_embedding.weight"
    if token_name not in names:
        raise HostError("The checkpoint has no weights below multi_modal_projector.clip_text_model; is it PPLLaVA?")
    vocabulary, width = weights[names[token_name]].shape
    split = f"{_TEXT}embeddings.position_embedding_res" in names
    table = f"{_TEXT}embeddings.position_embedding" + ("" if split else ".weight")
    siglip = "multi_modal_projector.logit_bias" in weights
    layers = {match.group(1) for name in names if (match := re.search(r"encoder\.layers\.(\d+)\.", name))}
    prompt = {
        "model_type": "siglip_text_model" if siglip else "clip_text_model",
        "hidden_size": width,
        "intermediate_size": weights[names[f"{_TEXT}encoder.layers.0.mlp.fc1.weight"]].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": 16 if width == 1152 else max(1, width // 64),
        "max_position_embeddings": weights[names[table]].shape[0],
        "vocab_size": vocabulary,
    }
    if siglip:
        prompt["projection_size"] = weights[names[f"{_TEXT}head.weight"]].shape[0]
    else:
        # Old CLIP configurations say 2 and pool at the largest id, which is the end-of-text token.
        prompt["eos_token_id"] = 2
    adapter = "vision_tower.vision_model.btadapter_time_embed.weight"
    depth = {match.group(1) for name in weights if (match := re.search(r"btadapter_S_layers\.(\d+)\.", name))}
    projection = weights.get("multi_modal_projector.clip_visual_projection.weight")
    found: dict[str, Any] = {
        "text_config": dict(text_config),
        "vision_config": dict(vision_config),
        "prompt_config": prompt,
        "projection_dim": width if projection is None else projection.shape[0],
        "vision_feature_layer": -1 if siglip else -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
        "keep_positions": 20 if split else None,
        "bt_adapter_depth": len(depth),
        "bt_adapter_frames": weights[adapter].shape[0] if adapter in weights else 64,
    }
    return PPLlavaConfig(**{**found, **fields})


def load_official(
    source: str | Path | Mapping[str, Tensor], config: PPLlavaConfig | None = None, *, strict: bool = True
) -> tuple[PPLlavaForConditionalGeneration, LoadReport]:
    """Load a checkpoint of the released code.

    Parameters
    ----------
    source : path or mapping
        Folder with ``config.json`` and safetensors files, or a state dict.
    config : PPLlavaConfig, optional
        Configuration; needed with a state dict, otherwise made by :func:`config_of_official`.
    strict : bool
        Raise unless every weight of the model is there and no weight of the checkpoint is left over.

    Returns
    -------
    model : PPLlavaForConditionalGeneration
        In the dtype of the checkpoint, in evaluation mode.
    report : LoadReport
        What was missing or left over.

    Raises
    ------
    HostError
        If the checkpoint cannot be read, or does not match and ``strict`` is set.
    """
    if isinstance(source, Mapping):
        weights: Mapping[str, Tensor] = source
        if config is None:
            raise HostError("A state dict alone does not say the sizes of the model; give config as well.")
    else:
        folder = Path(source).expanduser()
        weights = _read_weights(folder)
        config = config or _read_config(folder, weights)
    model = PPLlavaForConditionalGeneration(config)
    dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    model = model.to(dtype).eval()
    report = _take_over(model, weights)
    if strict and not report.complete:
        raise HostError(f"The checkpoint does not match the model ({report}); correct the configuration or the files.")
    return model, report


def _take_over(model: PPLlavaForConditionalGeneration, weights: Mapping[str, Tensor]) -> LoadReport:
    """Copy weights to their places."""
    target, report = model.state_dict(), LoadReport()
    adapter = bool(model.config.bt_adapter_depth)
    filled: set[str] = set()
    for name, value in weights.items():
        renamed = new_name(name, adapter)
        if renamed not in target:
            if not _BUFFERS.search(name):
                report.unexpected.append(name)
        elif target[renamed].numel() != value.numel() or target[renamed].squeeze().shape != value.squeeze().shape:
            report.mismatched.append(f"{name} {list(value.shape)} for {list(target[renamed].shape)}")
            filled.add(renamed)
        else:
            target[renamed].copy_(value.view(target[renamed].shape))
            filled.add(renamed)
            report.loaded += 1
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    report.missing = sorted(set(target) - filled - tied)
    return report


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder; pickled ones are refused."""
    from safetensors.torch import load_file

    from tokensieve.load import check_weight_files

    if not folder.is_dir():
        raise HostError(f"The folder {folder} does not exist; give the folder of a downloaded checkpoint.")
    check_weight_files(folder)
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(path))
    return weights


def _read_config(folder: Path, weights: Mapping[str, Tensor]) -> PPLlavaConfig:
    """Configuration from ``config.json`` of a LLaVA port."""
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > _LARGEST_CONFIG:
        raise HostError(
            f"{folder} has no usable config.json; copy that of the LLaVA model the checkpoint started from."
        )
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        text, vision = stated["text_config"], stated["vision_config"]
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(f"{path} does not describe a LLaVA model ({error!r}); give config instead.") from error
    fields: dict[str, Any] = {"text_config": {"model_type": "llama", **text}, "vision_config": vision}
    if stated.get("image_token_index") is not None:
        fields["image_token_id"] = stated["image_token_index"]
        fields["video_token_id"] = stated.get("video_token_index") or stated["image_token_index"] + 1
    if stated.get("image_grid_pinpoints"):
        fields["image_grid_pinpoints"] = stated["image_grid_pinpoints"]
    return config_of_official(weights, fields.pop("text_config"), fields.pop("vision_config"), **fields)
