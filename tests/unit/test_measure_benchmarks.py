"""The benchmark scripts, in miniature: they run, isolate failures, and write what they measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLVideoProcessor

import tokensieve
from tokensieve.core.registry import resolve
from tokensieve.core.signals import SIGNALS
from tokensieve.methods.divprune import select_diverse

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts lie beside the package; the number of threads they set does not outlive a test."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str) -> Any:
    """A module of the benchmarks."""
    return importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [("llava-onevision-7b", 6273, 8.03e9), ("llava-video-7b", 11648, 8.03e9), ("qwen2.5-vl-7b", 4784, 8.29e9)],
)
def test_geometries_have_the_published_sizes(name: str, tokens: int, parameters: float) -> None:
    """Built on the meta device: parameters of the real checkpoints, tokens of the papers."""
    geometry = load("geometry")
    sizes = geometry.GEOMETRIES[name]
    model = geometry.build(sizes, "meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert sizes.video_tokens == tokens


def test_packed_clip_equals_the_processor_of_the_family() -> None:
    """Rows of patches in the order in which the Qwen processors write them."""
    geometry = load("geometry")
    sizes = geometry.smoke(geometry.GEOMETRIES["qwen2.5-vl-7b"])
    clip = geometry.scene(sizes.frames, sizes.size, seed=4)
    levels = (clip * 0.5 + 0.5).mul(255).round().clamp(0, 255)
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, do_normalize=False, do_rescale=False
    )
    frames = levels.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    made = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert made["video_grid_thw"].tolist() == [list(sizes.grid)]
    mine = geometry._packed(levels, sizes)
    assert torch.equal(mine, made["pixel_values_videos"].to(mine))


def test_scene_is_redundant_and_has_a_cut() -> None:
    """Neighbouring frames are alike, except at three fifths."""
    clip = load("geometry").scene(10, (64, 64), seed=1)
    change = (clip[1:] - clip[:-1]).abs().mean((1, 2, 3))
    assert int(change.argmax()) == 5
    assert float(change.max()) > 3 * float(change.median())


def test_stopwatch_orders_its_marks_and_leaves_no_hook() -> None:
    """Front, first token, generation and total of one call nest; the method's time lies in the first token."""
    geometry, stopwatch = load("geometry"), load("stopwatch")
    sizes = geometry.smoke(geometry.GEOMETRIES["llava-onevision-7b"])
    model = geometry.build(sizes, "cpu", torch.float32)
    inputs = geometry.prompt(sizes, model)
    text = model.model.language_model
    hooks = len(text._forward_hooks), len(text._forward_pre_hooks)
    with tokensieve.compress(model, "random", retention=0.5) as run, stopwatch.Stopwatch(model) as watch:
        times = watch.run(lambda: model.generate(**inputs, max_new_tokens=4))
    assert (len(text._forward_hooks), len(text._forward_pre_hooks)) == hooks
    assert times.steps == 3 and times.step > 0
    assert times.front + times.first <= times.first_token <= times.total
    assert times.generation < times.total - times.front
    assert run.clock.seconds["compress"] < times.first


def test_gpu_benchmark_keeps_the_cells_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown method fails in its own row; the others are measured against the full model."""
    main = load("gpu.__main__").main
    command = ["--smoke", "--batch", "1", "2", "--repeats", "1", "--long-tokens", "3", "--output", str(tmp_path)]
    assert main([*command, "--methods", "random", "no-such-method", "fastv"]) == 0
    assert "no-such-method" in capsys.readouterr().err
    written = json.loads((tmp_path / "gpu-smoke.json").read_text())
    records = written["records"]
    assert len(records) == 3 * 3 * 2
    assert [("samples" in record) for record in records] == [True, True, False, False, True, True] * 3
    assert all("no-such-method" in record["error"] for record in records if "error" in record)
    sample = records[0]["samples"]["random"][0]
    assert sample["entered_share"] == 0.25 and sample["flops_ratio"] < 1
    assert sample["llm_generation"] < sample["model_generation"]
    page = (tmp_path / "gpu-smoke.md").read_text()
    for column in ("LLM generation", "model generation", "peak GB", "samples/s", "TTFT", "decode tokens/s"):
        assert column in page
    assert page.count("failed, see below") == 6


def test_gpu_benchmark_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured by accident on a CPU."""
    main = load("gpu.__main__").main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (CompletedProcess([], -9, "", ""), "exit status -9"),
        (
            CompletedProcess([], 1, "half a line", "Traceback\nRuntimeError: illegal memory access"),
            "illegal memory access",
        ),
        (TimeoutExpired([], 1), "no result within 1800 s"),
    ],
    ids=["killed", "broken", "stuck"],
)
def test_gpu_cells_report_how_their_process_died(
    monkeypatch: pytest.MonkeyPatch, outcome: CompletedProcess[str] | TimeoutExpired, reason: str
) -> None:
    """A process that ends without a result loses its own cells only, for every batch size."""
    module = load("gpu.__main__")

    def run(command: list[str], **options: Any) -> CompletedProcess[str]:
        assert command[:5] == [sys.executable, "-m", "benchmarks.gpu", "--cell", "llava-onevision-7b"]
        if isinstance(outcome, TimeoutExpired):
            raise outcome
        return outcome

    monkeypatch.setattr(module.subprocess, "run", run)
    records = module._in_process("llava-onevision-7b", "random", module._parser().parse_args(["--batch", "1", "4"]))
    assert [record["batch"] for record in records] == [1, 4]
    assert all(reason in record["error"] for record in records)


