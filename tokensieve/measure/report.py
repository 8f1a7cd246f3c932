"""The report of a run: tokens asked for and achieved, time, arithmetic, cache and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.core.trace import ItemTrace, PrefillTrace
from tokensieve.errors import HostError
from tokensieve.measure.flops import DecoderGeometry, Work, convention_flops, decoder_work, layer_tokens
from tokensieve.measure.text import summary
from tokensieve.measure.vision import encoder_work

if TYPE_CHECKING:
    from tokensieve.core.runtime import Run

__all__ = ["Change", "ItemReport", "Report", "Requested", "TokenCounts", "make_report", "tokens_per_layer"]


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens there are at the places where papers measure retention.

    Attributes
    ----------
    uncompressed
        Without any method.
    entered
        In front of the first decoder layer.
    average
        Per decoder layer, averaged over all layers.
    last
        Behind the last cut.
    """

    uncompressed: int
    entered: int
    average: float
    last: int

    def share(self, which: str = "entered") -> float:
        """``entered``, ``average`` or ``last`` as a share of the uncompressed number (1 where there is none)."""
        return float(getattr(self, which)) / self.uncompressed if self.uncompressed else 1.0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.uncompressed + other.uncompressed,
            self.entered + other.entered,
            self.average + other.average,
            self.last + other.last,
        )

    def to_dict(self) -> dict[str, float]:
        """Counts and shares."""
        shares = {f"{which}_share": self.share(which) for which in ("entered", "average", "last")}
        return {**asdict(self), **shares}


_NOTHING = TokenCounts(0, 0, 0.0, 0)


@dataclass(frozen=True)
class Change:
    """A quantity without and with compression."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After as a share of before (1 where there was nothing)."""
        return self.after / self.before if self.before else 1.0

    def to_dict(self) -> dict[str, float]:
        """Both and their ratio."""
        return {"before": self.before, "after": self.after, "ratio": self.ratio}


@dataclass(frozen=True)
class Requested:
    """What one method was asked for.

    Attributes
    ----------
    method
        Name of the method.
    retention
        Its ``retention`` option, a share of patches to keep.
    counted
        Which patches that share counts.
    dropped
        One minus the retention for methods that only cut inside the LLM, whose papers state the share dropped
        (FastV's R); None for the others.
    options
        All options.
    """

    method: str
    retention: float
    counted: str
    dropped: float | None
    options: dict[str, Any]


@dataclass(frozen=True)
class ItemReport:
    """One video or image of one prompt row.

    Attributes
    ----------
    prefill, row, index
        Which prefill of the run, which row of it, and which visual item of the row.
    kind
        ``"video"`` or ``"image"``.
    patches
        Patches, separators left out.
    separators_before, separators
        Newline embeddings of the uncompressed item, and those that entered.
    frame_patches, frame_kept
        Patches of every view (frame, temporal step, or tile mosaic) without compression, and those that
        entered.
    cells : Tensor [M, 3]
        Source (frame, row, column) of every patch that entered, in reading order.
    """

    prefill: int
    row: int
    index: int
    kind: str
    patches: TokenCounts
    separators_before: int
    separators: int
    frame_patches: list[int]
    frame_kept: list[int]
    cells: Tensor

    @property
    def frames_kept(self) -> int:
        """Views of which at least one patch entered."""
        return sum(count > 0 for count in self.frame_kept)

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """As plain data; ``full`` adds the kept map as lists of [frame, row, column]."""
        found = {
            "prefill": self.prefill,
            "row": self.row,
            "index": self.index,
            "kind": self.kind,
            "patches": self.patches.to_dict(),
            "separators": {"before": self.separators_before, "entered": self.separators},
            "frames": {"total": len(self.frame_patches), "kept": self.frames_kept},
            "frame_patches": self.frame_patches,
            "frame_kept": self.frame_kept,
        }
        return {**found, "kept": self.cells.tolist()} if full else found


