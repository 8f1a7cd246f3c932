"""PPLLaVA for images, several images and videos, in the class layout of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from tokensieve.errors import HostError
from tokensieve.models.ppllava.bt_adapter import BTAdapterVisionModel, TemporalLayer, VisionTransformer
from tokensieve.models.ppllava.configuration import PPLlavaConfig
from tokensieve.models.ppllava.encoding import Projector, build_alignment, pool_clip, slots_of
from tokensieve.models.ppllava.outputs import PPLlavaCausalLMOutput, PPLlavaModelOutput
from tokensieve.models.ppllava.visual import VisualTokens

__all__ = ["PPLlavaCausalLMOutput", "PPLlavaForConditionalGeneration", "PPLlavaModel", "PPLlavaPreTrainedModel"]

IMAGE_INPUTS = ("pixel_values", "image_sizes", "batch_num_images", "image_index")
VIDEO_INPUTS = ("pixel_values_videos", "video_frames", "batch_num_videos", "video_index")
QUESTION_INPUTS = ("question_ids", "question_mask")


class PPLlavaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both classes."""

    config_class = PPLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - an attribute of transformers
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PPLlavaModel):
            init.normal_(module.image_newline, std=1 / math.sqrt(self.config.text_config.hidden_size))
        elif isinstance(module, CLIPVisionEmbeddings):
            # Inside of the adapter's tower no class of transformers is there to do it.
            init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
            init.copy_(module.position_ids, torch.arange(module.num_positions)[None])
        elif isinstance(module, TemporalLayer):
            init.zeros_(module.temporal_fc.weight)
            init.zeros_(module.temporal_fc.bias)
        elif isinstance(module, VisionTransformer):
            init.zeros_(module.btadapter_time_embed.weight)
            init.zeros_(module.btadapter_cls_token)
        elif isinstance(module, SiglipMultiheadAttentionPoolingHead):
            init.normal_(module.probe, std=module.attention.embed_dim**-0.5)
            init.xavier_uniform_(module.attention.in_proj_weight)
            init.zeros_(module.attention.in_proj_bias)


