"""Peak memory of the stages of a forward pass."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tokensieve.cli._generate import memory_in_use
from tokensieve.core.runtime import Run
from tokensieve.measure.memory import PeakMemory


class StageMemory:
    """The most memory in use during each stage, above what was in use when the meter was entered.

    Enter it after the run is attached. Stages end where the next one begins: ``encode`` reaches from the vision
    tower to the LLM (projector and prompt embedding included), ``compress`` from there to the first decoder
    layer, ``prefill`` and ``decode`` to the end of the LLM.

    Attributes
    ----------
    peaks
        Bytes per stage.
    """

    def __init__(self, run: Run) -> None:
        self.peaks: dict[str, int] = {}
        self._run = run
        self._memory = PeakMemory(next(run.model.parameters()).device)
        self._idle = 0
        self._stage: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> StageMemory:
        host, base = self._run.host, self._run.base
        text = host.text_model(base)
        self._handles = [
            host.tower_module(base).register_forward_pre_hook(lambda module, args: self._begin("encode")),
            text.register_forward_pre_hook(self._before_llm, with_kwargs=True, prepend=True),
            host.layers(base)[0].register_forward_pre_hook(self._before_layers, prepend=True),
            text.register_forward_hook(lambda module, args, output: self._begin(None)),
        ]
        self._idle = memory_in_use(self._memory.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_llm(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._begin("compress" if kwargs["inputs_embeds"].shape[1] > 1 else "decode")

    def _before_layers(self, module: Any, args: Any) -> None:
        if self._stage == "compress":
            self._begin("prefill")

    def _begin(self, stage: str | None) -> None:
        """Close the stage that runs and open another."""
        if stage == self._stage:
            return
        if self._stage is not None:
            grown = max(0, self._memory.read() - self._idle)
            self.peaks[self._stage] = max(grown, self.peaks.get(self._stage, 0))
        self._stage = stage
        self._memory.start()
