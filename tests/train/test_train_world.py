"""The procedural world as training data, and the benchmark that trains on it, in miniature."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokensieve.train import DataSource, RecordDataset
from tokensieve.train.check import load_samples
from tokensieve.train.world import WorldSamples
from tokensieve.world import items
from tokensieve.world import models as world
from tokensieve.world.files import write_world
from tokensieve.world.training import attention
from tokensieve.world.training.tower import normalised
from tokensieve.world.training.turns import IGNORED


def test_samples_depend_on_the_epoch_alone() -> None:
    data = WorldSamples(3, frames=8)
    length, first = len(data), data[0]
    assert first.videos[0].shape == (8, 96, 96, 3) and [turn.role for turn in first.turns] == ["user", "assistant"]
    data.set_epoch(1)
    assert len(data) == length and data[0].name == "train-000003/0"
    data.set_epoch(0)
    assert np.array_equal(data[0].videos[0], first.videos[0]) and data[0].turns == first.turns
    again = WorldSamples(3, frames=8, first=3)
    data.set_epoch(1)
    assert [again[number].name for number in range(2)] == [data[number].name for number in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained contrastive pair and video LLM of the bundled sizes, saved."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    world.clip_pair().save_pretrained(folder / "pair")
    world.clip_processor().save_pretrained(folder / "pair")
    world.video_llm().save_pretrained(folder / "base")
    world.video_processor().save_pretrained(folder / "base")
    return folder / "pair", folder / "base"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmarks.ppllava_world")
    torch.set_num_threads(threads)


class TestCachedPath:
    """`benchmarks.ppllava_cached` computes what the model of transformers computes."""

    @pytest.mark.parametrize("weighting", ["window_renorm", "window_softmax", "average"])
    @pytest.mark.parametrize("ratio", ["18x", "9x", "4x"])
    def test_logits_of_the_public_path(self, folders: Any, benchmark: Any, weighting: str, ratio: str) -> None:
        kind = benchmark.Model(weighting=weighting)
        reader = benchmark.build(folders, kind)
        asked = items("test", 2, per_clip=2, frames=8)
        clips = [asked[0].read_frames()[0], asked[2].read_frames()[0]]
        questions = [[benchmark._question(item) for item in asked[:2]], [benchmark._question(asked[2])]]
        model, processor = reader.model.eval(), reader.processor
        shown, kernel = self._features(model, clips), benchmark.KERNELS[ratio]
        with torch.no_grad():
            logits, turns = reader(shown, questions, kernel)
        model.config.video_kernel = processor.video_kernel = list(kernel)
        model.model.language_model.config._attn_implementation = "sdpa"
        for clip, number, item in ((0, 0, asked[0]), (0, 1, asked[1]), (1, 0, asked[2])):
            content = [{"type": "video"}, {"type": "text", "text": item.question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": item.answer}]
            text = processor.apply_chat_template(messages, tokenize=False).strip()
            inputs = processor(text=text, videos=[clips[clip]], questions=item.question)
            with torch.no_grad():
                whole = model(**inputs).logits[0]
            own = turns.ids[clip, number]
            length = int((own != processor.tokenizer.pad_token_id).sum())
            # The prompt of use ends in the tokens of the turn.
            assert inputs["input_ids"][0, -length:].tolist() == own[:length].tolist()
            torch.testing.assert_close(logits[clip, number, :length], whole[-length:], rtol=0, atol=2e-4)

    def test_right_answers_are_those_of_generation(self, folders: Any, benchmark: Any) -> None:
        reader = benchmark.build(folders, benchmark.Model())
        item = items("test", 1, per_clip=1, frames=8)[0]
        frames, _ = item.read_frames()
        model, processor = reader.model.eval(), reader.processor
        (features,) = self._features(model, [frames])
        content = [{"type": "video"}, {"type": "text", "text": item.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, videos=[frames])
        decoder = model.model.language_model
        decoder.config._attn_implementation = "sdpa"
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        decoder.config._attn_implementation = attention.NAME
        asked = benchmark._question(item)
        answer = processor.tokenizer.decode(said)
        with torch.no_grad():
            logits, turns = reader([features], [[dataclasses.replace(asked, answer=answer)]], (2, 3, 3))
        wanted = turns.targets[0, 0] != IGNORED
        assert logits[0, 0].argmax(-1)[wanted][:3].tolist() == said.tolist()
        # All words are right; an answer counts if its end is the likeliest word behind them, too.
        ends = int(logits[0, 0].argmax(-1)[wanted][3]) == processor.tokenizer.eos_token_id
        found = benchmark.right_answers(reader, [features], [[dataclasses.replace(asked, answer=answer)]], (2, 3, 3))
        assert found == [ends]
        assert benchmark.right_answers(reader, [features], [[asked]], (2, 3, 3)) == [False]

    @staticmethod
    def _features(model: Any, clips: list[np.ndarray]) -> list[torch.Tensor]:
        with torch.no_grad():
            states = [
                model.model.vision_tower(normalised(torch.from_numpy(clip)), output_hidden_states=True)
                for clip in clips
            ]
        return [state.hidden_states[-2][:, 1:] for state in states]

    def test_long_prompts_reach_behind_the_context(self, benchmark: Any) -> None:
        cached = importlib.import_module("benchmarks.ppllava_cached")
        asked = [benchmark._question(item) for item in items("test", 3, per_clip=4, frames=8)]
        words = world.tokenizer(for_clip=True)
        unknown = words.unk_token_id
        for number in range(20):
            for before, after in zip(asked, cached.lengthened(asked, np.random.default_rng(number)), strict=True):
                ids = words(after.text)["input_ids"]
                # 32 tokens are read without the extension, so none of the question; 68 with it, so all.
                end = len(ids) - len(words(before.text, add_special_tokens=False)["input_ids"]) - 1
                assert end >= 32 and len(ids) <= 68 and unknown not in ids
                assert after.text.endswith(before.text) and after.answer == before.answer


def test_benchmark_in_miniature(folders: Any, benchmark: Any, tmp_path: Path) -> None:
    words = ["--pair", folders[0], "--base", folders[1], "--work", tmp_path / "work", "--output", tmp_path]
    words += ["--clips", 4, "--test-clips", 2, "--steps", 2, "--long-steps", 1, "--questions", 2]
    words += ["--models", "guided, window_r", "average", "subsampled", "all"]
    assert benchmark.main([str(word) for word in words]) == 0
    file = tmp_path / "work" / "average" / "answers.json"
    stamp, table = file.stat().st_mtime_ns, (tmp_path / "ppllava_world.md").read_text()
    # A second run trains nothing again.
    assert benchmark.main([str(word) for word in words]) == 0
    assert file.stat().st_mtime_ns == stamp and (tmp_path / "ppllava_world.md").read_text() == table
    found = json.loads((tmp_path / "ppllava_world.json").read_text())
    tokens = {(row["model"], row["fewer"]): row["tokens"] for row in found["answers"]}
    for model in ("average", "guided, window_renorm", "subsampled patches"):
        # Eight frames of 12 x 12 patches.
        assert [tokens[model, ratio] for ratio in ("18x", "9x", "4x")] == [64, 128, 288]
    assert tokens["all tokens", "18x"] == 1152 and tokens["subsampled frames", "4x"] == 288
    assert all(len(row["right"]) == len(found["questions"]) for row in found["answers"])
    assert "Questions about a place or a moment" in table and "guided, context as it was" in table


def test_interrupted_training_goes_on(folders: Any, benchmark: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The weights are those of a training without interruption."""
    monkeypatch.setattr(benchmark, "SAVE_EVERY", 1)
    words = ["--pair", folders[0], "--base", folders[1], "--clips", 4, "--test-clips", 1, "--steps", 3]
    words += ["--long-steps", 0, "--questions", 2, "--models", "guided, window_r"]

    def run(name: str) -> Path:
        target = tmp_path / name
        benchmark.main([str(word) for word in [*words, "--work", target, "--output", target]])
        return target

    whole = run("whole")
    loss, seen = benchmark.answer_loss, []

    def failing(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(benchmark, "answer_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(benchmark, "answer_loss", loss)
    cut = run("cut")
    name = "guided--window-renorm/model/model.safetensors"
    first, second = (load_file(folder / name) for folder in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert len(seen) == 3


def test_files_for_training(tmp_path: Path) -> None:
    """Every question as a conversation and as a pair of answers, as `read_records` takes them."""
    questions = write_world(tmp_path, "train", 3, per_clip=2, frames=8)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    said, _ = load_samples([DataSource(str(tmp_path / "conversations.jsonl"))], "decode")
    pairs, _ = load_samples([DataSource(str(tmp_path / "preferences.jsonl"))], "decode")
    for row, sample, pair in zip(rows, said, pairs, strict=True):
        assert [turn.text for turn in sample.turns] == [row["question"], row["answer"]]
        assert pair.chosen == row["answer"] and pair.rejected in row["candidates"] and pair.rejected != pair.chosen
        assert sample.videos == pair.videos == [tmp_path / row["video"]]
    clip = RecordDataset(said, 8)[0].videos[0]
    assert np.abs(clip.astype(int) - items("train", 3, frames=8)[0].read_frames()[0]).mean() < 3
