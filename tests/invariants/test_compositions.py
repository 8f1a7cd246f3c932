"""The declared matrix of compositions, walked on tiny hosts: what is allowed runs, what is refused says why."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core import prefill
from tokensieve.core.compose import Composition, list_compositions
from tokensieve.core.guided import PairedMethod, ReadingMethod
from tokensieve.core.method import Method
from tokensieve.core.registry import method_class
from tokensieve.core.signals import SIGNALS
from tokensieve.hosts import host_for, tiny
from tokensieve.methods.explainability_compression import MapperConfig, RelevanceMapper
from tokensieve.pairing import load_pair

FAMILIES = ("llava_onevision", "llava_next_video", "qwen2_vl")
"""Hosts with a SigLIP, a CLIP and a packed tower: every method finds its signals on one of them."""
BEFORE = {"frames", "encoder", "tokens"}
RETENTION = 0.5


@functools.cache
def host(family: str) -> tuple[Any, Any, Any, Any]:
    """Model, processor, inputs and facts."""
    torch.set_num_threads(1)
    model, processor = tiny.build_in_memory(family)
    return model, processor, tiny.example_inputs(family, processor), host_for(model).facts(model.base_model)


@functools.cache
def pair(family: str) -> Any:
    """The text tower of a host."""
    return load_pair(*tiny.pair_of(host(family)[0]))


@functools.cache
def mapper() -> str:
    """Folder of a small relevance mapper that is tied to no model."""
    folder = tempfile.mkdtemp(prefix="tokensieve-mapper-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    RelevanceMapper(MapperConfig(channels=(8, 16))).save(folder)
    return folder


@functools.cache
def served(family: str, name: str) -> bool:
    """Whether a host gives all signals of a method, its text tower named."""
    model, _, _, facts = host(family)
    base = model.base_model
    requests = [text.partition("@")[0] for text in method_class(name)().signals(facts)]
    if any(SIGNALS[text].pair and host_for(model).tower_pair(base) not in SIGNALS[text].pair for text in requests):
        return False
    return all(host_for(model).availability(text, base, "named") != "absent" for text in requests)


def family_for(*names: str) -> str | None:
    """The first host that serves all of some methods."""
    return next((family for family in FAMILIES if all(served(family, name) for name in names)), None)


def made(name: str, family: str, **options: Any) -> Method:
    """A method with what it needs on a host."""
    cls = method_class(name)
    options = {"retention": RETENTION, **options}
    if issubclass(cls, PairedMethod) and host_for(host(family)[0]).tower_pair(host(family)[0].base_model):
        options["text_tower"] = pair(family)
    if issubclass(cls, ReadingMethod):
        options["tokenizer"] = host(family)[1]
    if cls.needs_file:
        options[cls.needs_file] = mapper()
    return cls(**options)


def run(family: str, methods: list[Method]) -> Any:
    """Trace of one prompt answered with two tokens."""
    model, _, inputs, _ = host(family)
    with torch.no_grad(), tokensieve.compress(model, methods) as found:
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return found.history[-1]


@functools.cache
def alone(family: str, name: str) -> Any:
    """The same with one method."""
    return run(family, [made(name, family)])


def left(trace: Any, index: int) -> int:
    """Visual tokens of an item that are alive behind the last cut."""
    item = trace.items[index]
    return item.decoder[max(item.decoder)].numel() if item.decoder else item.keep.numel()


def matrix(family: str) -> list[Composition]:
    """Compositions as they are declared for a host."""
    return list_compositions(host(family)[3])


def pairs_of(family: str) -> list[Composition]:
    """Pairs of methods whose first suitable host this is; refused ones that suit no host go with the first host."""
    mine = []
    for item in matrix(family):
        chosen = family_for(item.first, item.second) if not item.budget else None
        if not item.budget and (chosen == family or (chosen is None and family == FAMILIES[0])):
            mine.append(item)
    return mine


@pytest.mark.parametrize("family", FAMILIES)
def test_allowed_pairs_run_and_keep_what_each_promises(family: str) -> None:
    """The first decides as if alone, its count is the promised one, and the second shortens further."""
    allowed = [item for item in pairs_of(family) if item.allowed]
    assert allowed
    for item in allowed:
        before, after = alone(family, item.first), run(family, [made(n, family) for n in (item.first, item.second)])
        promised, inside_only = made(item.first, family), not BEFORE & set(method_class(item.second).stages)
        for index, (one, other) in enumerate(zip(before.items, after.items, strict=True)):
            if inside_only:
                assert torch.equal(one.keep, other.keep), item.notation
                count = promised.token_count(one.layout) if BEFORE & set(promised.stages) else None
                assert count in (None, other.keep.numel()), item.notation
            else:
                assert set(other.keep.tolist()) < set(range(one.layout.patches)), item.notation
            assert left(after, index) <= left(before, index), item.notation
            inside = [other.decoder[layer].numel() for layer in sorted(other.decoder)]
            assert inside == sorted(inside, reverse=True) or "lvlm-csp" in item.notation, item.notation
        if inside_only:
            assert len(after.items[0].decoder) > len(before.items[0].decoder), item.notation


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_pairs_are_refused_with_the_declared_reason(family: str) -> None:
    """No pair that the matrix refuses can be attached."""
    model = host(family)[0]
    refused = [item for item in pairs_of(family) if not item.allowed and family_for(item.first, item.second) == family]
    assert refused
    for item in refused:
        with pytest.raises(tokensieve.TokensieveError) as error:
            tokensieve.compress(model, [made(name, family) for name in (item.first, item.second)])
        assert str(error.value) == item.reason
        assert any(text in item.reason for text in ("Only one method may", "give one of them another layer", "later"))


def test_every_allowed_pair_has_a_host() -> None:
    """Nothing is declared that is not walked, and most of what users ask for is allowed."""
    before = [item for item in matrix(FAMILIES[0]) if item.second == "fastv" and not item.budget]
    assert sum(item.allowed for item in before) >= 25
    for family in FAMILIES:
        for item in pairs_of(family):
            assert not item.allowed or family_for(item.first, item.second) == family, item.notation


def test_frame_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowed ones keep what the module gives every frame; refused ones say so."""
    given: list[torch.Tensor] = []
    allocate = prefill.allocate

    def spy(*arguments: Any) -> torch.Tensor:
        given.append(allocate(*arguments))
        return given[-1]

    monkeypatch.setattr(prefill, "allocate", spy)
    budgets = [item for item in matrix(FAMILIES[0]) if item.budget]
    assert {item.first for item in budgets} == {"vidcom2", "v-cast"}
    assert sum(item.allowed for item in budgets) >= 2 * 8
    for item in budgets:
        family = family_for(item.second)
        assert family is not None
        if not item.allowed:
            with pytest.raises(tokensieve.TokensieveError) as error:
                made(item.second, family, budget=item.first)
            assert str(error.value) == item.reason
            continue
        given.clear()
        traced = run(family, [made(item.second, family, budget=item.first)]).items[0]
        alive = traced.decoder[max(traced.decoder)] if traced.decoder else traced.keep
        if alive.numel() == 0:
            continue
        counts = torch.bincount(traced.layout.patch_view[alive], minlength=len(traced.layout.views))
        assert counts.tolist() == given[0].tolist(), item.notation
