"""What the prompt processors of all families share: shorter placeholders, and cache keys that tell methods apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tokensieve.bridges.vllm.choice import Choice, choice_of


class PrunedProcessing:
    """In front of a prompt processor of the engine: videos get as many placeholders as the method keeps tokens."""

    info: Any

    @property
    def choice(self) -> Choice | None:
        """What was chosen for this engine."""
        return choice_of(self.info.ctx.get_mm_config())

    def placeholders(self, choice: Choice, index: int, items: Any, arguments: Mapping[str, Any], processed: Any) -> Any:
        """Ids that take the place of video ``index``."""
        raise NotImplementedError

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates: Sequence[Any] = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        choice = self.choice
        if choice is None:
            return updates

        def pruned(index: int) -> Any:
            return self.placeholders(choice, index, mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

        return [
            dataclasses.replace(update, replacement=pruned) if update.modality == "video" else update
            for update in updates
        ]

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Keys of the processor, encoder and prefix caches; those of videos name the method, its options and rate."""
        hashes = dict(super()._get_mm_hashes(inputs))  # type: ignore[misc]
        choice = self.choice
        if choice is not None and "video" in hashes:
            hashes["video"] = [f"{key}-{choice.digest}" for key in hashes["video"]]
        return hashes
