"""Configuration of the PPLLaVA model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tokensieve.errors import HostError
from tokensieve.models.ppllava.context import KEEP
from tokensieve.models.ppllava.pooling import IMAGE_KERNEL, TEMPERATURE, VIDEO_KERNEL

__all__ = ["PAIRS", "TILES", "PPLlavaConfig"]

TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles that LLaVA-NeXT may cut a single image into."""

PAIRS = {"clip_text_model": "clip", "siglip_text_model": "siglip"}
"""Contrastive family by the model type of its text tower."""

_CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 248,
    "projection_dim": 768,
}


class PPLlavaConfig(PreTrainedConfig):
    """Configuration of `PPLlavaForConditionalGeneration`; the defaults are those of the published Vicuna 7B model.

    Parameters
    ----------
    vision_config : PreTrainedConfig or dict
        Vision tower: the image half of a CLIP or SigLIP pair.
    prompt_config : PreTrainedConfig or dict
        Text tower of the same pair, which reads the question. Its ``max_position_embeddings`` is the longest
        question, 248 for CLIP and 196 for SigLIP with the extended context.
    text_config : PreTrainedConfig or dict
        Language model.
    projection_dim : int
        Width of CLIP's joint space; SigLIP has that of its towers.
    image_token_id, video_token_id : int
        Placeholders of one visual token each; they need not be in the language model's vocabulary.
    projector_hidden_act : str
        Activation between the two layers of the projector.
    multimodal_projector_bias : bool
        Whether these have a bias.
    vision_feature_layer : int
        Hidden state of the tower that is projected: -2 for CLIP, -1 for a SigLIP tower cut short by its host.
    vision_feature_select_strategy : str
        ``"default"`` leaves the class token out, ``"full"`` takes all.
    image_grid_pinpoints : list, optional
        Heights and widths in pixels that a single image may be resized to and cut into views. None: the grids of
        LLaVA-NeXT; an empty list: one square view.
    video_kernel, image_kernel : list of int
        Windows (frames, rows, columns) and their strides.
    weighting : str
        See `prompt_guided_pool`; ``"average"`` does without the question, as a control.
    pooling_temperature : float
        Temperature of the softmax inside a window.
    value_attention : bool
        SigLIP only, see `SiglipAlignment`.
    keep_positions : int, optional
        First positions of the text tower that stay frozen. None: one plain position table.
    bt_adapter_depth : int
        Layers of the temporal branch beside the vision tower; 0 for none.
    bt_adapter_frames : int
        Longest clip for that branch.
    tie_word_embeddings : bool
        Whether the head shares the language model's input embeddings.

    Raises
    ------
    HostError
        If the text tower is neither CLIP nor SigLIP, or a kernel is not three positive numbers.
    """

    model_type = "ppllava"
    sub_configs = {  # noqa: RUF012 - transformers reads a plain dict of the class
        "vision_config": AutoConfig,
        "prompt_config": AutoConfig,
        "text_config": AutoConfig,
    }

    vision_config: Any = None
    prompt_config: Any = None
    text_config: Any = None
    projection_dim: int = 768
    image_token_id: int = 32000
    video_token_id: int = 32001
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    image_grid_pinpoints: list | None = None
    video_kernel: list | tuple = VIDEO_KERNEL
    image_kernel: list | tuple = IMAGE_KERNEL
    weighting: str = "window_softmax"
    pooling_temperature: float = TEMPERATURE
    value_attention: bool = False
    keep_positions: int | None = KEEP
    bt_adapter_depth: int = 0
    bt_adapter_frames: int = 64
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the parts that were left out and check the rest."""
        self.vision_config = _complete(self.vision_config, _CLIP_VISION)
        self.prompt_config = _complete(self.prompt_config, _CLIP_TEXT)
        self.text_config = _complete(self.text_config, {"model_type": "llama"})
        if self.prompt_config.model_type not in PAIRS:
            raise HostError(
                f"The text tower of PPLLaVA is of type {self.prompt_config.model_type!r}; choose one of "
                f"{', '.join(PAIRS)}."
            )
        if self.image_grid_pinpoints is None:
            side = self.vision_config.image_size
            self.image_grid_pinpoints = [[rows * side, columns * side] for rows, columns in TILES]
        for name in ("video_kernel", "image_kernel"):
            kernel = tuple(getattr(self, name))
            if len(kernel) != 3 or min(kernel) < 1:
                raise HostError(f"{name} is {kernel}; give three positive numbers (frames, rows, columns).")
            setattr(self, name, list(kernel))
        super().__post_init__(**kwargs)

    @property
    def pair(self) -> str:
        """Contrastive family of the two towers: ``"clip"`` or ``"siglip"``."""
        return PAIRS[self.prompt_config.model_type]

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def question_length(self) -> int:
        """Longest question in tokens of the text tower."""
        return self.prompt_config.max_position_embeddings


def _complete(config: Any, default: dict[str, Any]) -> Any:
    """A configuration object from what the user gave, or from the default."""
    if config is None:
        config = default
    if isinstance(config, dict):
        fields = dict(config)
        return AutoConfig.for_model(fields.pop("model_type", default["model_type"]), **fields)
    return config
