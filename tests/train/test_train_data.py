"""Recipes, records, the data check, frames, batches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppllava_tiny import build
from train_data import COLOURS, QUESTION, turns

from tokensieve.errors import HostError, VideoError
from tokensieve.train import Collator, DataSource, RecordDataset, Sample, TrainConfig, Turn, read_config, read_records
from tokensieve.train.check import load_samples
from tokensieve.train.config import TrainingError
from tokensieve.train.frames import central_indices, frames_at, random_indices, read_frames, video_facts
from tokensieve.train.records import parse_record
from tokensieve.world import bundled

VIDEOS = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data") / "videos"
RECIPES = Path(__file__).parents[2] / "tokensieve" / "train" / "recipes"
LORA = RECIPES / "ppllava-lora-one-gpu.yaml"


class TestRecipes:
    @pytest.mark.parametrize("path", [*sorted(RECIPES.glob("*-7b-*.yaml")), LORA], ids=lambda path: path.stem)
    def test_published_recipes_are_read(self, path: Path) -> None:
        config = read_config(path)
        assert config.frames == 32 and config.data and config.precision == "bf16" and config.gradient_checkpointing
        if "lora" not in path.stem:
            samples = config.batch * config.accumulation * 8
            assert samples == (64 if config.stage == "dpo" else 128)
            assert config.trainer["deepspeed"]["zero_optimization"]["stage"] == (2 if config.stage == "dpo" else 3)

    def test_recipes_of_the_world_name_what_is_bundled(self) -> None:
        sft, dpo = (read_config(RECIPES / f"ppllava-world-{stage}.yaml") for stage in ("sft", "dpo"))
        assert (sft.pair, sft.base) == (str(bundled("clip-pair")), str(bundled("video-llm")))
        assert dpo.stage == "dpo" and dpo.model == "world-sft/model"
        with pytest.raises(HostError, match="no bundled model 'nothing'"):
            read_config(RECIPES / "ppllava-world-sft.yaml", {"pair": "bundled:nothing"})

    def test_recipes_by_name_start_from_the_current_folder(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        config = read_config("ppllava-world-sft")
        assert config.output == str(tmp_path / "world-sft")
        assert config.data[0].path == str(tmp_path / "world" / "conversations.jsonl")
        with pytest.raises(TrainingError, match="cannot be read"):
            read_config("ppllava-world-none")

    def test_published_numbers(self) -> None:
        sft, dpo, qwen = (
            read_config(RECIPES / f"ppllava-{name}.yaml")
            for name in ("vicuna-7b-video-sft", "vicuna-7b-video-dpo", "qwen2-7b-video-sft")
        )
        assert (sft.epochs, sft.learning_rate, sft.warmup, sft.schedule) == (2, 2e-5, 0.03, "cosine")
        assert (dpo.epochs, dpo.learning_rate, dpo.warmup, dpo.schedule) == (2, 5e-6, 0.1, "linear")
        assert (dpo.beta, dpo.alpha, dpo.gamma, dpo.max_length) == (0.1, 1, 0, 2048)
        assert (qwen.epochs, qwen.learning_rate) == (1, 1e-5)
        assert qwen.base == "llava-hf/llava-onevision-qwen2-7b-si-hf"

    def test_paths_start_from_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        path = tmp_path / "recipe.yaml"
        path.write_text("data: [{path: a/b.json}]\nbase: base\npair: openai/clip\noutput: out\nlearning_rate: 2e-5\n")
        config = read_config(path, {"epochs": 3})
        assert config.data[0].path == str(tmp_path / "a/b.json") and config.data[0].media == str(tmp_path / "a")
        assert (config.base, config.pair, config.output) == (
            str(tmp_path / "base"),
            "openai/clip",
            str(tmp_path / "out"),
        )
        assert (config.epochs, config.learning_rate) == (3.0, 2e-5)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("stage: rl", "stage is 'rl'; choose one of sft, dpo"),
            ("learning_rat: 1", "unknown field 'learning_rat'"),
            ("data: [{media: x}]", "lacks the field 'path'"),
            ("data: x", "data is 'x'; give a list"),
            ("data: [x]", "give its fields"),
            ("batch: 1.5", "batch is 1.5; give a value of type int"),
            ("learning_rate: fast", "learning_rate is 'fast'; give a number"),
            ("batch: 0", "batch is 0; give 1 or more"),
            ("warmup: 100", "a share below 1"),
            ("trainable: [head]", "unknown group 'head'"),
            ("lora: 4", "give its fields"),
            ("- a", "holds no fields"),
            ("a: [", "is no YAML"),
        ],
    )
    def test_faults(self, text: str, words: str, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(TrainingError, match=words.replace("[", r"\[")):
            read_config(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"cannot be read \(No such file"):
            read_config(tmp_path / "absent.yaml")


class TestRecords:
    def test_conversations(self, annotations: Path) -> None:
        samples = [sample for _, sample in read_records(DataSource(str(annotations)))]
        assert all(isinstance(sample, Sample) for sample in samples)
        kinds = [sample.kind for sample in samples if isinstance(sample, Sample)]
        assert kinds == ["video", "image"] * 4 + ["images", "text"]
        first: Any = samples[0]
        assert first.turns == [Turn("user", QUESTION), Turn("assistant", "The ball is red.")]
        assert first.videos == [annotations.parent / "red"] and first.name == "train.json:0 (id v-red)"
        assert [turn.role for turn in samples[-1].turns] == ["user", "assistant"] * 2  # type: ignore[union-attr]
        assert samples[-2].turns[0].text == "Which is larger?"  # type: ignore[union-attr]

    def test_questions_of_videochat(self, tmp_path: Path) -> None:
        pairs = [
            {"i": "Choose the best option.", "q": "What moves?", "a": "A car."},
            {"i": "", "q": "When?", "a": "Now."},
        ]
        sample = parse_record({"video": "a/1.mp4", "QA": pairs}, tmp_path)
        assert [turn.role for turn in sample.turns] == ["system", *["user", "assistant"] * 2]
        assert sample.turns[0].text == "Choose the best option." and sample.videos == [tmp_path / "a/1.mp4"]
        alone = parse_record({"image": "a.png", "QA": [{"i": "Describe it.", "q": "", "a": "A dog."}]}, tmp_path)
        assert [turn.text for turn in alone.turns] == ["Describe it.", "A dog."]

    def test_preferences(self, preferences: Path) -> None:
        samples: list[Any] = [sample for _, sample in read_records(DataSource(str(preferences), limit=2))]
        assert len(samples) == 2
        assert (samples[0].chosen, samples[0].rejected) == ("The ball is red.", "It is green, I think.")
        assert [turn.role for turn in samples[0].turns] == ["user"]

    @pytest.mark.parametrize(
        ("record", "words"),
        [
            ([], "not an object"),
            ({"video": "a"}, "conversations are missing"),
            ({"conversations": [{"from": "robot", "value": "a"}]}, "turn 0 has no known speaker"),
            ({"conversations": turns("a", "")}, "turn 1 is empty"),
            ({"conversations": turns("a", "b")[:1]}, "the last question has no answer"),
            ({"conversations": turns("a", "b")[::-1]}, "do not speak in turn"),
            ({"conversations": turns("a", "b"), "video": 7}, "video is 7, not a path"),
            ({"conversations": turns("a", "b"), "video": "a", "image": "b"}, "one kind of them"),
            ({"QA": []}, "QA holds no questions"),
            ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
            ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is empty"),
        ],
    )
    def test_broken_records(self, record: Any, words: str, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=words):
            parse_record(record, tmp_path)


class TestCheck:
    @pytest.fixture
    def broken(self, annotations: Path, tmp_path: Path) -> DataSource:
        """The good records with four broken ones between them."""
        (tmp_path / "torn.mp4").write_bytes(b"no video")
        records = json.loads(annotations.read_text())
        records[1:1] = [
            {"id": "gone", "video": "gone.mp4", "conversations": turns("a", "b")},
            {"id": "torn", "video": str(tmp_path / "torn.mp4"), "conversations": turns("a", "b")},
            {"id": "mute", "video": "red", "conversations": turns("a", " ")},
        ]
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n{not json\n")
        return DataSource(str(path), media=str(annotations.parent))

    @pytest.mark.parametrize(("depth", "lost"), [("none", 2), ("files", 3), ("decode", 4)])
    def test_broken_records_are_named_and_left_out(self, broken: DataSource, depth: Any, lost: int) -> None:
        seen: list[int] = []
        samples, report = load_samples([broken], depth, "skip", seen.append)
        assert len(samples) == report.good == 14 - lost
        assert seen == list(range(1, 15))
        faults = dict(report.broken)
        assert faults["data.jsonl:3 (id mute)"].startswith("turn 1 is")
        assert "no JSON" in faults["data.jsonl:13"]
        if depth != "none":
            assert faults["data.jsonl:1 (id gone)"].endswith("gone.mp4 does not exist")
        assert ("data.jsonl:2 (id torn)" in faults) == (depth == "decode")
        assert "are broken: data.jsonl:" in str(report)

    def test_stop(self, broken: DataSource) -> None:
        with pytest.raises(TrainingError, match=r"data check failed: .* data\.jsonl:1 \(id gone\): .*does not exist"):
            load_samples([broken], "files", "stop")

    def test_nothing_left(self, tmp_path: Path) -> None:
        (tmp_path / "empty.json").write_text("[]")
        with pytest.raises(TrainingError, match="nothing to train on"):
            load_samples([DataSource(str(tmp_path / "empty.json"))])
        with pytest.raises(TrainingError, match="cannot be read"):
            load_samples([DataSource(str(tmp_path / "absent.json"))])

    def test_repeat(self, annotations: Path) -> None:
        samples, report = load_samples([DataSource(str(annotations), repeat=3, limit=2)])
        assert len(samples) == 6 and report.good == 2 and report.kinds == {"video": 1, "image": 1}


class TestFrames:
    def test_one_random_frame_per_segment(self) -> None:
        draws = np.stack([random_indices(100, 8, np.random.default_rng(seed)) for seed in range(300)])
        edges = np.linspace(0, 100, 9).astype(int)
        assert (draws >= edges[:-1]).all() and (draws < edges[1:]).all()
        assert all(len(set(column)) == high - low for column, low, high in zip(draws.T, edges, edges[1:], strict=False))
        assert random_indices(3, 5, np.random.default_rng(0)).tolist() == [0, 1, 2, 2, 2]

    def test_evaluation_formula(self) -> None:
        assert (
            central_indices(99, 4).tolist() == [int(99 / 8 + round(99 / 4 * k)) for k in range(4)] == [12, 37, 62, 86]
        )
        assert central_indices(299, 2, fps=10, start=5, end=9).tolist() == [60, 80]

    def test_real_video_and_folder(self, media: Path) -> None:
        frames = read_frames(media / "red", 2)
        assert frames.shape == (2, 40, 60, 3)
        # Frame k is dark in its k-th stripe: central frames of five are 1 and 3.
        assert [int((frame[0, :, 0] < 150).argmax()) // 10 for frame in frames] == [1, 3]
        assert read_frames(media / "red", 7, np.random.default_rng(0)).shape[0] == 7
        with pytest.raises(VideoError, match="holds no pictures"):
            read_frames(Path(__file__).parent, 2)

    def test_video_file(self, tmp_path: Path) -> None:
        import av

        with av.open(str(tmp_path / "a.mp4"), "w") as output:
            stream: Any = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(30):
                frame = np.full((48, 64, 3), 8 * number, dtype=np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
        wanted = central_indices(29, 4)
        found = read_frames(tmp_path / "a.mp4", 4)[:, 0, 0, 0] / 8
        assert np.abs(found - wanted).max() < 0.6
        assert read_frames(tmp_path / "a.mp4", 40).shape[0] == 40

    @pytest.mark.parametrize("name", ["seagulls_mpeg4.avi", "cartoon_pigs.gif", "flipping_a_pancake.mkv"])
    def test_real_files(self, name: str) -> None:
        """Random frames of real containers lie inside of their segments."""
        if not (VIDEOS / name).is_file():
            pytest.skip(f"the real clips are not at {VIDEOS}; set TOKENSIEVE_DATA_DIR")
        total, rate = video_facts(VIDEOS / name)
        assert total > 20 and rate > 5
        frames = read_frames(VIDEOS / name, 4, np.random.default_rng(0))
        assert frames.shape[0] == 4 and frames.dtype == np.uint8
        wanted = random_indices(total, 4, np.random.default_rng(0))
        assert np.array_equal(frames[2:3], frames_at(VIDEOS / name, wanted[2:3]))


class TestDataset:
    def test_frames_depend_on_epoch_and_number_alone(self, annotations: Path) -> None:
        samples, _ = load_samples([DataSource(str(annotations))])
        data = RecordDataset(samples, frames=2, seed=3)
        first = data[0].videos[0]
        data[2]
        assert np.array_equal(data[0].videos[0], first)
        seen = set()
        for epoch in range(6):
            data.set_epoch(epoch)
            seen.add(data[0].videos[0].tobytes())
        assert len(seen) > 1
        fixed = RecordDataset(samples, frames=2, seed=3, fixed=True)
        fixed.set_epoch(5)
        assert np.array_equal(fixed[0].videos[0], first)

    def test_another_sample_takes_the_place(self, annotations: Path, media: Path) -> None:
        samples, _ = load_samples([DataSource(str(annotations), limit=1)])
        bad = Sample(samples[0].turns, videos=[media / "gone.mp4"], name="bad")
        data = RecordDataset([bad, samples[0]], frames=2)
        assert data[0].name == samples[0].name
        with pytest.raises(TrainingError, match="bad cannot be read"):
            RecordDataset([bad], on_broken="stop")[0]
        with pytest.raises(TrainingError, match="10 samples in a row"):
            RecordDataset([bad])[0]


@pytest.fixture(scope="module", params=["vicuna", "chatml"])
def parts(request: pytest.FixtureRequest) -> Any:
    """Model and processor."""
    return build(template=request.param)


class TestBatches:
    @pytest.fixture
    def samples(self, annotations: Path) -> list[Sample]:
        records, _ = load_samples([DataSource(str(annotations))])
        data = RecordDataset(records, frames=4)
        return [data[number] for number in (0, 1, 8, 9)]

    def test_labels_are_the_answers(self, parts: Any, samples: list[Sample]) -> None:
        model, processor = parts
        batch = Collator(processor)(samples)
        tokenizer, end = processor.tokenizer, processor.tokenizer.eos_token
        said = [
            tokenizer.decode([token for token in row if token != -100]).replace(end, "|")
            for row in batch["labels"].tolist()
        ]
        assert [text.split("|")[0].strip() for text in said][:3] == [
            "The ball is red.",
            "The ball is red.",
            "No, the square is smaller.",
        ]
        assert all(text.endswith("|") for text in said)
        assert [part.strip() for part in said[3].split("|")][:2] == ["A dog.", "To the fence."]
        visual = (batch["input_ids"] == processor.image_token_id) | (batch["input_ids"] == processor.video_token_id)
        assert (batch["labels"][visual] == -100).all() and visual.sum(1).tolist()[0] == 32
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        with torch.no_grad():
            assert model(**batch).loss.isfinite()

    def test_prompt_tokens_are_those_of_use(self, parts: Any, samples: list[Sample]) -> None:
        _, processor = parts
        batch = Collator(processor)(samples[:1])
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = processor(text=text, videos=list(samples[0].videos))
        length = prompt["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][:, :length], prompt["input_ids"])
        assert batch["labels"][0, length] != -100 and (batch["labels"][0, :length] == -100).all()
        assert torch.equal(batch["question_ids"], prompt["question_ids"])

    def test_question_text(self, parts: Any, samples: list[Sample]) -> None:
        _, processor = parts
        read = processor.question_tokenizer
        plain = Collator(processor)(samples)["question_ids"]
        whole = Collator(processor, "conversation")(samples)["question_ids"]
        assert read.decode(plain[3], skip_special_tokens=True) == "Who runs ? Where ?"
        assert "fence" in read.decode(whole[3]) and "fence" not in read.decode(plain[3])

    def test_pairs_share_what_they_show(self, parts: Any, preferences: Path) -> None:
        _, processor = parts
        records, _ = load_samples([DataSource(str(preferences))])
        data = RecordDataset(records, frames=2)
        batch = Collator(processor, pairs=True)([data[0], data[1]])
        assert batch["pixel_values_videos"].shape[0] == 2 and batch["video_index"].tolist() == [0, 1, 0, 1]
        said = [processor.tokenizer.decode([t for t in row if t != -100]) for row in batch["labels"].tolist()]
        assert [("is red" in text, "is green" in text) for text in said[:2]] == [(True, False), (False, True)]
        assert all("I think" in text for text in said[2:])

    def test_length_limit(self, parts: Any, samples: list[Sample]) -> None:
        _, processor = parts
        full = Collator(processor)(samples[:1])["input_ids"].shape[1]
        cut = Collator(processor, max_length=full - 3)(samples[:1])
        assert cut["input_ids"].shape[1] == full - 3
        with pytest.raises(TrainingError, match=r"max_length 20 cuts into its visual tokens"):
            Collator(processor, max_length=20)(samples[:1])

    def test_sample_without_answer(self, parts: Any) -> None:
        with pytest.raises(TrainingError, match="has no answer"):
            Collator(parts[1])([Sample([Turn("user", "Who?")], name="x")])


def test_defaults_follow_the_published_sft() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.warmup, config.schedule, config.frames) == (2e-5, 0.03, "cosine", 32)
    assert sorted(COLOURS) == ["blue", "green", "red", "white"]
