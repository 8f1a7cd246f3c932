"""Direct preference optimisation of answers about videos (stage 2 of PPLLaVA)."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tokensieve.train.collate import IGNORED, Collator
from tokensieve.train.config import TrainingError
from tokensieve.train.loop import BaseTrainer
from tokensieve.train.records import Sample

__all__ = ["DpoTrainer", "Indexed", "PairCollator", "answer_log_probabilities", "preference_loss"]

REFERENCE = ("reference_chosen", "reference_rejected")


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of the labelled tokens.

    Parameters
    ----------
    logits : Tensor
        ``[B, L, V]``.
    labels : Tensor
        ``[B, L]``, -100 where nothing counts.

    Returns
    -------
    total : Tensor
        ``[B]``, float32.
    count : Tensor
        ``[B]``: labelled tokens.
    """
    wanted, predicted = labels[:, 1:], logits[:, :-1].float()
    counts = wanted != IGNORED
    chosen = predicted.gather(-1, wanted.masked_fill(~counts, 0)[..., None])[..., 0]
    log_probabilities = chosen - predicted.logsumexp(-1)
    return (log_probabilities * counts).sum(-1), counts.sum(-1)


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``-log sigmoid(beta * ((p_chosen - p_rejected) - (r_chosen - r_rejected)))``.

    Parameters
    ----------
    policy, reference : Tensor
        ``[2, B]``: log-probabilities of preferred and of rejected answers.
    beta : float
        Temperature.

    Returns
    -------
    loss, margin : Tensor
        ``[B]``; the margin is what the sigmoid is taken of.
    """
    margin = beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
    return -logsigmoid(margin), margin


@dataclass
class Indexed:
    """A data set whose items come with their number, and with reference log-probabilities once these are known."""

    dataset: Any
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor | None]:
        return self.dataset[index], None if self.reference is None else self.reference[index]


@dataclass
class PairCollator:
    """A `Collator` of pairs that also stacks the reference log-probabilities."""

    collator: Collator

    def __call__(self, items: Sequence[tuple[Sample, Tensor | None]]) -> dict[str, Tensor]:
        """One batch: preferred answers, then rejected ones."""
        for sample, _ in items:
            if sample.chosen is None or sample.rejected is None:
                raise TrainingError(
                    f"{sample.name or 'A sample'} has no pair of answers; DPO needs chosen and rejected."
                )
        batch = self.collator([sample for sample, _ in items])
        reference = [values for _, values in items if values is not None]
        if reference:
            batch |= dict(zip(REFERENCE, torch.stack(reference).unbind(1), strict=True))
        return batch


class DpoTrainer(BaseTrainer):
    """Trainer of preference pairs.

    The reference is the model as it was: with LoRA the model without its adapters, otherwise log-probabilities that
    :meth:`prepare_reference` computes before the first step (frames must then be the same in every epoch).

    Parameters
    ----------
    beta, alpha, gamma : float
        Temperature, weight of the preference loss, weight of the cross-entropy of preferred answers.
    **kwargs
        Of `transformers.Trainer`; ``train_dataset`` is an `Indexed`.
    """

    def __init__(self, *, beta: float = 0.1, alpha: float = 1.0, gamma: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta, self.alpha, self.gamma = beta, alpha, gamma
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, list[float]] = defaultdict(list)

    @torch.no_grad()
    def prepare_reference(self) -> Tensor:
        """Log-probabilities ``[n, 2]`` of both answers of every pair under the model as it is, for all processes."""
        pairs: Any = self.train_dataset
        found = torch.zeros(len(pairs), 2, device=self.args.device)
        model: Any = self.model
        model = model.to(self.args.device)
        training = model.training
        model.eval()
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_train_batch_size
        mine = list(range(rank, len(pairs), world))
        for start in range(0, len(mine), size):
            numbers = mine[start : start + size]
            collate: Any = self.data_collator
            batch = self._prepare_inputs(collate([pairs[number] for number in numbers]))
            with self.compute_loss_context_manager():
                values, _ = self._log_probabilities(model, batch)
            found[numbers] = values.T.to(found)
        if world > 1:
            torch.distributed.all_reduce(found)
        model.train(training)
        pairs.reference = found.cpu()
        return pairs.reference

    def _log_probabilities(self, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """``[2, B]`` sums and counts of labelled tokens."""
        inputs = {name: value for name, value in batch.items() if name not in (*REFERENCE, "labels")}
        logits = model(**inputs, use_cache=False).logits
        total, count = answer_log_probabilities(logits, batch["labels"])
        return total.view(2, -1), count.view(2, -1)

    @contextlib.contextmanager
    def _as_it_was(self, model: Any) -> Iterator[Any]:
        """The model without adapters."""
        inner = self.accelerator.unwrap_model(model)
        training = model.training
        model.eval()
        try:
            with inner.disable_adapter():
                yield model
        finally:
            model.train(training)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Loss of one batch; rewards are collected for the log."""
        policy, count = self._log_probabilities(model, inputs)
        if REFERENCE[0] in inputs:
            reference = torch.stack([inputs[name] for name in REFERENCE]).to(policy)
        elif hasattr(self.accelerator.unwrap_model(model), "disable_adapter"):
            with torch.no_grad(), self._as_it_was(model) as before:
                reference, _ = self._log_probabilities(before, inputs)
        else:
            raise TrainingError("DPO has no reference; call prepare_reference before train, or use LoRA.")
        losses, margin = preference_loss(policy, reference, self.beta)
        likelihood = -(policy[0] / count[0].clamp_min(1)).mean()
        loss = self.alpha * losses.mean() + self.gamma * likelihood
        self._sums["margin"].append(float(margin.detach().mean()))
        self._sums["accuracy"].append(float((margin.detach() > 0).float().mean()))
        for name, row in (("reward_chosen", 0), ("reward_rejected", 1)):
            self._sums[name].append(float(self.beta * (policy[row] - reference[row]).detach().mean()))
        return (loss, {"margin": margin}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last row: margin, share of pairs in the right order, rewards."""
        if "loss" in logs and self._sums:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._sums.items()}}
            self._sums.clear()
        super().log(logs, *args, **kwargs)
