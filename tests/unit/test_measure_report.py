"""The report of a run against counts made by hand and against what really ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tokensieve
from tokensieve.hosts import tiny
from tokensieve.measure.memory import PeakMemory
from tokensieve.measure.report import Change, Report, TokenCounts
from tokensieve.measure.text import in_bytes, in_flops, in_seconds

Model = tuple[nn.Module, Any]


@pytest.fixture(scope="module")
def host() -> Callable[[str], Model]:
    """Tiny models, built once."""
    built: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in built:
            built[family] = tiny.build_in_memory(family)
        return built[family]

    return get


def _run(model: Any, inputs: Any, method: str, tokens: int = 3, **options: Any) -> tokensieve.Run:
    with torch.no_grad(), tokensieve.compress(model, method, **options) as run:
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)
    return run


def test_says_so_when_nothing_has_run(host: Callable[[str], Model]) -> None:
    """Before the first prompt there is a report without numbers, not an error."""
    model, _ = host("llava_onevision")
    run = tokensieve.compress(model, "random", retention=0.5)
    report = run.report
    assert report.prefills == 0 and report.items == []
    assert report.patches.share() == 1.0
    assert "no prompt with an image or a video has run yet" in str(report)
    json.dumps(report.to_dict(full=True))


def test_counts_patches_separators_text_and_sequence_apart(host: Callable[[str], Model]) -> None:
    """LLaVA-Video: 16 patches and 4 newlines a frame; the newlines stay."""
    model, processor = host("llava_video")
    inputs = tiny.example_inputs("llava_video", processor, frames=4)
    report = _run(model, inputs, "uniform", retention=0.25).report
    length = inputs["input_ids"].shape[1]
    assert report.patches == TokenCounts(64, 16, 16.0, 16)
    assert (report.separators.before, report.separators.after) == (16, 16)
    assert report.text == length - 80
    assert report.sequence == TokenCounts(length, length - 48, float(length - 48), length - 48)
    assert report.patches.share() == 0.25
    assert report.frame_counts == [[4, 4, 4, 4]]
    assert report.items[0].frame_patches == [16] * 4
    assert report.calls == {"encode": 1, "compress": 1, "prefill": 1, "decode": 2}


def test_kept_map_names_the_source_cell_of_every_patch(host: Callable[[str], Model]) -> None:
    """Only in the full dictionary, and consistent with the counts per frame."""
    model, processor = host("llava_onevision")
    report = _run(model, tiny.example_inputs("llava_onevision", processor), "random", retention=0.3).report
    assert "kept" not in report.to_dict()["items"][0]
    item = json.loads(json.dumps(report.to_dict(full=True)))["items"][0]
    assert len(item["kept"]) == report.patches.entered == 30
    assert [sum(cell[0] == frame for cell in item["kept"]) for frame in range(4)] == item["frame_kept"]
    assert all(0 <= row < 5 and 0 <= column < 5 for _, row, column in item["kept"])


def test_a_cut_inside_the_llm_reports_entry_average_and_last(host: Callable[[str], Model]) -> None:
    """FastV at K=2 of 5 layers; work is the sum over layers, and the paper's R is the share dropped."""
    model, processor = host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    run = _run(model, inputs, "fastv", retention=0.2, layer=2)
    report, length = run.report, inputs["input_ids"].shape[1]
    assert report.patches == TokenCounts(100, 100, (2 * 100 + 3 * 20) / 5, 20)
    assert report.sequence.average == (2 * length + 3 * (length - 80)) / 5
    (asked,) = report.requested
    assert asked.dropped == pytest.approx(0.8) and "layer 2" in asked.counted
    assert asked.options["layer"] == 2
    assert report.prefill is not None and report.cache is not None
    sizes = [length, length, length - 80, length - 80, length - 80]
    hidden, mlp, keys, vocabulary = 64, 128, 32, model.config.text_config.vocab_size
    per_token = hidden * (2 * hidden + 2 * keys) + 3 * hidden * mlp
    macs = sum(n * per_token + 2 * n * n * hidden for n in sizes) + hidden * vocabulary
    assert report.prefill.after == 2 * macs
    assert report.cache.after == sum(sizes) * 2 * keys * 4
    assert "inside    20 behind the last cut (20.0 %)" in str(report)
    assert "drops 0.8" in str(report)


