"""Search of VFlowOpt's parameters for a model (step 4): cuts should leave the last state of the prompt as it was."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.runtime import Run, base_model
from tokensieve.errors import MethodError
from tokensieve.hosts.registry import host_for
from tokensieve.methods.vflowopt.functions import Strategy, last_ratio
from tokensieve.methods.vflowopt.method import ENTROPY, VFlowOpt
from tokensieve.methods.vflowopt.strategy_file import StoredStrategy, read_json
from tokensieve.ops.bayes import GaussianSearch

FORMAT = "tokensieve-vflowopt-search-1"
THRESHOLDS, GRIDS, WEIGHTS, SECONDS = (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0), (8 / 15, 1.0)
"""Bounds of t, a, alpha and R2 in the released search."""

_log = logging.getLogger(__name__)
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """One evaluation: its number, of how many, its value and the best one so far (mean cosine similarities)."""

    call: int
    calls: int
    value: float
    best: float


def search_bounds(retention: float, with_entropy: bool) -> list[tuple[float, float]]:
    """Bounds of (R1, R2, t, a, alpha): R1 from the average to one and a half times it, the rest as released.

    Parameters
    ----------
    retention : float
        Average retention.
    with_entropy : bool
        Whether the model gives the pixels; otherwise alpha stays 0.
    """
    first = (retention, min(1.0, 1.5 * retention))
    return [first, SECONDS, THRESHOLDS, GRIDS, WEIGHTS if with_entropy else (0.0, 0.0)]


def last_states(model: nn.Module, samples: Sequence[Inputs]) -> list[Tensor]:
    """States of the last prompt position behind the last layer, float32 [D] for every sample.

    Parameters
    ----------
    samples
        Inputs of the model, one prompt each, on its device.
    """
    base = base_model(model)
    states = []
    with torch.no_grad():
        for sample in samples:
            if sample["input_ids"].shape[0] != 1:
                raise MethodError(
                    f"a sample of the search holds {sample['input_ids'].shape[0]} prompts; pass prompts one by one."
                )
            states.append(base(**sample, use_cache=False).last_hidden_state[0, -1].float())
    return states


def agreement(full: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Mean cosine similarity of states; one that is not a number counts as 0."""
    total = 0.0
    for one, other in zip(full, pruned, strict=True):
        cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        total += 0.0 if math.isnan(cosine) else cosine
    return total / len(full)


def search(
    model: nn.Module,
    samples: Sequence[Inputs],
    retention: float,
    *,
    calls: int = 50,
    initial: int = 10,
    seed: int = 42,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    name: str = "",
) -> StoredStrategy:
    """Find the parameters of VFlowOpt for a model by Bayesian optimisation.

    The paper takes 30 unlabelled samples and 50 calls; the released code 27 first points and 300 calls.

    Parameters
    ----------
    model
        A supported model in evaluation mode.
    samples
        Inputs of the model as its processor gives them, one prompt each.
    retention
        Average share of the visual tokens over the layers, below 1.
    calls
        Evaluations in all; each runs all samples once.
    initial
        Evaluations spread over the bounds before the search learns.
    seed
        The same seed gives the same search.
    state
        JSON file that holds the search after every evaluation; one that exists is gone on with.
    progress
        Called after every evaluation.
    name
        Name of the model, kept with the result.

    Returns
    -------
    StoredStrategy
        The best parameters seen, to be saved and passed as ``VFlowOpt(strategy=path)``.

    Raises
    ------
    MethodError
        Without samples, for a retention of 1 or more, or when the state belongs to another search.
    """
    if not samples or not 0.0 < retention < 1.0 or calls < 1:
        raise MethodError(
            f"a search needs samples, calls and an average retention below 1, not {len(samples)} samples, {calls} "
            f"calls and {retention}."
        )
    host = host_for(model)
    base = base_model(model)
    facts = host.facts(base)
    plain = VFlowOpt(retention)
    cuts = plain.cuts(facts)
    bounds = search_bounds(retention, host.availability(ENTROPY, base) != "absent")
    label = {"retention": retention, "layers": facts.decoder_layers, "cuts": list(cuts), "samples": len(samples)}
    optimiser = _resumed(state, label, GaussianSearch(bounds, seed, min(initial, calls)))
    full = last_states(model, samples)

    def strategy(point: Sequence[float]) -> Strategy:
        first, second, threshold, grid, alpha = point
        third = last_ratio(retention, first, second, cuts, facts.decoder_layers)
        return Strategy(threshold, alpha, grid, (first, second, third))

    while len(optimiser.values) < calls:
        point = optimiser.ask()
        first, second, threshold, grid, alpha = point
        method = VFlowOpt(retention, threshold=threshold, alpha=alpha, grid=grid, first=first, second=second)
        try:
            attached: AbstractContextManager[Any] = Run(model, host, [method])
            feasible = True
        except MethodError as error:
            # Corners of the box may leave no room for R3.
            _log.info("skipped %s: %s", point, error)
            attached, feasible = nullcontext(), False
        with attached:
            value = agreement(full, last_states(model, samples)) if feasible else -1.0
        optimiser.tell(point, value)
        if state is not None:
            _write(state, label, optimiser)
        if progress is not None:
            progress(Progress(len(optimiser.values), calls, value, optimiser.best[1]))
    point, value = optimiser.best
    return StoredStrategy(strategy(point), retention, facts.decoder_layers, cuts, name, value)


def _resumed(state: str | Path | None, label: dict[str, Any], fresh: GaussianSearch) -> GaussianSearch:
    """The search that a file holds, or a fresh one."""
    if state is None or not Path(state).exists():
        return fresh
    found = read_json(state, FORMAT)
    try:
        search = GaussianSearch.from_state(found["search"])
        kept = found["label"]
    except (KeyError, TypeError, ValueError) as error:
        raise MethodError(f"{state} is no complete search ({error}); remove it to begin anew.") from error
    same = [tuple(pair) for pair in search.bounds] == [tuple(pair) for pair in fresh.bounds]
    if kept != label or not same or (search.seed, search.initial) != (fresh.seed, fresh.initial):
        raise MethodError(
            f"{state} holds a search with other settings ({kept}, seed {search.seed}, {search.initial} first points); "
            "use the same ones, or another file."
        )
    return search


def _write(state: str | Path, label: dict[str, Any], search: GaussianSearch) -> None:
    """Replace the file in one step, so that an interruption leaves the one before."""
    path = Path(state)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"format": FORMAT, "label": label, "search": search.state()}) + "\n", encoding="utf-8")
    part.replace(path)