@dataclass(frozen=True)
class Report:
    """Summary of a run; sums over the prefills with visual tokens that it remembers (the last 64).

    ``print(report)`` gives a few readable lines, `to_dict` everything as plain data.

    Attributes
    ----------
    host
        Family of the model.
    requested
        What each method was asked for.
    prefills
        Number of prefills that the sums cover; 0 when nothing was compressed yet.
    items
        Every video and image.
    patches, sequence
        Visual patches alone, and all tokens of the prompts: patches, separators and text.
    separators
        Newline embeddings, which no method scores.
    text
        Text tokens; never changed.
    layers
        Number of decoder layers.
    seconds, calls
        Time and number of calls per stage since the run began or was reset: ``encode`` (tower, projector and
        the reading of tower signals), ``compress`` (the methods, in front of and inside the LLM), ``prefill``
        (without ``compress``), ``decode``.
    encoder
        Operations of tower and projector; None for a tower whose arithmetic is not known.
    prefill
        Operations of the LLM's prefill, each row alone and without padding, the head for one position a row;
        None for mixtures of experts. Attention to the cache of earlier turns is not counted.
    convention
        The same by the formula of the papers, ``4 n d^2 + 2 n^2 d + 2 n d m`` with n patches.
    cache
        Bytes of the key / value cache behind the prefills, in the model's dtype.
    cache_token_bytes
        Bytes that one token takes in the cache over all layers.
    peak_memory, memory_kind
        Most memory in use, in bytes, and what was counted.
    """

    host: str
    requested: list[Requested]
    prefills: int
    layers: int
    patches: TokenCounts
    sequence: TokenCounts
    separators: Change
    text: int
    seconds: dict[str, float]
    calls: dict[str, int]
    encoder: Change | None
    prefill: Change | None
    convention: Change | None
    cache: Change | None
    cache_token_bytes: int | None
    peak_memory: int
    memory_kind: str
    items: list[ItemReport] = field(default_factory=list)

    @property
    def frame_counts(self) -> list[list[int]]:
        """Patches that entered, per frame, of every item."""
        return [item.frame_kept for item in self.items]

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """As plain data for JSON.

        Parameters
        ----------
        full : bool
            Also list (frame, row, column) of every patch that entered.
        """
        changes = ("separators", "encoder", "prefill", "convention", "cache")
        found = {name: getattr(self, name) for name in changes}
        return {
            "host": self.host,
            "requested": [asdict(one) for one in self.requested],
            "prefills": self.prefills,
            "layers": self.layers,
            "patches": self.patches.to_dict(),
            "sequence": self.sequence.to_dict(),
            "text": self.text,
            **{name: None if change is None else change.to_dict() for name, change in found.items()},
            "cache_token_bytes": self.cache_token_bytes,
            "seconds": self.seconds,
            "calls": self.calls,
            "peak_memory": self.peak_memory,
            "memory_kind": self.memory_kind,
            "items": [item.to_dict(full) for item in self.items],
        }

    def __str__(self) -> str:
        return summary(self)


def make_report(run: Run) -> Report:
    """Sum up a run so far.

    Parameters
    ----------
    run : Run
        Attached or not; a run that has seen no visual prompt gives a report with ``prefills == 0``.
    """
    traces, layers = list(run.history), run.facts.decoder_layers
    items = [_item_report(number, item, layers) for number, trace in enumerate(traces) for item in trace.items]
    rows = [row for trace in traces for row in tokens_per_layer(trace, layers)]
    sequence = _NOTHING
    for before, after in rows:
        sequence += TokenCounts(before, after[0], sum(after) / layers, after[-1])
    patches = sum((item.patches for item in items), _NOTHING)
    separators = Change(sum(item.separators_before for item in items), sum(item.separators for item in items))
    geometry = _geometry(run)
    token_bytes = None if geometry is None else geometry.cache_bytes(_element_size(run)) * layers
    return Report(
        host=run.host.title,
        requested=[_requested(method, run.facts) for method in run.methods],
        prefills=len(traces),
        layers=layers,
        patches=patches,
        sequence=sequence,
        separators=separators,
        text=sequence.uncompressed - patches.uncompressed - int(separators.before),
        seconds=_seconds(run),
        calls=run.clock.calls,
        encoder=_encoder(run, traces),
        prefill=None if geometry is None else _prefill(geometry, rows),
        convention=None if geometry is None else _convention(geometry, traces),
        cache=None
        if token_bytes is None
        else Change(sequence.uncompressed * token_bytes, sequence.average * token_bytes),
        cache_token_bytes=token_bytes,
        peak_memory=run.memory.read(),
        memory_kind=run.memory.kind,
        items=items,
    )


