"""The loss of a shortened sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokensieve.core.compactor import Compaction, gather_sequence


class ShorterLabels:
    """Lets the loss function of a model compare logits of a shortened sequence with equally shortened labels.

    Parameters
    ----------
    model
        Model with a ``loss_function``, or without one (then nothing happens).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own: Any = None

    def wrap(self, compaction: Callable[[], Compaction | None]) -> None:
        """Put the wrapper in place.

        Parameters
        ----------
        compaction
            Gives what the last pass did to the sequence.
        """
        self._own = vars(self.model).get("_loss_function")
        original = getattr(self.model, "loss_function", None)
        if original is None:
            return

        def loss(*args: Any, **kwargs: Any) -> Any:
            labels, done = kwargs.get("labels"), compaction()
            if labels is not None and done is not None and labels.shape[-1] == done.length:
                shorter = gather_sequence(labels, done.index)
                kwargs["labels"] = shorter.masked_fill(~done.real.to(labels.device), -100)
            return original(*args, **kwargs)

        vars(self.model)["_loss_function"] = loss

    def unwrap(self) -> None:
        """Restore the model's own loss function."""
        if self._own is not None:
            vars(self.model)["_loss_function"] = self._own
        else:
            vars(self.model).pop("_loss_function", None)
