"""Whatever is wrong with the input: exit code 2, one line that says what and what to do, nothing on stdout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

import tokensieve
from tokensieve.core import registry
from tokensieve.hosts import tiny

Refused = Callable[..., str]
SHORT = ("--frames", 4, "--max-new-tokens", 2)


@pytest.fixture
def needs_class_token() -> Iterator[str]:
    """A method that needs the attention of a class token, which SigLIP towers do not have."""

    @dataclass
    class NeedsClassToken(tokensieve.Selector):
        name: ClassVar[str] = "needs-class-token"
        stages: ClassVar[tuple[Any, ...]] = ("tokens",)

        def signals(self, facts: Any) -> tuple[str, ...]:
            return ("encoder.class_attention@feature",)

    tokensieve.list_methods()
    tokensieve.register_method(NeedsClassToken)
    yield "needs-class-token"
    del registry._METHODS["needs-class-token"]


def test_missing_video(refused: Refused, tmp_path: Path) -> None:
    line = refused("ask", tmp_path / "none.mp4", "What?")
    assert "none.mp4 does not exist" in line


def test_folder_as_video(refused: Refused, tmp_path: Path) -> None:
    assert "is a folder" in refused("ask", tmp_path, "What?")


def test_empty_video(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "empty.mp4 is empty (0 bytes)" in refused("ask", path, "What?")


def test_audio_only(refused: Refused, sound: Path) -> None:
    line = refused("ask", sound, "What?")
    assert "has no video stream, only audio" in line and "give a video" in line


def test_encrypted_video(refused: Refused, encrypted: Path) -> None:
    assert "encrypted" in refused("ask", encrypted, "What?")


def test_stream_without_a_frame(refused: Refused, frameless: Path) -> None:
    line = refused("ask", frameless, "What?")
    assert "gives no frame" in line and "check" in line


def test_text_renamed_to_mp4(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("dear diary, today no video was shot\n" * 50)
    line = refused("ask", path, "What?")
    assert "notes.mp4 cannot be read as a video" in line and "text" in line


def test_unknown_method_names_the_nearest(refused: Refused, video: Path) -> None:
    line = refused("ask", video, "What?", "--method", "vidcom")
    assert "There is no method 'vidcom'" in line and "did you mean vidcom2" in line


def test_unknown_option_names_the_known(refused: Refused, video: Path) -> None:
    line = refused("ask", video, "What?", "--method", "random", "--set", "layer=2")
    assert "random has no option 'layer'" in line and "seed" in line
    assert "option=value" in refused("ask", video, "What?", "--set", "layer")


@pytest.mark.parametrize(
    ("method", "setting", "wanted"),
    [
        ("vidcom2", "temperature=hot", "The option temperature of vidcom2 takes float"),
        ("random", "seed=1.5", "The option seed of random takes int"),
        ("vidcom2", "similarity=euclidean", "euclidean"),
        ("uniform", "budget=nothing", "budget"),
        ("uniform", "positions=3", "positions"),
    ],
)
def test_option_of_another_type(
    refused: Refused, video: Path, model: Path, method: str, setting: str, wanted: str
) -> None:
    for words in (("--method", method, "--set", setting), ("--method", f"{method}:{setting}")):
        assert wanted in refused("ask", video, "What?", "--model", model, *words, *SHORT)


def test_absent_signal_names_methods_that_work(
    refused: Refused, video: Path, model: Path, needs_class_token: str
) -> None:
    line = refused("ask", video, "What?", "--model", model, "--method", needs_class_token)
    assert "needs encoder.class_attention, which llava_onevision cannot give" in line
    assert "no class token" in line
    working = line.partition("methods that work here: ")[2]
    assert "vidcom2" in working and needs_class_token not in working


@pytest.mark.parametrize("retention", ["0", "1.5", "-0.25", "nan", "inf"])
def test_retention_out_of_range(refused: Refused, video: Path, retention: str) -> None:
    line = refused("ask", video, "What?", f"--retention={retention}")
    assert "Retention must lie in (0, 1]" in line
    assert "Retention must lie in (0, 1]" in refused("ask", video, "What?", "--method", f"fastv:retention={retention}")


def test_retention_that_is_no_number(refused: Refused, video: Path) -> None:
    assert "--retention" in refused("ask", video, "What?", "--retention", "few")


@pytest.mark.parametrize("method", ["vidcom2", "random", "fastv:layer=2", "none"])
def test_nan_in_features(refused: Refused, video: Path, copied_model: Path, method: str) -> None:
    weights = load_file(copied_model / "model.safetensors")
    name = next(key for key in weights if "multi_modal_projector" in key and key.endswith("bias"))
    weights[name][0] = float("nan")
    save_file(weights, copied_model / "model.safetensors", {"format": "pt"})
    line = refused("ask", video, "What?", "--model", copied_model, "--method", method, *SHORT)
    assert "NaN" in line and "check" in line


def test_frame_numbers(refused: Refused, video: Path) -> None:
    assert "--frames must be 1 or more, not 0" in refused("ask", video, "What?", "--frames", 0)
    assert "fps must be above 0" in refused("ask", video, "What?", "--fps", 0)
    assert "start=100 lies after the end of the clip" in refused("ask", video, "What?", "--start", 100)
    assert "end must lie after start" in refused("ask", video, "What?", "--start", 2, "--end", 1)
    assert "--max-new-tokens must be 1 or more" in refused("ask", video, "What?", "--max-new-tokens", 0)


def test_empty_question(refused: Refused, video: Path) -> None:
    assert "question is empty" in refused("ask", video, "  ")


def test_device_dtype_and_kernel(refused: Refused, video: Path, model: Path) -> None:
    words = ("ask", video, "What?", "--model", model)
    assert "There is no dtype 'float3'" in refused(*words, "--dtype", "float3")
    assert "The device 'tpu7' cannot be used here" in refused(*words, "--device", "tpu7")
    assert "cuda" in refused(*words, "--device", "cuda:99")
    line = refused(*words, "--attn", "flash_attention_9")
    assert "The attention kernel 'flash_attention_9' cannot be used here" in line and "use sdpa or eager" in line
    assert "would be fetched as code" in refused(*words, "--attn", "someone/kernel")


def test_a_cut_behind_the_last_layer(refused: Refused, video: Path, model: Path) -> None:
    line = refused("ask", video, "What?", "--model", model, "--method", "fastv:layer=30")
    assert "layers 0..4" in line and "choose a layer" in line


def test_usage(refused: Refused) -> None:
    assert "see 'tokensieve ask --help'" in refused("ask")
    assert "'asq'" in refused("asq")
    assert "--frames" in refused("ask", "a.mp4", "What?", "--frames", "many")


class TestModels:
    """Folders and names that are no video LLM."""

    @pytest.fixture
    def refusal(self, refused: Refused, video: Path) -> Callable[[Any], str]:
        def ask(model: Any) -> str:
            line = refused("ask", video, "What?", "--model", model, *SHORT)
            assert (
                refused("profile", model, video, "--repeats", 1, "--frames", 2).partition("(")[0]
                == (line.partition("(")[0])
            )
            return line

        return ask

    def test_missing(self, refusal: Callable[[Any], str], tmp_path: Path) -> None:
        assert "model folder" in (line := refusal(tmp_path / "nowhere")) and "does not exist" in line

    def test_a_file(self, refusal: Callable[[Any], str], video: Path) -> None:
        assert "is a file; give the folder" in refusal(video)

    def test_no_config(self, refusal: Callable[[Any], str], tmp_path: Path) -> None:
        assert "has no config.json" in refusal(tmp_path)

    def test_language_model(self, refusal: Callable[[Any], str], config_only: Callable[..., Path]) -> None:
        line = refusal(config_only(model_type="bert", hidden_size=8))
        assert "a model of type 'bert' is not a supported video or image LLM" in line and "qwen2_5_vl" in line

    def test_no_model_type(self, refusal: Callable[[Any], str], config_only: Callable[..., Path]) -> None:
        assert "states no model_type" in refusal(config_only(hidden_size=8))

    def test_broken_json(self, refusal: Callable[[Any], str], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{'model_type': ")
        assert "cannot be read" in refusal(tmp_path)

    def test_contradictory_config(self, refusal: Callable[[Any], str], config_only: Callable[..., Path]) -> None:
        line = refusal(config_only(model_type="llava_onevision", text_config={"model_type": "nonsense"}))
        assert "config.json" in line

    def test_no_weights(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        (copied_model / "model.safetensors").unlink()
        assert "no weights (*.safetensors)" in refusal(copied_model)

    def test_pickled_weights(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        (copied_model / "model.safetensors").rename(copied_model / "pytorch_model.bin")
        line = refusal(copied_model)
        assert "only pickled weights (pytorch_model.bin)" in line and "safetensors" in line

    def test_missing_shard(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        (copied_model / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
        )
        assert "lacks 1 of 2 weight files, first model-2.safetensors" in refusal(copied_model)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": null}', "{"])
    def test_broken_index(self, refusal: Callable[[Any], str], copied_model: Path, text: str) -> None:
        (copied_model / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refusal(copied_model)

    def test_truncated_weights(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        weights = copied_model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert "weights" in (line := refusal(copied_model)) and "cannot be loaded" in line

    def test_incomplete_weights(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        weights = load_file(copied_model / "model.safetensors")
        lost = next(key for key in weights if "projector" in key)
        del weights[lost]
        save_file(weights, copied_model / "model.safetensors", {"format": "pt"})
        assert "incomplete: 1 missing" in refusal(copied_model)

    def test_no_processor(self, refusal: Callable[[Any], str], copied_model: Path) -> None:
        for path in copied_model.iterdir():
            if "processor" in path.name or "token" in path.name:
                path.unlink()
        assert "processor" in refusal(copied_model)

    def test_no_chat_template(self, refused: Refused, video: Path, copied_model: Path) -> None:
        (copied_model / "chat_template.jinja").unlink()
        assert "no chat template" in refused("ask", video, "What?", "--model", copied_model, *SHORT)


def test_a_folder_that_looks_like_a_hub_name(
    refused: Refused, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.cached("qwen2_vl"), tmp_path / "owner" / "name")
    (tmp_path / "owner" / "name" / "config.json").unlink()
    assert "folder owner/name has no config.json" in refused("ask", video, "What?", "--model", "owner/name")
