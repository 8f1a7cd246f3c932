"""Training of tiny models from recipe to saved model: loss, resuming, preferences, adapters, the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppllava_tiny import build, language_model, pair, question_tokenizer
from train_data import COLOURS, QUESTION, turns
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from typer.testing import CliRunner

from tokensieve.cli import app
from tokensieve.models.ppllava import register
from tokensieve.train import DataSource, LoraOptions, Sample, TrainConfig, Turn, train
from tokensieve.train.config import TrainingError
from tokensieve.train.dpo import answer_log_probabilities, preference_loss
from tokensieve.train.freeze import default_groups, group_of, set_trainable
from tokensieve.train.loop import training_arguments


def _recipe(output: Path, data: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output": str(output),
        "data": [DataSource(str(data))],
        "frames": 4,
        "batch": 5,
        "accumulation": 1,
        "epochs": 3,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "log_steps": 1,
        "workers": 0,
        "warmup": 0.0,
        "trainer": {"use_cpu": True},
    }
    return TrainConfig(**{**settings, **fields})


def _train(config: TrainConfig, parts: Any = None, **options: Any) -> Any:
    model, processor = parts or build()
    return train(config, model=model, processor=processor, show_progress=False, **options)


needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs peft: pip install tokensieve[train]")


class Kill(TrainerCallback):
    """Ends the process's work in the middle."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestAnswers:
    def test_loss_falls_and_the_model_is_usable(self, annotations: Path, tmp_path: Path) -> None:
        result = _train(_recipe(tmp_path, annotations, epochs=12, learning_rate=2e-2, schedule="constant"))
        losses = [row["loss"] for row in result.metrics]
        assert len(losses) == result.steps == 24
        assert losses[-1] < 0.6 * losses[0]
        assert result.data.kinds == {"video": 4, "image": 4, "images": 1, "text": 1}
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["loss"] for row in rows if "loss" in row] == losses
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
        assert json.loads((tmp_path / "data-check.json").read_text())["good"] == 10
        register()
        model = AutoModelForImageTextToText.from_pretrained(result.folder).eval()
        processor = AutoProcessor.from_pretrained(result.folder)
        assert model.config.text_config.use_cache
        clip = np.full((4, 40, 60, 3), COLOURS["red"], dtype=np.uint8)
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, videos=[clip])
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, result.model(**inputs).logits)
            said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert "ball is" in processor.tokenizer.decode(said[0])

    def test_only_the_named_groups_move(self, annotations: Path, tmp_path: Path) -> None:
        model, processor = build(bt_adapter_depth=1)
        model.config.pooling_temperature = 1e-4
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = _train(_recipe(tmp_path, annotations, max_steps=2), (model, processor))
        after = result.model.state_dict()
        moved = {group_of(name) for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {"language_model", "projector", "alignment"}
        assert set(result.trainable) == {*moved, "bt_adapter"}

    def test_killed_and_resumed_gives_the_same_weights(self, annotations: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"save_steps": 2, "epochs": 2, "batch": 4, "frames": 2}
        whole = _train(_recipe(tmp_path / "whole", annotations, **options))
        assert whole.steps == 6
        torch.manual_seed(99)
        with pytest.raises(KeyboardInterrupt):
            _train(_recipe(tmp_path / "killed", annotations, **options), callbacks=[Kill(5)])
        torch.manual_seed(77)
        resumed = _train(_recipe(tmp_path / "killed", annotations, **options), resume=True)
        assert resumed.steps == 6
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
        assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in whole.metrics]

    def test_nothing_to_resume(self, annotations: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="no checkpoint to resume from"):
            _train(_recipe(tmp_path, annotations), resume=True)

    def test_broken_records_stop_before_the_first_step(self, media: Path, tmp_path: Path) -> None:
        path = media / "broken.json"
        path.write_text(json.dumps([{"id": "x", "video": "gone", "conversations": turns("a", "b")}]))
        with pytest.raises(TrainingError, match=r"broken\.json:0 \(id x\): .*gone does not exist"):
            _train(_recipe(tmp_path / "out", path, on_broken="stop"))
        assert not (tmp_path / "out").exists()

    def test_data_of_ones_own(self, tmp_path: Path) -> None:
        clip = np.full((2, 40, 60, 3), 90, dtype=np.uint8)
        said = [Turn("user", QUESTION), Turn("assistant", "The ball is red.")]
        data = [Sample(said, videos=[clip]) for _ in range(4)]
        result = _train(_recipe(tmp_path, tmp_path, batch=2, epochs=1), dataset=data)
        assert result.steps == 2 and result.data is None

    def test_checkpointing_and_bfloat16(self, annotations: Path, tmp_path: Path) -> None:
        fields = {"gradient_checkpointing": True, "precision": "bf16", "max_steps": 2, "accumulation": 2}
        result = _train(_recipe(tmp_path, annotations, batch=2, **fields))
        assert result.steps == 2 and all(np.isfinite(row["loss"]) for row in result.metrics)
        assert {value.dtype for value in result.model.parameters()} == {torch.float32}


