"""Which published pair a vision tower was taken from, told by the shape of the tower alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from tokensieve.errors import HostError

__all__ = ["PairKind", "PairSource", "VisionGeometry", "find_source", "list_sources", "register_source"]

PairKind = Literal["clip", "siglip"]
_KINDS: dict[str, PairKind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True)
class VisionGeometry:
    """What tells vision towers apart: everything but the number of layers, of which hosts drop some.

    Attributes
    ----------
    kind
        ``"clip"`` or ``"siglip"``.
    width, feed_forward, heads
        Of every layer.
    image_size, patch_size
        Side of a picture and of a patch, in pixels.
    """

    kind: PairKind
    width: int
    feed_forward: int
    heads: int
    image_size: int
    patch_size: int

    @classmethod
    def of(cls, config: Any) -> VisionGeometry | None:
        """Geometry of a vision configuration, or None where it is no half of such a pair.

        Parameters
        ----------
        config
            ``vision_config`` of a host, or configuration of a vision tower.
        """
        kind = _KINDS.get(getattr(config, "model_type", ""))
        sizes = (getattr(config, "image_size", None), getattr(config, "patch_size", None))
        if kind is None or not all(isinstance(size, int) for size in sizes):
            return None
        return cls(
            kind,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.image_size,
            config.patch_size,
        )

    def __str__(self) -> str:
        return (
            f"{self.kind} tower of width {self.width}, {self.heads} heads, {self.image_size} pixels in patches of "
            f"{self.patch_size}"
        )


@dataclass(frozen=True)
class PairSource:
    """A pair that can be loaded.

    Attributes
    ----------
    geometry
        Of its vision half.
    location
        Name on the Hugging Face hub, or folder.
    layers
        Layers of its vision half; hosts have as many or fewer.
    """

    geometry: VisionGeometry
    location: str
    layers: int


_SOURCES: dict[VisionGeometry, PairSource] = {}
_PUBLISHED: tuple[tuple[str, PairKind, int, int, int, int, int, int], ...] = (
    ("openai/clip-vit-large-patch14-336", "clip", 1024, 4096, 16, 336, 14, 24),
    ("openai/clip-vit-large-patch14", "clip", 1024, 4096, 16, 224, 14, 24),
    ("openai/clip-vit-base-patch16", "clip", 768, 3072, 12, 224, 16, 12),
    ("openai/clip-vit-base-patch32", "clip", 768, 3072, 12, 224, 32, 12),
    ("google/siglip-so400m-patch14-384", "siglip", 1152, 4304, 16, 384, 14, 27),
    ("google/siglip-so400m-patch14-224", "siglip", 1152, 4304, 16, 224, 14, 27),
    ("google/siglip-large-patch16-384", "siglip", 1024, 4096, 16, 384, 16, 24),
    ("google/siglip-large-patch16-256", "siglip", 1024, 4096, 16, 256, 16, 24),
    ("google/siglip-base-patch16-512", "siglip", 768, 3072, 12, 512, 16, 12),
    ("google/siglip-base-patch16-384", "siglip", 768, 3072, 12, 384, 16, 12),
    ("google/siglip-base-patch16-256", "siglip", 768, 3072, 12, 256, 16, 12),
    ("google/siglip-base-patch16-224", "siglip", 768, 3072, 12, 224, 16, 12),
)
_BUNDLED = ("world", "weights", "clip-pair")


def register_source(source: PairSource) -> None:
    """Make a pair known for its geometry; the last one registered for a geometry counts."""
    _SOURCES[source.geometry] = source


def list_sources() -> list[PairSource]:
    """All pairs that are known, the bundled one included where it is installed."""
    bundled = _bundled()
    known = {PairSource(VisionGeometry(*row[1:7]), row[0], row[7]) for row in _PUBLISHED}
    found = {source.geometry: source for source in known}
    found |= {bundled.geometry: bundled} if bundled is not None else {}
    return sorted((found | _SOURCES).values(), key=lambda source: source.location)


def find_source(config: Any) -> PairSource | None:
    """The pair that a vision tower was taken from, or None where none is known.

    Parameters
    ----------
    config
        ``vision_config`` of a host, or configuration of a vision tower.
    """
    geometry = VisionGeometry.of(config)
    if geometry is None:
        return None
    return next(
        (s for s in list_sources() if s.geometry == geometry and config.num_hidden_layers <= s.layers),
        None,
    )


@cache
def _bundled() -> PairSource | None:
    """The pair that is installed with the package, where it is."""
    folder = Path(str(files("tokensieve").joinpath(*_BUNDLED)))
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError("larger than 1 MiB")
        vision = json.loads(path.read_text(encoding="utf-8"))["vision_config"]
        fields = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
        geometry = VisionGeometry("clip", *(int(vision[name]) for name in fields))
        return PairSource(geometry, str(folder), int(vision["num_hidden_layers"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"The bundled text tower in {folder} cannot be read ({error}); install the package again."
        ) from (error)