def test_cpu_benchmark_compares_with_full_and_ideal(tmp_path: Path) -> None:
    """Every method has the full model and its own ideal in the same table."""
    main = load("cpu_prefill").main
    command = ["--smoke", "--repeats", "2", "--new-tokens", "3", "--methods", "fastv", "no-such-method", "vidcom2"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "cpu_prefill.json").read_text())
    runs, ideals, summary = written["runs"], written["ideals"], written["summary"]
    assert list(runs) == ["full model", "fastv", "vidcom2"]
    assert all(len(samples) == 2 for samples in runs.values())
    cut = runs["fastv"][0]["layers"]
    assert cut[0] == cut[1] == 97 and cut[2] < cut[1]
    assert {str(length) for length in (*cut, *runs["vidcom2"][0]["layers"])} == set(ideals)
    expected = sum(float(np.median([run["first"] for run in ideals[str(length)]])) for length in cut) / len(cut)
    assert summary["fastv"]["ideal_first_s"] == pytest.approx(expected)
    assert summary["full model"]["first_of_full"] == 1.0
    page = (tmp_path / "cpu_prefill.md").read_text()
    assert "not measured" in page and "torch" in page
    assert "no-such-method failed: There is no method" in page


def test_own_time_covers_every_stage(tmp_path: Path) -> None:
    """Methods in front of and inside the LLM, and the passes to compare with, on small features."""
    module = load("own_time")
    command = ["--quick", "--frames", "4", "--width", "64", "--output", str(tmp_path)]
    names = ["vidcom2", "holitom", "hiprune", "fastv", "frame-subsample", "divprune", "none"]
    inside_the_tower = ["tome", "flowcut", "explainability-compression", "vflowopt"]
    assert module.main([*command, "--methods", *names, *inside_the_tower]) == 0
    written = json.loads((tmp_path / "own_time.json").read_text())
    summary = written["summary"]
    assert {*names, *inside_the_tower} < set(summary), "a method was left out"
    assert summary["tome"]["patches_per_layer"] == summary["flowcut"]["patches_per_layer"] == 0.25
    assert summary["none"]["operations_saved"] == 0 < summary["tome"]["seconds"]
    assert summary["vflowopt"]["tower_signals"] == 1
    assert len(written["seconds"][module.LOOP]) == 1
    assert summary["hiprune"]["tower_signals"] == 2 and summary["vidcom2"]["tower_signals"] == 0
    assert summary["frame-subsample"]["patches_per_layer"] == 0.25
    assert summary["fastv"]["patches_per_layer"] == pytest.approx((2 + 26 * 0.25) / 28)
    assert summary["vidcom2"]["of_one_pass"] > 0
    case = module.features(4, width=64)
    decision = module.Decision(resolve("holitom", retention=0.25)[0], case)
    assert decision.run() > 0
    assert decision.layers[17] // 2 == decision.layers[18] < decision.layers[0] + 1


def test_the_plain_loop_chooses_what_divprune_chooses() -> None:
    """Its time is only worth something beside a selection that is the same."""
    features = torch.randn(300, 24, generator=torch.Generator().manual_seed(3))
    expected = select_diverse(features, 0.3, 90)[1]
    assert load("own_time").plain_divprune(features, 90).tolist() == expected.tolist()


def test_allocated_peak_counts_what_lives_at_once() -> None:
    """Two tensors of a megabyte at once, a third behind them."""

    def call() -> None:
        first, second = torch.zeros(1 << 18), torch.zeros(1 << 18)
        del first, second
        torch.zeros(1 << 18)

    measure = load("peak_memory").allocated_peak
    assert 2 << 20 <= measure(call) < (2 << 20) + 4096
    assert measure(call) == measure(call)


def test_peak_memory_runs_every_host_in_fresh_processes(tmp_path: Path) -> None:
    """Class-token methods go to the second host, each beside the full model there; a second run resumes."""
    module = load("peak_memory")
    command = ["--frames", "2", "--output", str(tmp_path)]
    assert module.main([*command, "--methods", "random", "fastervlm"]) == 0
    peaks = json.loads((tmp_path / "peak_memory.json").read_text())["peaks"]
    assert peaks["random"]["host"] == "llava_onevision" and peaks["fastervlm"]["host"] == "llava_next_video"
    assert {name for name in peaks if name.startswith("full model")} == {
        "full model (llava_onevision)",
        "full model (llava_next_video)",
    }
    assert peaks["random"]["entered"] == 98 and peaks["random"]["uncompressed"] == 392
    assert 0 < peaks["random"]["allocated_of_full"] < 1
    assert module.main([*command, "--methods", "random", "--resume"]) == 0
    assert json.loads((tmp_path / "peak_memory.json").read_text())["peaks"]["random"] == peaks["random"]


def test_stand_ins_have_the_shapes_that_the_signals_declare() -> None:
    """One for every signal that a tower or the LLM gives; attention rows sum to one."""
    module = load("own_time")
    case = module.features(2, width=48)
    requests = [name for name in SIGNALS if name.startswith(("encoder.", "decoder."))]
    made = module.stand_ins(requests, case, 100)
    for name, value in made.items():
        assert value.dim() == SIGNALS[name].shape.count(",") + 1
        assert value.shape[0] > 1
    rows = made["decoder.last_query_attention"]
    assert rows.shape == (100,) and float(rows.sum()) == pytest.approx(1.0)
    assert made["decoder.hidden_states"].shape == (100, 48)