def test_cache_bytes_are_those_of_the_real_cache(host: Callable[[str], Model]) -> None:
    """Measured on the cache that a forward pass leaves behind."""
    model, processor = host("qwen2_vl")
    inputs = tiny.example_inputs("qwen2_vl", processor)
    with torch.no_grad(), tokensieve.compress(model, "random+fastv", retention=0.5) as run:
        cache = model(**inputs, use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    change = run.report.cache
    assert change is not None and change.after == real < change.before


def test_frames_that_are_not_encoded_lower_the_encoder_work(host: Callable[[str], Model]) -> None:
    """Half of the frames, half of the work; InternVL encodes every frame all the same."""
    model, processor = host("qwen2_5_vl")
    inputs = tiny.example_inputs("qwen2_5_vl", processor, frames=8)
    encoder = _run(model, inputs, "frame-subsample", retention=0.5).report.encoder
    assert encoder is not None and encoder.ratio == 0.5
    model, processor = host("internvl")
    report = _run(model, tiny.example_inputs("internvl", processor), "frame-subsample", retention=0.5).report
    assert report.encoder is not None and report.encoder.ratio == 1.0
    assert report.patches.share() == 0.5
    assert report.items[0].frames_kept == 2


def test_rows_items_and_prefills_add_up(host: Callable[[str], Model]) -> None:
    """A padded batch of two rows, then a second prompt: padding is not counted."""
    model, processor = host("qwen3_vl")
    batch = tiny.example_inputs("qwen3_vl", processor, batch=2)
    alone = tiny.example_inputs("qwen3_vl", processor, videos=1, images=1, seed=3)
    with torch.no_grad(), tokensieve.compress(model, "uniform", retention=0.5) as run:
        model(**batch)
        model(**alone)
    report = run.report
    assert report.prefills == 2
    assert [(item.prefill, item.row, item.index, item.kind) for item in report.items] == [
        (0, 0, 0, "video"),
        (0, 1, 0, "video"),
        (1, 0, 0, report.items[2].kind),
        (1, 0, 1, report.items[3].kind),
    ]
    assert {report.items[2].kind, report.items[3].kind} == {"image", "video"}
    real = int(batch["attention_mask"].sum() + alone["attention_mask"].sum())
    assert report.sequence.uncompressed == real
    patches = sum((item.patches for item in report.items), TokenCounts(0, 0, 0.0, 0))
    assert patches == report.patches and patches.share() == pytest.approx(0.5, abs=0.02)
    assert "in 2 prefills" in str(report)


def test_repeated_rows_share_one_encoder_pass(host: Callable[[str], Model]) -> None:
    """Beams repeat the prompt, not the encoding."""
    model, processor = host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    with torch.no_grad():
        with tokensieve.compress(model, "uniform", retention=0.5) as once:
            model.generate(**inputs, max_new_tokens=2)
        with tokensieve.compress(model, "uniform", retention=0.5) as beams:
            model.generate(**inputs, max_new_tokens=2, num_beams=3)
    one, three = once.report, beams.report
    assert one.encoder == three.encoder
    assert three.patches.entered == 3 * one.patches.entered


def test_prefill_time_excludes_the_method(host: Callable[[str], Model]) -> None:
    """The clock's prefill contains the methods; the report takes them out."""
    model, processor = host("llava_onevision")
    run = _run(model, tiny.example_inputs("llava_onevision", processor), "fastv", retention=0.5)
    raw, seconds = run.clock.seconds, run.report.seconds
    assert seconds["prefill"] == pytest.approx(raw["prefill"] - raw["compress"])
    assert seconds["encode"] == raw["encode"] and seconds["decode"] == raw["decode"]
    run.reset()
    empty = run.report
    assert empty.prefills == 0 and not any(empty.seconds.values())


def test_readable_units() -> None:
    """Three significant digits in decimal units."""
    assert in_bytes(343_221_111) == "343 MB"
    assert in_flops(13.14e12) == "13.1 TFLOPs"
    assert in_flops(999_600) == "1 MFLOPs"
    assert in_seconds(0.0123) == "12.3 ms" and in_seconds(1.234) == "1.23 s"
    assert Change(0, 0).ratio == 1.0 and Change(4, 1).ratio == 0.25


def test_summary_is_short_and_plain(host: Callable[[str], Model]) -> None:
    """A handful of lines below 130 columns, no colours."""
    model, processor = host("llava_video")
    report = _run(model, tiny.example_inputs("llava_video", processor), "vidcom2", retention=0.25).report
    assert isinstance(report, Report)
    lines = str(report).splitlines()
    assert 6 <= len(lines) <= 9 and max(map(len, lines)) < 130
    assert "\x1b" not in str(report)


def test_peak_memory_sees_a_passing_buffer() -> None:
    """The high-water mark, not the present size; it stays when stopped."""
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.read()
    buffer = torch.ones(64 * 2**20)
    del buffer
    memory.stop()
    # Less than the buffer's 256 MB: some of its pages may have been the process's before.
    assert memory.read() - before > 128 * 2**20
    assert memory.read() == memory.read()
    assert memory.kind == "process resident set"
