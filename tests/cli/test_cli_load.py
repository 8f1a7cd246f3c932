"""Loading models: what `load_model` gives, and that structure needs no weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tokensieve.errors import HostError
from tokensieve.hosts import tiny
from tokensieve.load import load_model, meta_model, model_type_of, random_weight_model, read_config


def test_model_and_processor(model: Path) -> None:
    loaded, processor = load_model(str(model), attn="eager")
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert type(processor).__name__ == "LlavaOnevisionProcessor"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_dtypes(model: Path, name: str, dtype: torch.dtype) -> None:
    assert load_model(model, dtype=name, device="cpu")[0].dtype == dtype


def test_llava_video_is_registered_when_needed() -> None:
    loaded, processor = load_model(tiny.cached("llava_video"))
    assert type(loaded).__name__ == "LlavaVideoForConditionalGeneration"
    assert type(processor).__name__ == "LlavaVideoProcessor"


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_meta_models_have_structure_and_no_memory(family: str) -> None:
    folder = tiny.cached(family)
    assert model_type_of(folder) == family
    built = meta_model(read_config(folder))
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in load_model(folder)[0].parameters())


def test_a_home_folder_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert model_type_of(f"~/{model.name}") == "llava_onevision"
    assert load_model(f"~/{model.name}")[1] is not None


def test_the_demonstration_model_needs_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="cannot be written to the cache folder"):
        random_weight_model()


def test_remote_code_stays_off(copied_model: Path) -> None:
    """Code in a checkpoint's folder is never imported unless asked for."""
    config = copied_model / "config.json"
    config.write_text(
        config.read_text().replace(
            '"model_type": "llava_onevision"',
            '"auto_map": {"AutoConfig": "evil.Config", '
            '"AutoModelForImageTextToText": "evil.Model"}, "model_type": "llava_onevision"',
            1,
        )
    )
    (copied_model / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    loaded, _ = load_model(copied_model)
    assert type(loaded).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert not any(name.endswith("evil") for name in sys.modules)