@needs_peft
class TestAdapters:
    def test_lora_is_merged_and_only_adapters_and_groups_learn(self, annotations: Path, tmp_path: Path) -> None:
        model, processor = build()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = _recipe(
            tmp_path,
            annotations,
            epochs=4,
            trainable=["projector"],
            lora=LoraOptions(rank=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj"]),
        )
        result = _train(config, (model, processor))
        assert result.trainable["lora"] == 2 * 2 * 4 * (32 + 32) and result.trainable["projector"] > 0
        assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
        register()
        loaded = AutoModelForImageTextToText.from_pretrained(result.folder).eval()
        assert not any("lora" in name for name in loaded.state_dict())
        moved = {name for name, value in loaded.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {
            *(f"model.language_model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qv"),
            *(f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
        }

    def test_resumed(self, annotations: Path, tmp_path: Path) -> None:
        lora = LoraOptions(rank=2, dropout=0.1)
        options: dict[str, Any] = {"save_steps": 2, "epochs": 2, "lora": lora, "frames": 2}
        whole = _train(_recipe(tmp_path / "whole", annotations, **options))
        with pytest.raises(KeyboardInterrupt):
            _train(_recipe(tmp_path / "killed", annotations, **options), callbacks=[Kill(3)])
        resumed = _train(_recipe(tmp_path / "killed", annotations, **options), resume=True)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(value, resumed.model.state_dict()[name], rtol=0, atol=1e-6)

    def test_unknown_layers(self, annotations: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="has no layers 'c_attn'"):
            _train(_recipe(tmp_path, annotations, lora=LoraOptions(targets=["c_attn"])))


class TestPreferences:
    def test_margin_by_its_formula(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 5, 7, generator=generator)
        labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 6, 0]])
        total, count = answer_log_probabilities(logits, labels)
        spread = logits.log_softmax(-1)
        assert count.tolist() == [2, 4]
        torch.testing.assert_close(total[0], spread[0, 1, 3] + spread[0, 2, 4])
        torch.testing.assert_close(total[1], sum(spread[1, k, token] for k, token in enumerate((1, 2, 6, 0))))
        policy, reference = torch.tensor([[-2.0], [-5.0]]), torch.tensor([[-3.0], [-4.0]])
        loss, margin = preference_loss(policy, reference, 0.1)
        torch.testing.assert_close(margin, torch.tensor([0.2]))
        torch.testing.assert_close(loss, -torch.log(torch.sigmoid(torch.tensor([0.2]))))

    @pytest.mark.parametrize(
        "lora", [None, pytest.param(LoraOptions(rank=4, alpha=8, dropout=0.0), marks=needs_peft)], ids=["full", "lora"]
    )
    def test_margin_grows(self, preferences: Path, tmp_path: Path, lora: Any) -> None:
        config = _recipe(tmp_path, preferences, stage="dpo", batch=2, epochs=5, learning_rate=1e-2, lora=lora)
        model, processor = build()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = _train(config, (model, processor))
        first, last = result.metrics[0], result.metrics[-1]
        # The policy starts at its reference.
        assert first["margin"] == pytest.approx(0, abs=1e-5)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
        assert last["margin"] > 0.05 and last["accuracy"] == 1.0 and last["loss"] < first["loss"]
        assert last["reward_chosen"] - last["reward_rejected"] == pytest.approx(last["margin"], abs=1e-5)
        moved = {name for name, value in result.model.state_dict().items() if not torch.equal(value, before[name])}
        assert {group_of(name) for name in moved} == {"language_model"}

    def test_resumed_with_the_first_reference(self, preferences: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"stage": "dpo", "batch": 2, "epochs": 2, "save_steps": 2, "gamma": 0.5, "frames": 2}
        whole = _train(_recipe(tmp_path / "whole", preferences, **options))
        with pytest.raises(KeyboardInterrupt):
            _train(_recipe(tmp_path / "killed", preferences, **options), callbacks=[Kill(3)])
        resumed = _train(_recipe(tmp_path / "killed", preferences, **options), resume=True)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name

    def test_data_without_pairs(self, annotations: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="the data hold none"):
            _train(_recipe(tmp_path, annotations, stage="dpo"))


