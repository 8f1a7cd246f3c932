"""The matrix of methods and hosts, and a reference that knows nothing of hooks, ledgers or masks."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tokensieve import list_methods, method_class
from tokensieve.core.guided import PairedMethod
from tokensieve.core.registry import parse
from tokensieve.hosts import Host, host_for, tiny
from tokensieve.methods.explainability_compression import MapperConfig, RelevanceMapper


def _mapper() -> str:
    """Folder of a small relevance mapper that is tied to no model."""
    folder = tempfile.mkdtemp(prefix="tokensieve-mapper-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RelevanceMapper(MapperConfig(channels=(8, 16))).save(folder)
    return folder


OPTIONS = {
    "none": "",
    "frame-subsample": ":retention=0.5",
    "explainability-compression": f":retention=0.3,weights={_mapper()}",
}
"""How a method is called in the matrix; every registered method takes part, at retention 0.3 unless named here."""
COMPOSITIONS = {
    "vidcom2-exact": "vidcom2:retention=0.3,exact_total=true",
    "fastv-budget": "fastv:retention=0.3,budget=vidcom2",
    "divprune-budget": "divprune:retention=0.3,budget=vidcom2",
    "vidcom2+fastv": "vidcom2:retention=0.4+fastv:retention=0.5",
    "frames+hiprune": "frame-subsample:retention=0.5+hiprune:retention=0.5",
}
METHODS = {name: name + OPTIONS.get(name, ":retention=0.3") for name in list_methods()} | COMPOSITIONS
FAMILIES = list(tiny.FAMILIES)
Loaded = Callable[[str], tuple[Any, Any]]


def load(family: str, **options: Any) -> tuple[Any, Any]:
    """A tiny float32 model in evaluation mode and its processor."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model, processor = tiny.load(family)
    if options:
        model.set_attn_implementation(options["attn"])
    if family == "video_llama_3":
        # Its processor's own pixel-difference pruning would leave ragged frames; one test covers them.
        processor.video_processor.use_token_compression = False
    return model.eval(), processor


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """Models are loaded once per process and family."""
    cache: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in cache:
            cache[family] = load(family)
        return cache[family]

    return get


@functools.cache
def pair_folder(family: str) -> str:
    """Folder of the pair of towers that a family's vision tower is half of; empty for other towers."""
    model, _ = tiny.build_in_memory(family)
    if not host_for(model).tower_pair(model.base_model):
        return ""
    folder = tempfile.mkdtemp(prefix=f"tokensieve-pair-{family}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for part in tiny.pair_of(model):
        part.save_pretrained(folder)
    return folder


def called(name: str, family: str) -> str:
    """How a method of the matrix is called on a host: those that look for a text tower are shown its folder."""
    if name not in list_methods() or not issubclass(method_class(name), PairedMethod):
        return METHODS[name]
    folder = pair_folder(family)
    return METHODS[name] + (f",text_tower={folder}" if folder else "")


@functools.cache
def _bare(family: str) -> tuple[Host, Any]:
    """Host and base model of a family, to ask which signals it can give."""
    model, _ = tiny.build_in_memory(family)
    return host_for(model), model.base_model


def fits(method: str, family: str) -> bool:
    """Whether the host can give every signal that the parts of a method ask for."""
    host, base = _bare(family)
    facts = host.facts(base)
    requests = [(text.partition("@")[0], part) for part in parse(method) for text in part.signals(facts)]
    return all(host.availability(name, base, getattr(part, "text_tower", None)) != "absent" for name, part in requests)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cells of the matrix: fitting ones, or for tests that take ``misfit`` the others."""
    names = set(metafunc.fixturenames)
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in str(mark.args[0]).split(",")}
    if {"family", "method"} <= names - own:
        wanted = "misfit" not in names
        cells = [(f, called(m, f), f"{f}-{m}") for f in FAMILIES for m in METHODS if fits(called(m, f), f) == wanted]
        metafunc.parametrize(("family", "method"), [cell[:2] for cell in cells], ids=[cell[2] for cell in cells])
    elif "family" in names - own:
        metafunc.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def hosts_of() -> dict[str, list[str]]:
    """Families that every registered method runs on in the matrix."""
    return {name: [family for family in FAMILIES if fits(called(name, family), family)] for name in list_methods()}


@pytest.fixture
def misfit() -> None:
    """Asks for the cells of the matrix that a host cannot serve."""
