"""Names, notation and errors of methods and hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tokensieve
from tokensieve.core import registry
from tokensieve.core.compose import check_composition
from tokensieve.core.method import Method, Stage
from tokensieve.errors import HostError, MethodError, RetentionError, SignalError
from tokensieve.hosts import host_for, host_for_type, tiny


def test_known_names() -> None:
    names = tokensieve.list_methods()
    assert {"vidcom2", "holitom", "divprune", "hiprune", "fastv", "random", "uniform", "none"} <= set(names)
    assert tokensieve.list_methods("h*") == [name for name in names if name.startswith("h")]
    assert len(tokensieve.list_hosts()) == 10
    assert tokensieve.list_hosts("qwen*") == ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", tokensieve.list_methods())
def test_metadata_is_complete(name: str) -> None:
    cls = tokensieve.method_class(name)
    assert cls.title
    assert cls.stages
    assert cls.__doc__
    if cls.fidelity != "control":
        assert cls.paper.startswith("https://")
        assert cls.venue
    assert 0 < cls().retention <= 1


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(MethodError, match="did you mean vidcom2"):
        registry.build("vidcom")
    with pytest.raises(MethodError, match="known are"):
        registry.build("zzzzzzzz")


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(MethodError, match=r"no option 'tau'.*temperature"):
        registry.build("vidcom2", {"tau": 1})


def test_notation() -> None:
    first, second = registry.parse("vidcom2:retention=.5,exact_total=true+fastv:layer=3,retention=0.5")
    assert (first.name, first.retention, getattr(first, "exact_total", None)) == ("vidcom2", 0.5, True)
    assert (second.name, getattr(second, "layer", None)) == ("fastv", 3)
    with pytest.raises(MethodError, match="no '='"):
        registry.parse("vidcom2:fast")


def test_defaults_fill_only_what_is_not_set() -> None:
    first, second = registry.resolve("vidcom2:retention=0.5+fastv", retention=0.2)
    assert first.retention == 0.5
    assert second.retention == 0.2
    first, second = registry.resolve("vidcom2+fastv", layer=3)
    assert getattr(second, "layer", None) == 3
    with pytest.raises(MethodError, match="has no option 'depth'"):
        registry.resolve("vidcom2+fastv", depth=3)


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.5, float("nan"), "half", True, None])
def test_retention_outside_is_refused(retention: Any) -> None:
    with pytest.raises(RetentionError, match="Retention must lie in"):
        registry.build("uniform", {"retention": retention})


def test_objects_and_classes() -> None:
    method = registry.build("uniform")
    assert registry.resolve(method) == [method]
    assert registry.resolve(method, retention=0.5)[0].retention == 0.5
    assert registry.resolve(type(method), retention=0.5)[0].retention == 0.5
    assert [m.name for m in registry.resolve(["vidcom2", method])] == ["vidcom2", "uniform"]
    with pytest.raises(MethodError, match="A method is a name"):
        registry.resolve(3)  # type: ignore[arg-type]


def test_two_methods_at_one_stage_are_refused() -> None:
    with pytest.raises(MethodError, match="Only one method may act at the tokens stage"):
        check_composition(registry.parse("vidcom2+divprune"))


def test_budget_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(MethodError, match="takes no frame budget"):
        registry.build("vidcom2", {"budget": "vidcom2"})


def test_names_are_unique_and_plain() -> None:
    @dataclass
    class Bad(Method):
        name: ClassVar[str] = "Not Plain"

    @dataclass
    class Taken(Method):
        name: ClassVar[str] = "uniform"

    with pytest.raises(MethodError, match="lower case"):
        registry.register(Bad)
    with pytest.raises(MethodError, match="already taken"):
        registry.register(Taken)


def test_no_model_and_foreign_model() -> None:
    with pytest.raises(HostError, match="Expected a Hugging Face model"):
        host_for("llava")
    with pytest.raises(HostError, match=r"'bert' is not a supported.*qwen3_vl"):
        host_for_type("bert")


def test_missing_signal_names_methods_that_work() -> None:
    @dataclass
    class NeedsClassToken(Method):
        name: ClassVar[str] = "needs-class-token"
        stages: ClassVar[tuple[Stage, ...]] = ("tokens",)

        def signals(self, facts: Any) -> tuple[str, ...]:
            return ("encoder.class_attention@feature",)

    model, _ = tiny.build_in_memory("qwen2_vl")
    with pytest.raises(SignalError, match=r"no class token; methods that work here: .*vidcom2"):
        tokensieve.compress(model, NeedsClassToken())


def test_layer_that_does_not_fit() -> None:
    model, _ = tiny.build_in_memory("qwen3_vl")
    layers = len(model.model.language_model.layers)
    with pytest.raises(MethodError, match=f"choose a layer between 2 and {layers - 1}"):
        tokensieve.compress(model, "fastv:layer=99")
    with pytest.raises(MethodError, match="receive extra visual features"):
        tokensieve.compress(model, "fastv:layer=1")


def test_nan_features_are_reported() -> None:
    model, processor = tiny.build_in_memory("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    inputs["pixel_values_videos"][0, 0, 0, 0, 0] = float("nan")
    with (
        torch.no_grad(),
        pytest.raises(MethodError, match="NaN or infinity"),
        tokensieve.compress(model, "vidcom2"),
    ):
        model(**inputs)


def test_smallest_retention_keeps_a_token() -> None:
    model, processor = tiny.load("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    for name in registry.fitting_methods(host_for(model), model.base_model):
        if name == "none":
            continue
        with torch.no_grad(), tokensieve.compress(model, name, retention=1e-6) as run:
            model(**inputs)
        item = run.history[-1].items[0]
        assert item.keep.numel() >= 1, name
        least = 0 if registry.method_class(name).may_be_empty else 1
        assert all(alive.numel() >= least for alive in item.decoder.values()), name
