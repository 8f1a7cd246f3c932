"""Training of the mapper; stops and goes on at any epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokensieve.errors import MethodError
from tokensieve.methods.explainability_compression.labels import Label
from tokensieve.methods.explainability_compression.mapper import (
    MapperConfig,
    RelevanceMapper,
    relevance_loss,
    relevance_target,
)
from tokensieve.ops.select import top_indices

FORMAT = "tokensieve-relevance-training-1"
STATE = "training.safetensors"


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    epochs, batch
        As published, about 100 and 128.
    learning_rate
        Of Adam; not published.
    held_out
        Share of the labels that measure instead of teach.
    seed
        Of the first weights, of the split and of the order.
    """

    epochs: int = 100
    batch: int = 128
    learning_rate: float = 1e-3
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not self.learning_rate > 0 or not 0 <= self.held_out < 1:
            raise MethodError(
                "training needs at least one epoch and one label a batch, a learning rate above 0 and a share held out "
                f"below 1, not {asdict(self)}."
            )


@dataclass(frozen=True)
class Epoch:
    """What one epoch reached.

    Attributes
    ----------
    number
        From 1.
    loss, held_out_loss
        Mean divergence KL(R* || R~) while training, and on held-out labels (that of training where none are held out).
    overlap
        Part of the more relevant half of the held-out tokens that the prediction puts into its own upper half; 0.5 is
        chance.
    """

    number: int
    loss: float
    held_out_loss: float
    overlap: float


@dataclass
class Trained:
    """The best mapper and the course of the training."""

    mapper: RelevanceMapper
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch:
        """Epoch with the smallest held-out loss, the first of several."""
        return min(self.epochs, key=lambda epoch: epoch.held_out_loss)


def train(
    labels: Sequence[Label],
    config: MapperConfig,
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[Epoch], None] | None = None,
) -> Trained:
    """Train a mapper on labels (step 7).

    Parameters
    ----------
    labels
        From `labels.label` or a `dataset.LabelFolder`; of any lengths.
    config : MapperConfig
        Shape of the mapper, and the model that it is for.
    settings : Settings, optional
        How to train.
    folder
        Where the best mapper so far is kept, and after every epoch everything that is needed to go on.
    device
        Where to train.
    progress
        Called after every epoch.

    Raises
    ------
    MethodError
        Without labels, or when the folder holds a training with other settings.
    """
    settings = settings or Settings()
    teaching, measuring = _split(labels, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        mapper = RelevanceMapper(config)
    mapper.to(device)
    optimiser = torch.optim.Adam(mapper.parameters(), lr=settings.learning_rate)
    trained = Trained(mapper)
    about = {
        "settings": asdict(settings) | {"epochs": 0},
        "config": json.loads(json.dumps(asdict(config))),
        "labels": len(labels),
    }
    best = {name: value.clone() for name, value in mapper.state_dict().items()}
    if folder is not None and (Path(folder) / STATE).exists():
        best = _resume(Path(folder) / STATE, about, trained, optimiser)
    pairs = [_pair(one, device) for one in teaching]
    tests = [_pair(one, device) for one in measuring]
    while len(trained.epochs) < settings.epochs:
        number = len(trained.epochs) + 1
        loss = _teach(mapper, optimiser, pairs, settings, number)
        held_out, overlap = measure(mapper, tests) if tests else (loss, measure(mapper, pairs)[1])
        trained.epochs.append(Epoch(number, loss, held_out, overlap))
        if trained.best.number == number:
            best = {name: value.clone() for name, value in mapper.state_dict().items()}
        if folder is not None:
            _keep(Path(folder), about, trained, optimiser, best)
        if progress is not None:
            progress(trained.epochs[-1])
    mapper.load_state_dict(best)
    mapper.eval()
    return trained


@torch.no_grad()
def measure(mapper: RelevanceMapper, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean divergence and overlap of upper halves over pairs of attention and target."""
    loss = overlap = 0.0
    mapper.eval()
    for attention, target in pairs:
        predicted = mapper(attention[None])
        loss += float(relevance_loss(target[None], predicted))
        half = -(-target.numel() // 2)
        wanted, found = (set(top_indices(scores, half).tolist()) for scores in (target, predicted[0]))
        overlap += len(wanted & found) / half
    return loss / len(pairs), overlap / len(pairs)


def _pair(one: Label, device: str | torch.device) -> tuple[Tensor, Tensor]:
    return one.attention.to(device), relevance_target(one.relevance).to(device)


def _split(labels: Sequence[Label], settings: Settings) -> tuple[list[Label], list[Label]]:
    """Labels to teach with and labels to measure with; at least one teaches."""
    useful = [one for one in labels if one.attention.numel() > 1]
    if not useful:
        raise MethodError("there are no labels of more than one token to train with; make some first.")
    order = torch.randperm(len(useful), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    aside = min(round(len(useful) * settings.held_out), len(useful) - 1)
    return [useful[i] for i in order[aside:]], [useful[i] for i in order[:aside]]


def _teach(
    mapper: RelevanceMapper,
    optimiser: torch.optim.Optimizer,
    pairs: Sequence[tuple[Tensor, Tensor]],
    settings: Settings,
    number: int,
) -> float:
    """One epoch; sequences of one length run together, others one after the other inside a step."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(settings.seed * 100_003 + number))
    total = 0.0
    mapper.train()
    for batch in order.split(settings.batch):
        optimiser.zero_grad()
        by_length: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for i in batch.tolist():
            by_length.setdefault(pairs[i][0].numel(), []).append(pairs[i])
        for group in by_length.values():
            attention, target = (torch.stack(parts) for parts in zip(*group, strict=True))
            loss = relevance_loss(target, mapper(attention)) * (len(group) / batch.numel())
            loss.backward()
            total += float(loss.detach()) * batch.numel()
        optimiser.step()
    return total / len(pairs)


def _keep(
    folder: Path, about: dict[str, Any], trained: Trained, optimiser: torch.optim.Optimizer, best: dict[str, Tensor]
) -> None:
    """The best mapper for use, and weights, moments and course for going on."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"now.{name}": value for name, value in trained.mapper.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    metadata = {
        "format": FORMAT,
        "about": json.dumps(about),
        "epochs": json.dumps([asdict(epoch) for epoch in trained.epochs]),
    }
    part = folder / f"{STATE}.part"
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, metadata=metadata)
    part.replace(folder / STATE)
    if trained.best is trained.epochs[-1]:
        trained.mapper.save(folder)


def _resume(path: Path, about: dict[str, Any], trained: Trained, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Bring mapper, optimiser and course to where a training stopped; the weights of its best epoch."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise MethodError(f"{path} is not of the format {FORMAT}; remove it to train anew.")
        known = json.loads(metadata["about"])
        epochs = [Epoch(**entry) for entry in json.loads(metadata["epochs"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise MethodError(f"{path} cannot be gone on with ({error}); remove it to train anew.") from error
    if known != about:
        raise MethodError(f"{path} belongs to a training with other settings or labels ({known}); use another folder.")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    _load(trained.mapper, under("now."), path)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in under("adam.").items():
        index, _, part = name.partition(".")
        moments.setdefault(int(index), {})[part] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    trained.epochs.extend(epochs)
    return under("best.")


def _load(mapper: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        mapper.load_state_dict(weights)
    except RuntimeError as error:
        raise MethodError(f"the weights in {path} do not fit the mapper; remove it to train anew.") from error
