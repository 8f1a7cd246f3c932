"""A PPLLaVA model from its parts: a contrastive pair, and a language model or a LLaVA model to start from.

Training starts here: the published models took LLaVA-NeXT (Vicuna 7B, CLIP) or LLaVA-OneVision (Qwen2 7B, SigLIP)
and the contrastive pair that their vision tower comes from.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from tokensieve.errors import HostError
from tokensieve.models.ppllava.alignment import ClipAlignment, SiglipAlignment
from tokensieve.models.ppllava.configuration import PPLlavaConfig
from tokensieve.models.ppllava.context import extend_context
from tokensieve.models.ppllava.modeling import PPLlavaForConditionalGeneration
from tokensieve.models.ppllava.processing import PPLlavaProcessor
from tokensieve.models.ppllava.templates import CHATML, VICUNA

__all__ = ["assemble", "assemble_processor"]


def assemble(
    pair: Any, language_model: Any = None, *, base: Any = None, extend: bool = True, **fields: Any
) -> PPLlavaForConditionalGeneration:
    """Put a model together.

    Parameters
    ----------
    pair : CLIPModel or SiglipModel
        Gives the text tower, the projections, and the vision tower unless ``base`` has its own.
    language_model : PreTrainedModel, optional
        Any causal language model with head. The projector starts at random.
    base : PreTrainedModel, optional
        LLaVA model (LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, LLaVA-Video, LLaVA-1.5) that gives language model,
        vision tower, projector and newline instead.
    extend : bool
        Stretch the context of the text tower (77 -> 248, 64 -> 196).
    **fields
        Fields of `PPLlavaConfig`. Ids of the placeholders have to be given without ``base``.

    Returns
    -------
    PPLlavaForConditionalGeneration
        With copies of all weights, in the dtype of the language model.

    Raises
    ------
    HostError
        If the parts do not fit together.
    """
    if (language_model is None) == (base is None):
        raise HostError("A PPLLaVA model starts from a language_model or from a base model; give one of them.")
    config, parts = _plan(pair, language_model, base, fields)
    pair = copy.deepcopy(pair)
    length = pair.text_model.config.max_position_embeddings
    if extend:
        extend_context(pair)
    config["prompt_config"] = _text_config(pair)
    if not extend:
        config["keep_positions"] = None
        config["prompt_config"].max_position_embeddings = length
    model = PPLlavaForConditionalGeneration(PPLlavaConfig(**config)).to(parts["dtype"])
    inner = model.model
    alignment: Any = ClipAlignment if model.config.pair == "clip" else SiglipAlignment
    build = alignment.from_clip if model.config.pair == "clip" else alignment.from_siglip
    options = {} if model.config.pair == "clip" else {"value_attention": model.config.value_attention}
    _fill(inner.prompt_alignment, build(pair, **options))
    tower = inner.vision_tower
    if model.config.bt_adapter_depth:
        _fill_adapter(tower, parts["tower"])
    else:
        _fill(tower, parts["tower"], spare=("head.", "post_layernorm."))
    _fill(inner.language_model, parts["language"])
    if not model.config.tie_word_embeddings:
        _fill(model.lm_head, parts["head"])
    if parts["projector"] is not None:
        _fill(inner.multi_modal_projector, parts["projector"])
    if parts["newline"] is not None:
        inner.image_newline.data.copy_(parts["newline"])
    if getattr(parts["owner"], "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(parts["owner"].generation_config)
    return model.eval()


def _plan(pair: Any, language_model: Any, base: Any, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the configuration, and where the weights come from."""
    siglip = pair.config.model_type.startswith("siglip")
    if pair.config.model_type not in ("clip", "siglip"):
        raise HostError(f"The pair is a {pair.config.model_type!r} model; give a CLIPModel or a SiglipModel.")
    owner = language_model if base is None else base
    head = owner.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise HostError(f"{type(owner).__name__} has no plain language modelling head; choose another language model.")
    if base is None:
        tower, language = pair.vision_model, language_model.base_model
        config: dict[str, Any] = {"text_config": language_model.config, "vision_config": _vision_config(pair)}
        config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "full" if siglip else "default"}
        parts: dict[str, Any] = {"projector": None, "newline": None}
    else:
        tower, language = base.model.vision_tower, base.model.language_model
        config = {"text_config": base.config.text_config, "vision_config": base.config.vision_config}
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
            config[name] = getattr(base.config, name)
        for name in ("image_token_id", "video_token_id"):
            if getattr(base.config, name, None) is not None:
                config[name] = getattr(base.config, name)
        config["multimodal_projector_bias"] = getattr(base.config, "multimodal_projector_bias", True)
        pinpoints = getattr(base.config, "image_grid_pinpoints", None)
        config["image_grid_pinpoints"] = pinpoints
        config["tie_word_embeddings"] = bool(base.config.tie_word_embeddings)
        newline = getattr(base.model, "image_newline", None)
        parts = {"projector": base.model.multi_modal_projector, "newline": newline}
    if base is None:
        config["tie_word_embeddings"] = bool(getattr(language_model.config, "tie_word_embeddings", False))
    config["projection_dim"] = getattr(pair.config, "projection_dim", None) or pair.config.text_config.hidden_size
    config = {key: copy.deepcopy(value) for key, value in {**config, **fields}.items()}
    width = config["vision_config"].hidden_size
    if width != pair.vision_model.config.hidden_size:
        raise HostError(
            f"The tower of the base model has the width {width}, that of the pair "
            f"{pair.vision_model.config.hidden_size}; give the pair that the tower comes from."
        )
    dtype = next(owner.parameters()).dtype
    return config, parts | {"tower": tower, "language": language, "head": head, "owner": owner, "dtype": dtype}


