"""Hand-made items for the tests of the view."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.trace import ItemTrace
from tokensieve.ops.merge import MergeMap
from tokensieve.view import ViewData

VOID = {"meta", "img"}


def merge_map(*entries: tuple[int, int, float]) -> MergeMap:
    """From (source, target, weight)."""
    source, target, weight = zip(*entries, strict=True)
    return MergeMap(torch.tensor(source), torch.tensor(target), torch.tensor(weight))


def item(
    frames: int = 4,
    rows: int = 3,
    columns: int = 4,
    keep: list[int] | None = None,
    kind: str = "video",
    **fields: Any,
) -> ItemTrace:
    """A regular item that keeps every third patch unless told otherwise."""
    layout = Layout.regular(kind, frames, rows, columns)
    kept = torch.tensor(keep if keep is not None else list(range(0, layout.patches, 3)))
    return ItemTrace(0, 0, layout, kept, 0, **fields)


def frames(count: int = 4, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth colourful pictures."""
    row, column, frame = np.mgrid[0:height, 0:width, 0:count].transpose(0, 3, 1, 2)
    shades = np.stack((row * 3, column * 2 + 20 * frame, 255 - row - column), -1)
    return np.mod(shades, 256).astype(np.uint8)


def data(trace: ItemTrace | None = None, pictures: np.ndarray | None = None, **fields: Any) -> ViewData:
    """A view of an item with one second between frames."""
    trace = item() if trace is None else trace
    pictures = frames(len(trace.layout.views)) if pictures is None else pictures
    fields.setdefault("timestamps", np.arange(len(pictures), dtype=float))
    return ViewData(pictures, trace, **fields)


class Page(HTMLParser):
    """Parses a page and checks that every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        """What a reader sees, with single spaces."""
        return " ".join(" ".join(self.text).split())
