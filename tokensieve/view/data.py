"""What a page or picture of a run shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokensieve.core.layout import Layout
from tokensieve.core.trace import ItemTrace
from tokensieve.errors import MethodError, VideoError
from tokensieve.ops.merge import MergeMap
from tokensieve.view.regions import WHOLE, Frames, Region, image_regions, seen_box, video_regions

if TYPE_CHECKING:
    from tokensieve.core.runtime import Run

__all__ = ["ViewData", "join_items"]


@dataclass
class ViewData:
    """One video or image, what a method kept of it, and what the reader should know.

    Attributes
    ----------
    frames : ndarray [T, H, W, 3], uint8
        The clip as it went to the processor; a list of pictures [H, W, 3] for images of different sizes.
    item : ItemTrace
        What was kept.
    timestamps : ndarray [T], optional
        Seconds; None for images.
    label
        Name of the clip.
    question
        What was asked.
    answers
        Who answered -> what (``{"VidCom2": "A red car."}``).
    method, settings
        Title and options of the method (or of several, joined by ``+``).
    source
        Where the method was published.
    host
        Family of the model.
    report
        ``run.report.to_dict()``; charts whose entries are missing are left out.
    note
        What the reader must not miss, such as that the weights are random.
    regions
        Which part of which frame each view shows; whole frames unless given.
    """

    frames: Frames
    item: ItemTrace
    timestamps: NDArray[np.float64] | None = None
    label: str = ""
    question: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    host: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    regions: Sequence[Region] | None = None

    def __post_init__(self) -> None:
        total = len(self.frames)
        if total == 0:
            raise VideoError("There is no frame to show; give the frames that the model was asked about.")
        for frame in self.frames:
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or frame.size == 0:
                raise VideoError(
                    f"Frames to show must be uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}; "
                    "give the frames of a Clip."
                )
        if self.timestamps is not None and len(self.timestamps) != total:
            raise VideoError(
                f"There are {len(self.timestamps)} timestamps for {total} frames; give one for each frame."
            )
        views = len(self.item.layout.views)
        if self.regions is None:
            self.regions = self._regions()
        if len(self.regions) != views:
            raise VideoError(f"There are {len(self.regions)} regions for {views} views; give one for each view.")

    @classmethod
    def of_run(
        cls,
        run: Run,
        frames: Frames,
        timestamps: NDArray[np.float64] | None = None,
        *,
        processor: Any = None,
        row: int = 0,
        index: int | None = None,
        label: str = "",
        question: str = "",
        answers: Mapping[str, str] | None = None,
        note: str = "",
    ) -> ViewData:
        """What the newest prefill of a run kept.

        Parameters
        ----------
        run : Run
            After a ``generate`` or forward pass with a video or images.
        frames, timestamps
            The clip that the prompt showed.
        processor : ProcessorMixin, optional
            Says which part of a frame the model saw, where sides are cut off.
        row, index : int
            Prompt row, and which visual item of it; by default the first video, or else all images together
            (one image per frame, as for families without video input).
        label, question, answers, note
            See the attributes.

        Raises
        ------
        MethodError
            If the run saw no such item.
        """
        items = [item for item in run.history[-1].items if item.row == row] if run.history else []
        if index is not None:
            items = [item for item in items if item.index == index]
        if not items:
            what = f"row {row}" if index is None else f"item {index} of row {row}"
            raise MethodError(
                f"The run has seen no video or image in {what}, so there is nothing to show; generate first."
            )
        videos = [item for item in items if item.layout.kind == "video"]
        shown = videos[:1] or items
        regions = _regions_seen(run, frames, shown, processor)
        report = run.report
        return cls(
            frames,
            join_items(shown),
            timestamps,
            label,
            question,
            dict(answers or {}),
            " + ".join(method.title or method.name for method in run.methods),
            _settings(run),
            "; ".join(_source(method) for method in run.methods if method.paper),
            run.host.title,
            {} if report is None else report.to_dict(),
            note,
            regions,
        )

    @property
    def unit(self) -> str:
        """What a view is called: ``"frame"``, ``"step"`` of several frames, or ``"view"`` of an image."""
        regions = self.shown
        if any(region.name for region in regions):
            return "view"
        if any(region.last > region.first for region in regions):
            return "step"
        return "frame" if self.item.layout.kind == "video" or len(regions) > 1 else "view"

    @property
    def shown(self) -> Sequence[Region]:
        """The regions; filled in when the object was made."""
        assert self.regions is not None
        return self.regions

    def titles(self) -> list[str]:
        """A short name of every view: its time, or what part of an image it is."""
        return [self._title(region) for region in self.shown]

    def _title(self, region: Region) -> str:
        words = [region.name] if region.name else []
        if self.timestamps is not None:
            digits = self._digits()
            start, end = (clock(float(self.timestamps[i]), digits) for i in (region.first, region.last))
            words.insert(0, start if start == end else f"{start}\N{EN DASH}{end}")
        elif len(self.frames) > 1:
            words.insert(0, f"picture {region.first + 1}")
        return ", ".join(words) or "picture"

    def _digits(self) -> int:
        """Decimals that tell neighbouring frames apart."""
        if self.timestamps is None or len(self.timestamps) < 2:
            return 1
        return 1 if float(np.diff(self.timestamps).min()) >= 0.1 else 2

    def _regions(self) -> list[Region]:
        layout = self.item.layout
        if layout.kind == "video":
            return video_regions(len(layout.views), len(self.frames))
        if len(layout.views) == len(self.frames):
            return [Region(frame, frame) for frame in range(len(self.frames))]
        return image_regions(layout, 0, *self.frames[0].shape[:2])


def clock(seconds: float, digits: int = 1) -> str:
    """A time as minutes and seconds, with hours when there are any: ``1:04.5``."""
    ticks = round(abs(seconds) * 10**digits)
    whole, rest = divmod(ticks, 10**digits)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    front = f"{hours}:{minute:02d}" if hours else f"{minute}"
    return f"{'-' if seconds < 0 else ''}{front}:{second:02d}.{rest:0{digits}d}"


def join_items(items: Sequence[ItemTrace]) -> ItemTrace:
    """Several images as one item whose views are theirs one after the other.

    Parameters
    ----------
    items : sequence of ItemTrace
        At least one; a single one is returned as it is.
    """
    if len(items) == 1:
        return items[0]
    cells: list[torch.Tensor] = []
    views: list[tuple[int, int]] = []
    keeps: list[torch.Tensor] = []
    merges: list[MergeMap] = []
    layers = sorted({layer for item in items for layer in item.decoder})
    alive: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    info: dict[str, Any] = {}
    patches = tokens = 0
    for number, item in enumerate(items):
        layout = item.layout
        view = torch.where(layout.view < 0, -1, layout.view + len(views))
        cells.append(torch.stack((view, layout.row, layout.column), 1))
        views += list(layout.views)
        keeps.append(item.keep + patches)
        if item.merged is not None:
            source, target, weight = item.merged
            merges.append(MergeMap(source + patches, target + tokens, weight))
        now = item.keep
        for layer in layers:
            now = item.decoder.get(layer, now)
            alive[layer].append(now + patches)
        info |= {f"picture{number}.{key}": value for key, value in item.info.items()}
        patches, tokens = patches + layout.patches, tokens + item.keep.numel()
    merged = MergeMap(*(torch.cat(parts) for parts in zip(*merges, strict=True))) if merges else None
    return ItemTrace(
        items[0].row,
        items[0].index,
        Layout.from_cells("image", views, torch.cat(cells)),
        torch.cat(keeps),
        sum(item.separators for item in items),
        merged,
        info,
        {layer: torch.cat(parts) for layer, parts in alive.items()},
    )


def _regions_seen(run: Run, frames: Frames, items: Sequence[ItemTrace], processor: Any) -> list[Region]:
    """Regions of items, with what the processor and the tower leave out."""
    config, total = run.base.config, len(frames)
    if items[0].layout.kind == "video":
        layout, part = items[0].layout, getattr(processor, "video_processor", None)
        height, width = frames[0].shape[:2]
        box = seen_box(height, width, part, config, layout.views[0])
        return video_regions(len(layout.views), total, box)
    found: list[Region] = []
    part = getattr(processor, "image_processor", None)
    for number, item in enumerate(items):
        frame = min(number, total - 1)
        height, width = frames[frame].shape[:2]
        alone = len(item.layout.views) == 1
        box = seen_box(height, width, part, config, item.layout.views[0]) if alone else WHOLE
        found += image_regions(item.layout, frame, height, width, box)
    return found


def _settings(run: Run) -> dict[str, Any]:
    """Options of all methods; with several methods the name stands in front."""
    several = len(run.methods) > 1
    return {
        f"{method.name}.{key}" if several else key: value
        for method in run.methods
        for key, value in method.options().items()
        if value is not None
    }


def _source(method: Any) -> str:
    """Title, venue and paper without a scheme, so that a page stays free of addresses that could be loaded."""
    paper = method.paper.split("://", 1)[-1]
    return ", ".join(part for part in (f"{method.title} ({method.venue})", paper) if part)