def _vision_config(pair: Any) -> Any:
    """Vision tower without the attention-pooling head, which the alignment holds."""
    config = copy.deepcopy(pair.config.vision_config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def _text_config(pair: Any) -> Any:
    return copy.deepcopy(pair.text_model.config)


def _fill(target: Any, source: Any, spare: tuple[str, ...] = ()) -> None:
    """Copy weights by name; those of ``source`` that start with a spare name may be left over."""
    weights = dict(source.state_dict())
    inside = "vision_model." if hasattr(source, "vision_model") and not hasattr(target, "vision_model") else ""
    weights = {name.removeprefix(inside): value for name, value in weights.items()}
    wanted = {name: value.shape for name, value in target.state_dict().items()}
    kept = {name: value for name, value in weights.items() if wanted.get(name) == value.shape}
    lost = sorted(set(wanted) - set(kept))
    left = sorted(name for name in set(weights) - set(wanted) if not name.startswith(spare or ("\0",)))
    if lost or left:
        raise HostError(
            f"{type(source).__name__} does not fill {type(target).__name__}: {len(lost)} weights missing or of another "
            f"shape {lost[:1]}, {len(left)} left over {left[:1]}; give parts of one architecture."
        )
    with torch.no_grad():
        target.load_state_dict(kept)


def _fill_adapter(target: Any, tower: PreTrainedModel) -> None:
    """A tower with a temporal branch that starts from the tower without."""
    from tokensieve.models.ppllava.bt_adapter import BTAdapterVisionModel

    inner = target.vision_model
    fresh = AutoModel.from_config(tower.config)
    _fill(fresh, tower)
    depth, frames = len(inner.btadapter_S_layers), inner.btadapter_time_embed.num_embeddings
    target.load_state_dict(BTAdapterVisionModel(fresh, depth, frames).state_dict())


def assemble_processor(
    model: PPLlavaForConditionalGeneration,
    tokenizer: Any,
    question_tokenizer: Any,
    *,
    image_mean: Any = None,
    image_std: Any = None,
    chat_template: str | None = None,
) -> PPLlavaProcessor:
    """The processor for an assembled model.

    Parameters
    ----------
    model : PPLlavaForConditionalGeneration
        Gives sizes and kernels; the ids of its placeholders are set to those of the tokenizer.
    tokenizer : PreTrainedTokenizerBase
        Of the language model; it gets ``<image>`` and ``<video>`` if it lacks them.
    question_tokenizer : PreTrainedTokenizerBase
        Of the pair.
    image_mean, image_std : sequence of float, optional
        Of the pair's image processor; by default those of CLIP or SigLIP.
    chat_template : str, optional
        Jinja source; by default `CHATML` if the tokenizer knows ``<|im_start|>``, and `VICUNA` otherwise.

    Returns
    -------
    PPLlavaProcessor
    """
    from transformers import LlavaNextImageProcessor, LlavaOnevisionVideoProcessor
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    config = model.config
    lacking = [token for token in ("<image>", "<video>") if token not in tokenizer.get_vocab()]
    if lacking:
        tokenizer.add_tokens(lacking, special_tokens=True)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    half = [0.5, 0.5, 0.5]
    clip = config.pair == "clip"
    pixels = {
        "image_mean": list(image_mean or (OPENAI_CLIP_MEAN if clip else half)),
        "image_std": list(image_std or (OPENAI_CLIP_STD if clip else half)),
    }
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": side} if clip else square,
        crop_size=square,
        image_grid_pinpoints=config.image_grid_pinpoints,
        **pixels,
    )
    template = chat_template or (CHATML if "<|im_start|>" in tokenizer.get_vocab() else VICUNA)
    return PPLlavaProcessor(
        image_processor,
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square, **pixels),
        question_tokenizer,
        patch_size=config.vision_config.patch_size,
        question_length=config.question_length,
        video_kernel=config.video_kernel,
        image_kernel=config.image_kernel,
        chat_template=template,
    )