def _requested(method: Method, facts: HostFacts) -> Requested:
    counted, dropped = "patches that enter the LLM", None
    if set(method.stages) == {"decoder"}:
        if getattr(method, "average", False):
            counted = "patches a decoder layer, averaged"
        else:
            counted = f"patches behind the cut in front of layer {max(method.decoder_layers(facts), default=0)}"
            dropped = 1.0 - method.retention
    return Requested(method.name, method.retention, counted, dropped, method.options())


def _cuts(item: ItemTrace) -> dict[int, int]:
    """Decoder layer -> patches of the item from that layer on."""
    return {layer: alive.numel() for layer, alive in item.decoder.items()}


def _item_report(number: int, item: ItemTrace, layers: int) -> ItemReport:
    layout, counts = item.layout, layer_tokens(layers, item.keep.numel(), _cuts(item))
    return ItemReport(
        prefill=number,
        row=item.row,
        index=item.index,
        kind=layout.kind,
        patches=TokenCounts(layout.patches, item.keep.numel(), sum(counts) / layers, counts[-1]),
        separators_before=layout.tokens - layout.patches,
        separators=item.separators,
        frame_patches=layout.patches_per_view.tolist(),
        frame_kept=item.per_frame().tolist(),
        cells=item.cells(),
    )


def tokens_per_layer(trace: PrefillTrace, layers: int) -> list[tuple[int, list[int]]]:
    """What a prefill really computed.

    Parameters
    ----------
    trace : PrefillTrace
        One prefill of a run.
    layers : int
        Number of decoder layers.

    Returns
    -------
    list of (int, list of int)
        For every row: tokens without compression, and tokens in every decoder layer; text and separators
        included, padding left out.
    """
    found = []
    for row, (before, after) in enumerate(zip(trace.before, trace.after, strict=True)):
        inside = {layer: rows[row] for layer, rows in trace.inside.items()}
        found.append((before, layer_tokens(layers, after, inside)))
    return found


def _seconds(run: Run) -> dict[str, float]:
    """The clock's stages, with the methods' time inside the LLM taken out of the prefill."""
    raw = run.clock.seconds
    found = {stage: raw.get(stage, 0.0) for stage in ("encode", "compress", "prefill", "decode")}
    found["prefill"] = max(0.0, found["prefill"] - found["compress"])
    return found


def _geometry(run: Run) -> DecoderGeometry | None:
    try:
        return DecoderGeometry.of(run.host.text_model(run.base).config)
    except HostError:
        return None


def _element_size(run: Run) -> int:
    dtype = getattr(run.model, "dtype", None) or next(run.model.parameters()).dtype
    return int(dtype.itemsize)


def _prefill(geometry: DecoderGeometry, rows: Sequence[tuple[int, list[int]]]) -> Change:
    before = sum((decoder_work(geometry, [count] * geometry.layers) for count, _ in rows), Work())
    after = sum((decoder_work(geometry, counts) for _, counts in rows), Work())
    return Change(before.operations, after.operations)


def _convention(geometry: DecoderGeometry, traces: Sequence[PrefillTrace]) -> Change:
    """The papers' formula with the patches of a row as n."""
    before = after = 0
    for trace in traces:
        for row in range(len(trace.before)):
            items = [item for item in trace.items if item.row == row]
            full = [sum(item.layout.patches for item in items)] * geometry.layers
            kept = [layer_tokens(geometry.layers, item.keep.numel(), _cuts(item)) for item in items]
            before += convention_flops(full, geometry.hidden, geometry.mlp)
            after += convention_flops(
                [sum(counts) for counts in zip(*kept, strict=True)], geometry.hidden, geometry.mlp
            )
    return Change(before, after)


def _encoder(run: Run, traces: Sequence[PrefillTrace]) -> Change | None:
    """Tower and projector for all frames, and for those that a frames-stage method let through.

    An item that ``generate`` repeats over several rows was encoded once.
    """
    config = run.base.config
    skips = run.host.drops_frames and any("frames" in method.stages for method in run.methods)
    before = after = Work()
    try:
        for trace in traces:
            for item in {id(item.layout): item for item in trace.items}.values():
                whole = encoder_work(config, item.layout)
                before += whole
                views, seen = None, item.info.get("tower_tokens")
                if skips and item.layout.kind == "video":
                    views = item.per_frame().nonzero().flatten().tolist()
                if views is not None or seen is not None:
                    whole = encoder_work(config, item.layout, views, None if seen is None else seen.tolist())
                after += whole
    except (HostError, AttributeError):
        return None
    return Change(before.operations, after.operations)
