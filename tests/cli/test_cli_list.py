"""``tokensieve list``, ``check`` and ``profile``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tokensieve.cli._common import split_methods
from tokensieve.core.signals import SIGNALS
from tokensieve.hosts import tiny

Refused = Callable[..., str]


def test_methods(cli: Any) -> None:
    table = cli("list", "methods")
    assert table.exit_code == 0
    for name in tokensieve.list_methods():
        assert name in table.stdout
    found = json.loads(cli("list", "methods", "--json").stdout)
    assert [method["name"] for method in found] == tokensieve.list_methods()
    assert found[0].keys() >= {"paper", "stages", "kind", "fidelity", "options", "causal", "exact_count"}
    assert next(m for m in found if m["name"] == "random")["options"]["seed"] == 0


def test_methods_by_pattern(cli: Any, refused: Refused) -> None:
    found = json.loads(cli("list", "methods", "*pool*", "--json").stdout)
    assert [method["name"] for method in found] == tokensieve.list_methods("*pool*")
    assert "No method matches 'zz*'" in refused("list", "methods", "zz*")


def test_compositions(cli: Any, refused: Refused) -> None:
    allowed = json.loads(cli("list", "compositions", "*fastv", "--json").stdout)
    assert {"vidcom2+fastv", "holitom+fastv"} <= {item["notation"] for item in allowed}
    assert all(item["reason"] == "" for item in allowed)
    shown = cli("list", "compositions", "*budget=v-cast")
    assert "divprune:budget=v-cast" in shown.stdout and "frame budget" in shown.stdout
    missing = json.loads(cli("list", "compositions", "dart+fastv", "--refused", "--json").stdout)
    assert [item["reason"] for item in missing] == [
        "fastv and dart both cut in front of layer 2; give one of them another layer."
    ]
    # Which layers methods cut at follows the depth of the LLM.
    assert cli("list", "compositions", "catp+fastv", "--layers", "28").exit_code == 0
    assert cli("list", "compositions", "catp+fastv", "--layers", "5", "--refused").exit_code == 0
    assert "No allowed composition matches 'vidcom2+divprune'" in refused("list", "compositions", "vidcom2+divprune")


def test_hosts_and_signals(cli: Any, refused: Refused) -> None:
    found = json.loads(cli("list", "hosts", "--json").stdout)
    assert [host["host"] for host in found] == tokensieve.list_hosts()
    assert [signal["name"] for signal in json.loads(cli("list", "signals", "--json").stdout)] == list(SIGNALS)
    assert "Qwen2.5-VL" in cli("list", "hosts", "qwen*").stdout
    assert "encoder.received_attention" in cli("list", "signals").stdout
    assert "No host matches 'zz*'" in refused("list", "hosts", "zz*")


def test_check_says_what_fits(cli: Any, model: Path) -> None:
    found = json.loads(cli("check", model, "--json").stdout)
    assert found["host"] == "llava_onevision" and found["facts"]["decoder_layers"] == 5
    signals = {row["signal"]: row for row in found["signals"]}
    assert signals["tokens.features"]["availability"] == "native"
    assert signals["encoder.class_attention"]["availability"] == "absent"
    assert "no class token" in signals["encoder.class_attention"]["why"]
    assert [row["method"] for row in found["methods"]] == tokensieve.list_methods()
    verdicts = {row["method"]: row["fits"] for row in found["methods"]}
    assert verdicts["vidcom2"] and verdicts["uniform"] and found["weights"] is None
    assert all(row["fits"] == (row["reason"] is None) for row in found["methods"])
    table = cli("check", model)
    assert table.exit_code == 0 and "encoder.class_attention" in table.stdout and "vidcom2" in table.stdout


def test_check_of_one_method_decides_the_exit_code(cli: Any, model: Path) -> None:
    good = cli("check", model, "vidcom2+fastv:layer=3")
    assert good.exit_code == 0 and "vidcom2+fastv:layer=3 fits" in good.stdout
    bad = cli("check", model, "fastv:layer=9")
    assert bad.exit_code == 2
    assert bad.stderr.startswith("error: fastv is to cut in front of layer 9") and bad.stderr.count("\n") == 1
    as_json = cli("check", model, "fastv:layer=9", "--json")
    assert as_json.exit_code == 2 and as_json.stderr == ""
    assert json.loads(as_json.stdout)["asked"]["fits"] is False


def test_check_needs_no_weights(cli: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = cli("check", tmp_path, "vidcom2")
    assert result.exit_code == 0, result.output
    assert "note: " in result.stderr and "no weights" in result.stderr


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_check_of_every_family(cli: Any, family: str) -> None:
    found = json.loads(cli("check", tiny.cached(family), "uniform", "--json").stdout)
    assert found["host"] == family and found["asked"]["fits"]


def test_check_refuses_other_models(refused: Refused, config_only: Callable[..., Path], model: Path) -> None:
    assert "a model of type 'gpt2' is not a supported" in refused("check", config_only(model_type="gpt2"))
    assert "did you mean" in refused("check", model, "vidcom")


def test_profile(cli: Any, model: Path, video: Path) -> None:
    words = ("profile", model, video, "--methods", "uniform,fastv:layer=2", "--frames", 4, "--new-tokens", 3)
    found = json.loads(cli(*words, "--repeats", 2, "--json", "-r", 0.5).stdout)
    assert [column["title"] for column in found["columns"]] == ["full model", "uniform", "fastv:layer=2"]
    full, uniform, fastv = found["columns"]
    assert (full["visual_tokens"], uniform["visual_tokens"]) == (100, 50)
    assert (fastv["visual_tokens"], fastv["visual_tokens_after_last_cut"]) == (100, 50)
    for column in found["columns"]:
        seconds = column["seconds"]
        assert all(value > 0 for value in seconds.values()), column
        parts = sum(seconds[stage] for stage in ("encode", "compress", "prefill", "rest"))
        assert parts == pytest.approx(seconds["first token"], rel=0.5)
        assert set(column["memory_above_idle"]) == {"encode", "compress", "prefill", "decode"}
        assert column["peak_memory"] > found["weights_bytes"]
    assert uniform["cache_bytes"] < fastv["cache_bytes"] < full["cache_bytes"]
    assert found["seconds_before"].keys() == {"decode video", "preprocess"}


def test_profile_needs_nothing_but_itself(cli: Any) -> None:
    table = cli("profile", "--frames", 4, "--new-tokens", 2, "--repeats", 1)
    assert table.exit_code == 0, table.output
    for row in (
        "decode video",
        "preprocess",
        "encode",
        "compress",
        "prefill",
        "each later token",
        "weights",
        "vidcom2",
    ):
        assert row in table.stdout


def test_profile_refuses_too_little(refused: Refused) -> None:
    assert "--repeats 1 or more" in refused("profile", "--repeats", 0)
    assert "There is no method 'unifrom'" in refused("profile", "--methods", "random,unifrom")


def test_methods_separated_by_commas() -> None:
    assert split_methods("a, b:x=1,y=[2],c+d:z=3 e") == ["a", "b:x=1,y=[2]", "c+d:z=3", "e"]