class TestParts:
    def test_new_model_from_folders(self, annotations: Path, tmp_path: Path) -> None:
        """A pair and a language model as saved by transformers."""
        _, processor = build()
        tokenizer = processor.tokenizer
        language_model(len(tokenizer)).save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        pair().save_pretrained(tmp_path / "pair")
        question_tokenizer().save_pretrained(tmp_path / "pair")
        config = _recipe(
            tmp_path / "out",
            annotations,
            pair=str(tmp_path / "pair"),
            language_model=str(tmp_path / "lm"),
            model_fields={"image_grid_pinpoints": [], "weighting": "window_renorm"},
            max_steps=1,
        )
        first = train(config, show_progress=False)
        assert first.model.config.weighting == "window_renorm" and first.model.config.question_length == 248
        again = _recipe(tmp_path / "more", annotations, model=str(first.folder), max_steps=1)
        assert train(again, show_progress=False).steps == 1

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({}, "names either model, or pair"),
            ({"model": "a", "pair": "b"}, "names either model, or pair"),
            ({"pair": "b", "base": "c", "language_model": "d"}, "names either model, or pair"),
            ({"model": "./absent-folder"}, "cannot be loaded"),
        ],
    )
    def test_faults(self, fields: Any, words: str, annotations: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=words):
            train(_recipe(tmp_path, annotations, **fields), show_progress=False)

    def test_groups(self) -> None:
        model, _ = build("siglip", bt_adapter_depth=0)
        counts = set_trainable(model, default_groups("sft", "siglip"))
        assert "text_tower" in counts and "vision_tower" not in counts
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        assert any(name.endswith("logit_scale") for name in frozen)
        assert {group_of(name) for name in frozen} == {"frozen", "vision_tower", "newline"}
        with pytest.raises(TrainingError, match="hold no parameters"):
            set_trainable(model, ["bt_adapter"])

    def test_arguments(self, tmp_path: Path) -> None:
        config = _recipe(tmp_path, tmp_path, trainer={"colour": 1})
        with pytest.raises(TrainingError, match="unknown field 'colour'"):
            training_arguments(config)
        with pytest.raises(TrainingError, match="refuses the recipe"):
            training_arguments(_recipe(tmp_path, tmp_path, schedule="zigzag"))
        arguments = training_arguments(_recipe(tmp_path, tmp_path, trainer={"use_cpu": True, "weight_decay": 0.5}))
        assert arguments.weight_decay == 0.5 and arguments.get_warmup_steps(100) == 0


class TestCommand:
    @pytest.fixture
    def recipe(self, annotations: Path, tmp_path: Path) -> Path:
        model, processor = build()
        model.save_pretrained(tmp_path / "start")
        processor.save_pretrained(tmp_path / "start")
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: start\noutput: out\ndata: [{{path: {annotations}}}]\nframes: 4\nbatch: 5\naccumulation: 1\n"
            "precision: fp32\nworkers: 0\nlog_steps: 1\nsave_steps: 1\ntrainer: {use_cpu: true}\n"
        )
        return path

    def _run(self, *words: Any) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def test_train_and_resume(self, recipe: Path, tmp_path: Path) -> None:
        done = self._run("train", "ppllava", "-c", recipe, "--set", "max_steps=1", "--no-progress")
        assert done.exit_code == 0, done.output
        assert "10 records can be trained on" in done.output and "1 updates; model:" in done.output
        assert "loss" in done.output and (tmp_path / "out" / "model" / "model.safetensors").is_file()
        more = self._run("train", "ppllava", "-c", recipe, "--set", "max_steps=2", "--resume", "--no-progress")
        assert more.exit_code == 0 and "2 updates; model:" in more.output
        assert not list((tmp_path / "out" / "model").glob("*.bin"))

    def test_check_only(self, recipe: Path, tmp_path: Path) -> None:
        done = self._run("train", "ppllava", "-c", recipe, "--check-only", "--no-progress")
        assert done.exit_code == 0 and "10 records can be trained on" in done.output
        assert not (tmp_path / "out").exists()

    def test_errors_take_one_line(self, recipe: Path) -> None:
        for words in (["--set", "frame=3"], ["--set", "frames"], ["--set", "model=./gone"]):
            failed = self._run("train", "ppllava", "-c", recipe, *words)
            assert failed.exit_code == 2 and "error: " in failed.output, failed.output
        assert self._run("train", "ppllava", "-c", recipe.parent / "absent.yaml").exit_code == 2