class PPLlavaModel(VisualTokens, PPLlavaPreTrainedModel):
    """Vision tower, projector, alignment with the question, and language model without head.

    Parameters
    ----------
    config : PPLlavaConfig
        Of the model.
    """

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        if config.bt_adapter_depth:
            tower = BTAdapterVisionModel(tower, config.bt_adapter_depth, config.bt_adapter_frames)
        self.vision_tower = tower
        self.multi_modal_projector = Projector(config)
        self.prompt_alignment = build_alignment(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size, dtype=self.dtype))
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    # -- the forward pass ------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        image_index: Tensor | None = None,
        video_frames: Tensor | None = None,
        batch_num_videos: Tensor | None = None,
        video_index: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_visual_attention: bool = False,
        **kwargs: Any,
    ) -> PPLlavaModelOutput:
        """Visual tokens in place of the placeholders, then the language model.

        See `get_image_features` and `get_video_features` for the visual inputs; ``mm_encoder_outputs`` may bring
        their results (keys ``"image"`` and ``"video"``) instead.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise HostError("PPLLaVA takes either input_ids or inputs_embeds; give one of them.")
        encoded = dict(mm_encoder_outputs or {})
        questions = {"question_ids": question_ids, "question_mask": question_mask}
        if pixel_values is not None and image_sizes is not None:
            encoded["image"] = self.get_image_features(
                pixel_values, image_sizes, **questions, batch_num_images=batch_num_images, image_index=image_index
            )
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(
                pixel_values_videos,
                **questions,
                video_frames=video_frames,
                batch_num_videos=batch_num_videos,
                video_index=video_index,
            )
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        maps: list[Any] = []
        for modality in ("image", "video"):
            output = encoded.get(modality)
            if output is not None:
                inputs_embeds = self._scatter(input_ids, inputs_embeds, output.pooler_output, modality)
                maps += getattr(output, "cosines", None) or []
        if self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + 0 * self._touch(bool(encoded), question_ids, question_mask)
        if position_ids is None and past_key_values is None:
            position_ids = _positions(attention_mask)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return PPLlavaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_attention=maps if output_visual_attention else None,
        )

    def _touch(self, visual: bool, question_ids: Tensor | None, question_mask: Tensor | None) -> Tensor:
        """A number that depends on all that visual inputs would use.

        Distributed training waits for every parameter on every device, whatever the batch of one device shows.
        """
        touched = self.image_newline.sum()
        if not visual:
            side = self.config.vision_config.image_size
            (idle,) = self.encode([torch.zeros(1, 3, side, side, device=touched.device)], True)
            text = None if question_ids is None else self.embed_questions(question_ids, question_mask)
            question = None if text is None else text[0]
            tokens, _ = pool_clip(self.prompt_alignment, self.config, idle, question, self.config.image_kernel)
            touched = touched + tokens.sum()
        return touched.to(self.dtype)

    def _embed(self, input_ids: Any) -> Tensor:
        """Embeddings of the text; placeholders, which may lie beyond the vocabulary, get those of token 0."""
        visual = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        return self.get_input_embeddings()(input_ids.masked_fill(visual, 0))

    def _scatter(self, input_ids: Tensor | None, embeds: Tensor, tokens: Sequence[Tensor], modality: str) -> Tensor:
        """Put visual tokens in the places of their placeholders."""
        if input_ids is None:
            raise HostError("Visual inputs need input_ids to find their placeholders; pass ids, not embeddings.")
        places = input_ids == getattr(self.config, f"{modality}_token_id")
        rows = torch.cat(list(tokens)) if len(tokens) else embeds.new_zeros(0, embeds.shape[-1])
        if int(places.sum()) != rows.shape[0]:
            raise HostError(
                f"The prompts hold {int(places.sum())} {modality} placeholders, but there are {rows.shape[0]} visual "
                "tokens; build the inputs with the processor of this checkpoint."
            )
        return embeds.masked_scatter(places[..., None].to(embeds.device), rows.to(embeds))


class PPLlavaForConditionalGeneration(PPLlavaPreTrainedModel, GenerationMixin):
    """PPLLaVA with its language modelling head.

    Parameters
    ----------
    config : PPLlavaConfig
        Of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.model = PPLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Not every language model calls its embeddings `embed_tokens`.
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        image_index: Tensor | None = None,
        video_frames: Tensor | None = None,
        batch_num_videos: Tensor | None = None,
        video_index: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_visual_attention: bool = False,
        **kwargs: Any,
    ) -> PPLlavaCausalLMOutput:
        """Logits, and the loss where labels are given (-100 is left out).

        See `PPLlavaModel` for the visual inputs and the questions.
        """
        kwargs.pop("return_dict", None)
        loss_options = {key: kwargs[key] for key in ("num_items_in_batch", "shift_labels") if key in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            question_ids=question_ids,
            question_mask=question_mask,
            batch_num_images=batch_num_images,
            image_index=image_index,
            video_frames=video_frames,
            batch_num_videos=batch_num_videos,
            video_index=video_index,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            output_visual_attention=output_visual_attention,
            **{key: value for key, value in kwargs.items() if key not in loss_options},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **loss_options)
        return PPLlavaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_attention=outputs.visual_attention,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As every model of transformers; visual inputs go in with the first pass only."""
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if not first and kwargs.get("use_cache", True):
            for name in (*IMAGE_INPUTS, *VIDEO_INPUTS, *QUESTION_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat prompts for beams or several samples; pixels stay single, the prompts refer to them."""
        held = {name: model_kwargs.pop(name) for name in (*IMAGE_INPUTS, *VIDEO_INPUTS) if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if expand_size > 1:
            rows = None if input_ids is None else input_ids.shape[0] // expand_size
            for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
                if held.get(pixels) is None:
                    continue
                counts, index = f"batch_num_{kind}s", f"{kind}_index"
                slots = slots_of(held.get(counts), held.get(index), held[pixels].shape[0], rows, kind)
                repeated = [row for row in slots for _ in range(expand_size)]
                device = held[pixels].device
                held[counts] = torch.tensor([len(row) for row in repeated], device=device)
                held[index] = torch.tensor([entry for row in repeated for entry in row], device=device)
        return input_ids, {**model_kwargs, **held}


def _positions(mask: Any) -> Tensor | None:
    """Positions that count the real tokens of each row, 1 at padding; None where nothing is padded."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return (mask.long().cumsum(-1) - 1).masked_fill(~mask.bool(), 1)
