"""The ten families that have a tiny checkpoint, and what each can take in."""

from __future__ import annotations

from dataclasses import dataclass

from tokensieve.errors import HostError

__all__ = ["FAMILIES", "TinyFamily", "family_of"]


@dataclass(frozen=True)
class TinyFamily:
    """One model family with a tiny checkpoint.

    Attributes
    ----------
    slug : str
        Name of the family, equal to the `model_type` of its configuration.
    title : str
        Name for people.
    images, videos : bool
        Whether prompts may hold images, or videos.
    multi_image : bool
        Whether one prompt may hold several images.
    uneven_frames : bool
        Whether the videos of one batch may differ in their number of frames. Where not, the family's
        processor stacks all videos into one tensor.
    """

    slug: str
    title: str
    images: bool = True
    videos: bool = True
    multi_image: bool = True
    uneven_frames: bool = False


FAMILIES: dict[str, TinyFamily] = {
    family.slug: family
    for family in (
        TinyFamily("llava", "LLaVA-1.5", videos=False),
        TinyFamily("llava_next", "LLaVA-NeXT", videos=False),
        TinyFamily("llava_onevision", "LLaVA-OneVision"),
        TinyFamily("llava_next_video", "LLaVA-NeXT-Video"),
        TinyFamily("llava_video", "LLaVA-Video"),
        TinyFamily("qwen2_vl", "Qwen2-VL", uneven_frames=True),
        TinyFamily("qwen2_5_vl", "Qwen2.5-VL", uneven_frames=True),
        TinyFamily("qwen3_vl", "Qwen3-VL", uneven_frames=True),
        TinyFamily("internvl", "InternVL3"),
        TinyFamily("video_llama_3", "VideoLLaMA3", uneven_frames=True),
    )
}
"""Every family by its slug."""


def family_of(slug: str) -> TinyFamily:
    """Look up a family by its slug.

    Raises
    ------
    HostError
        If there is no tiny checkpoint of that name.
    """
    if slug not in FAMILIES:
        raise HostError(f"There is no tiny checkpoint of {slug!r}; choose one of {', '.join(FAMILIES)}.")
    return FAMILIES[slug]
