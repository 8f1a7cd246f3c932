"""The architectures of the bundled models: a CLIP pair and a LLaVA-OneVision video LLM on its image tower.

Everything is an unmodified transformers class with a small configuration; the tokenizer reads whole words of
:mod:`tokensieve.world.words`.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tokensieve.world.scene import SIZE
from tokensieve.world.words import vocabulary

PATCH = 8
GRID = SIZE // PATCH
POOLED = GRID // 2
WIDTH = 192
SHARED = 128

CLIP_PAIR, VIDEO_LLM = "clip-pair", "video-llm"
"""Folders of the saved models."""

SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ROLES = ("user", "assistant", "system")

MEAN, STD = (0.35, 0.35, 0.35), (0.25, 0.25, 0.25)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tokenizer(for_clip: bool = False) -> PreTrainedTokenizerFast:
    """The word-level tokenizer; for the text tower of the CLIP pair it adds the tokens of start and end."""
    words = [*SPECIAL, *ROLES, *vocabulary()]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if for_clip:
        core.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[(token, ids[token]) for token in ("<|im_start|>", "<|im_end|>")],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    wrapped.model_max_length = 32 if for_clip else 8192
    return wrapped


def vision_config() -> CLIPVisionConfig:
    """The image tower: 12 x 12 patches of 8 pixels and a class token."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=SHARED,
        hidden_act="gelu_pytorch_tanh",
    )


def clip_pair() -> CLIPModel:
    """The untrained CLIP pair."""
    words = tokenizer(for_clip=True)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        projection_dim=SHARED,
        hidden_act="gelu_pytorch_tanh",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=SHARED)
    return CLIPModel(config)


def clip_processor() -> CLIPProcessor:
    """Processor of the CLIP pair."""
    image = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=MEAN,
        image_std=STD,
    )
    return CLIPProcessor(image_processor=image, tokenizer=tokenizer(for_clip=True))


def video_llm() -> LlavaOnevisionForConditionalGeneration:
    """The untrained video LLM: tower, projector, six-layer Qwen2."""
    words = tokenizer()
    text = Qwen2Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]],
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def video_processor() -> LlavaOnevisionProcessor:
    """Processor of the video LLM, with the chat template."""
    size = {"height": SIZE, "width": SIZE}
    video = LlavaOnevisionVideoProcessor(size=size, image_mean=MEAN, image_std=STD, do_sample_frames=False)
    pinpoints = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    image = LlavaOnevisionImageProcessor(size=size, image_mean=MEAN, image_std=STD, image_grid_pinpoints=pinpoints)
    return LlavaOnevisionProcessor(
        image_processor=image,
        tokenizer=tokenizer(),
        video_processor=video,
        num_image_tokens=GRID * GRID,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
