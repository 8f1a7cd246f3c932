"""A contrastive pair without its vision layers: text tower, tokenizer, and the way of patches to the shared space.

The vision layers are the host's. Everything here runs in the dtype that the pair was loaded in (float32 unless a model
object is given), whatever autocast says, on the device of its input.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.errors import HostError, SignalError
from tokensieve.pairing.geometry import PairKind, VisionGeometry
from tokensieve.pairing.heads import ClipHead, SharedHead, SiglipHead, Summary

__all__ = ["Agreement", "ClipPair", "SiglipPair", "TextPair"]

_SMALL = 1 << 14
"""Tensors up to this size are compared by value with those of the host."""


@dataclass(frozen=True)
class Agreement:
    """How a host's tower compares with the vision half of a pair.

    Attributes
    ----------
    shared
        Parameters that both have, all of equal shape.
    compared, equal
        Small ones among them, and how many of these hold the same values (in the coarser dtype).
    """

    shared: int
    compared: int
    equal: int

    @property
    def tuned(self) -> bool:
        """Whether the host went on training its tower, so that the text tower knows an older one."""
        return self.equal < self.compared


class TextPair(ABC):
    """The text half of a contrastive pair and the end of its vision half.

    Parameters
    ----------
    model : PreTrainedModel
        `CLIPModel` or `SiglipModel`; it is not changed, and its vision layers are not kept.
    tokenizer : PreTrainedTokenizerBase, optional
        Of the same checkpoint; loaded from ``source`` unless given.
    source : str
        Folder or hub name.

    Attributes
    ----------
    geometry
        Of the vision half.
    text_model
        Text tower, for those who want to extend its context.
    logit_scale
        Inverse temperature of the cosines, 100 for the CLIP models of OpenAI.
    """

    kind: ClassVar[PairKind]

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        vision = model.vision_model
        geometry = VisionGeometry.of(model.config.vision_config)
        if geometry is None or geometry.kind != self.kind:
            raise HostError(
                f"{source} is no {self.kind} pair of towers over square pictures; name a CLIP or SigLIP model."
            )
        self.geometry, self.source = geometry, source
        self._tokenizer, self._entries = tokenizer, int(model.config.text_config.vocab_size)
        self.text_model = model.text_model
        self.logit_scale = float(model.logit_scale.detach().exp().flatten()[0])
        self.text_length = int(model.config.text_config.max_position_embeddings)
        state = {_plain(name): value for name, value in vision.state_dict().items()}
        self._shapes = {name: tuple(value.shape) for name, value in state.items()}
        self._small = {name: value.detach().clone().cpu() for name, value in state.items() if value.numel() <= _SMALL}

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the text tower; loaded at first use, as signals of pictures alone do without.

        Raises
        ------
        HostError
            If there is none.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.source)
        if not self._entries // 2 <= len(self._tokenizer) <= self._entries:
            # The library makes an empty tokenizer for a folder that has none.
            raise HostError(
                f"The tokenizer of the text tower {self.source} has {len(self._tokenizer)} entries, its word table "
                f"{self._entries}; its folder needs the tokenizer files of the published checkpoint."
            )
        return self._tokenizer

    @property
    @abstractmethod
    def width(self) -> int:
        """P, width of the shared space."""

    @property
    @abstractmethod
    def head(self) -> SharedHead:
        """The end of the vision half."""

    @abstractmethod
    def _pool_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Texts ``[B, L]`` in the shared space ``[B, P]``."""

    # -- the host's tower ------------------------------------------------------------------------------------

    def check(self, tower: nn.Module) -> Agreement:
        """Compare a host's vision tower with the vision half of the pair.

        Parameters
        ----------
        tower
            The host's vision tower. Layers, norm and head that it dropped at its end do not matter.

        Raises
        ------
        SignalError
            When a parameter has another shape or the pair lacks it.
        """
        compared = equal = 0
        state = {_plain(name): value for name, value in tower.state_dict().items()}
        for name, value in state.items():
            if self._shapes.get(name) != tuple(value.shape):
                has = f"has {list(self._shapes[name])}" if name in self._shapes else "has no such parameter"
                raise SignalError(
                    f"The text tower {self.source} belongs to another vision tower: {name} is {list(value.shape)} in "
                    f"the model, and the pair {has}; give the pair that the model was built from as text_tower."
                )
            if name in self._small and not value.is_meta:
                theirs, ours = value.detach().cpu(), self._small[name]
                coarse = theirs.dtype if theirs.dtype.itemsize <= ours.dtype.itemsize else ours.dtype
                compared += 1
                equal += torch.equal(theirs.to(coarse), ours.to(coarse))
        return Agreement(len(state), compared, equal)

    # -- pictures --------------------------------------------------------------------------------------------

    def align(self, states: Tensor) -> Tensor:
        """Patch states of the tower in the space of the texts.

        CLIP: post-LayerNorm and visual projection, which CLIP applies to its class token. SigLIP: post-LayerNorm and
        the value path of the attention-pooling head (value projection, residual MLP).

        Parameters
        ----------
        states : Tensor
            ``[..., Dv]`` of the host's feature layer, without class token.

        Returns
        -------
        Tensor
            ``[..., P]``, not normalised.
        """
        with torch.no_grad(), _exact(states):
            return self._on(states).align(states)

    def project(self, states: Tensor) -> Tensor:
        """Visual projection alone, without the norm ``[..., Dv] -> [..., P]`` (CLIP only)."""
        with torch.no_grad(), _exact(states):
            return self._on(states).project(states)

    def summarise(self, states: Tensor) -> Summary:
        """What the attention-pooling head makes of pictures (SigLIP only).

        Parameters
        ----------
        states : Tensor
            ``[B, N, Dv]`` of the host's feature layer.

        Returns
        -------
        Summary
            ``vector [B, Dv]`` and ``attention [B, N]`` (rows sum to 1).
        """
        with torch.no_grad(), _exact(states):
            return self._on(states).summarise(states)

    # -- questions -------------------------------------------------------------------------------------------

    def embed_question(self, question: str) -> Tensor:
        """One vector ``[P]`` of a question, not normalised: padded and cut to the context of the text tower.

        CLIP: state of the end-of-text token, projected. SigLIP: pooled output.
        """
        ids, mask = self._ids(question, padding="max_length", truncation=True, max_length=self.text_length)
        return self._run(ids, mask)[0]

    def embed_segments(self, question: str) -> Tensor:
        """Vectors ``[M, P]`` of the segments of a question that may be longer than the context (CDPruner, step 2).

        Ids of a longer question are filled up to a multiple of the context, with zeros as released for CLIP and with
        padding for SigLIP, and cut; only the first segment has a start token.
        """
        if self.kind == "siglip":
            # SigLIP reads its text at the last position and was trained on padded texts.
            ids, mask = self._ids(question, padding="max_length", truncation=False, max_length=self.text_length)
        else:
            ids, mask = self._ids(question, truncation=False)
        length = self.text_length
        if ids.shape[1] > length:
            rest = self.tokenizer.pad_token_id or 0 if self.kind == "siglip" else 0
            filled = ids.new_full((1, -(-ids.shape[1] // length) * length), rest)
            filled[:, : ids.shape[1]] = ids
            ids, mask = filled.view(-1, length), None
        return self._run(ids, mask)

    def last_state(self, question: str) -> Tensor:
        """Projected state ``[P]`` at the last position of the padded question (Recoverable Compression, step 1)."""
        ids, mask = self._ids(question, padding="max_length", truncation=True, max_length=self.text_length)
        with torch.no_grad(), _exact(ids):
            return self._last(ids, mask)[0]

    def _last(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self._pool_text(ids, mask)

    def _ids(self, question: str, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Token ids [1, L] and their mask; SigLIP takes none."""
        if not question.strip():
            raise HostError("The question is empty, so that nothing can be compared with it; give it as question=....")
        found = self.tokenizer([question], return_tensors="pt", verbose=False, **options)
        device = next(self.text_model.parameters()).device
        mask = found.get("attention_mask")
        mask = None if mask is None or self.kind == "siglip" else mask.to(device)
        return found["input_ids"].to(device), mask

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad(), _exact(ids):
            return self._pool_text(ids, mask)

    def _on(self, states: Tensor) -> SharedHead:
        """The head on the device of the states."""
        head = self.head
        assert isinstance(head, nn.Module)
        if next(head.parameters()).device != states.device:
            head.to(states.device)
        return head


class ClipPair(TextPair):
    """A pair of CLIP."""

    kind = "clip"

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        super().__init__(model, tokenizer, source)
        self.text_projection = model.text_projection
        # A copy, as it moves to the device of the host's tower and the model stays where it is.
        self._head = copy.deepcopy(ClipHead(model.vision_model.post_layernorm, model.visual_projection))

    @property
    def width(self) -> int:
        """P, width of the shared space."""
        return int(self.text_projection.out_features)

    @property
    def head(self) -> ClipHead:
        """LayerNorm and visual projection."""
        return self._head

    def _pool_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        projected: Tensor = self.text_projection(self.text_model(input_ids=ids, attention_mask=mask).pooler_output)
        return projected

    def _last(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        states = self.text_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        projected: Tensor = self.text_projection(states)
        return projected


class SiglipPair(TextPair):
    """A pair of SigLIP."""

    kind = "siglip"

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        super().__init__(model, tokenizer, source)
        self._head = copy.deepcopy(SiglipHead(model.vision_model.post_layernorm, model.vision_model.head))

    @property
    def width(self) -> int:
        """P, width of the shared space."""
        return self.geometry.width

    @property
    def head(self) -> SiglipHead:
        """LayerNorm and attention-pooling head."""
        return self._head

    def _pool_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        pooled: Tensor = self.text_model(input_ids=ids).pooler_output
        return pooled


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from tokensieve.library_errors import brief_error, library_errors

    try:
        return AutoTokenizer.from_pretrained(name)
    except library_errors() as error:
        raise HostError(
            f"The tokenizer of the text tower {name} cannot be loaded ({brief_error(error)}); its folder needs the "
            "tokenizer files of the published checkpoint."
        ) from error


def _plain(name: str) -> str:
    """Parameter name without the wrapper that older versions of transformers have around a tower."""
    return name.removeprefix("vision_model.")


def _exact(tensor: Tensor) -> torch.autocast:
    """No autocast: rankings by cosine must not depend on the caller's context."""
    return torch.autocast(tensor.device.type, enabled=False)
