"""From what a run recorded to its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.core.trace import ItemTrace, PrefillTrace
from tokensieve.errors import HostError
from tokensieve.measure.flops import DecoderGeometry, Work, convention_flops, decoder_work, layer_tokens
from tokensieve.measure.report import Change, ItemReport, Report, Requested, TokenCounts
from tokensieve.measure.vision import encoder_work

if TYPE_CHECKING:
    from tokensieve.core.runtime import Run

__all__ = ["make_report", "tokens_per_layer"]

_NOTHING = TokenCounts(0, 0, 0.0, 0)


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
