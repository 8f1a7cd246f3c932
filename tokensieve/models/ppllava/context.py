"""Longer prompts for CLIP and SigLIP text towers: 77 -> 248 and 64 -> 196 positions (PPLLaVA, section 3.3).

The first 20 rows of the position table stay as they are, the rest is stretched by 4 through linear interpolation.
Training keeps the first rows: the table then has two copies, a frozen one that gives the first rows and a trainable
one that gives the others.

Everything here changes a text model of transformers in place and keeps its token embedding:

- :func:`extend_context` stretches the table and makes the two copies,
- :func:`split_tables` makes the two copies of a table that is long already,
- :func:`merge_tables` makes one plain embedding of them again, so that `save_pretrained` writes a checkpoint that
  transformers loads without this package.

With two copies the names in the state dict are those of the published weights
(``embeddings.position_embedding`` and ``embeddings.position_embedding_res``).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokensieve.errors import MethodError

__all__ = [
    "KEEP",
    "RATIO",
    "ExtendedTextEmbeddings",
    "extend_context",
    "extend_positions",
    "merge_tables",
    "split_tables",
    "text_body",
]

KEEP = 20
"""Rows at the start that are not stretched: positions that short captions have trained well."""

RATIO = 4
"""Rows that take the place of each later row."""

Model = TypeVar("Model", bound=nn.Module)


def extend_positions(table: Tensor, keep: int = KEEP, ratio: int = RATIO) -> Tensor:
    """Stretch a position table behind its first rows.

    Parameters
    ----------
    table : Tensor
        ``[L, D]`` with L at least 2.
    keep : int
        First rows to leave alone, 0 to L.
    ratio : int
        Rows that replace each of the others, at least 1.

    Returns
    -------
    Tensor
        ``[keep + ratio * (L - keep), D]``. Row ``keep + ratio * n`` equals row ``keep + n`` of ``table``, rows
        between are interpolated and those behind its last row extrapolated.

    Raises
    ------
    MethodError
        If ``table`` has no two rows, or ``keep`` or ``ratio`` is out of range.
    """
    length = table.shape[0]
    if table.dim() != 2 or length < 2:
        raise MethodError(f"the position table has the shape {list(table.shape)}; it needs two rows and two axes.")
    if not 0 <= keep <= length or ratio < 1:
        raise MethodError(f"keep is {keep} and ratio {ratio}; give 0 <= keep <= {length} and a ratio of 1 or more.")
    tail = table[keep:]
    steps = torch.diff(table, dim=0)
    steps = torch.cat([steps, steps[-1:]])[keep:]
    shares = torch.arange(ratio, dtype=table.dtype, device=table.device) / ratio
    stretched = tail[:, None] + shares[:, None] * steps[:, None]
    return torch.cat([table[:keep], stretched.flatten(0, 1)])


class ExtendedTextEmbeddings(nn.Module):
    """Token and position embeddings of a CLIP or SigLIP text tower with a frozen and a trainable position table.

    Takes the place of the `embeddings` of a text model; called like these.

    Parameters
    ----------
    token_embedding : nn.Embedding
        Of the text model, used as it is.
    table : Tensor
        ``[L, D]``: start of both copies.
    keep : int
        Rows that come from the frozen copy.

    Attributes
    ----------
    position_embedding, position_embedding_res : nn.Parameter
        ``[L, D]``, frozen and trainable.
    """

    def __init__(self, token_embedding: nn.Embedding, table: Tensor, keep: int = KEEP) -> None:
        super().__init__()
        self.keep = keep
        self.token_embedding = token_embedding
        self.position_embedding = nn.Parameter(table.detach().clone(), requires_grad=False)
        self.position_embedding_res = nn.Parameter(table.detach().clone())

    @property
    def weight(self) -> Tensor:
        """``[L, D]``: the table in use, the first rows of the frozen copy and the others of the trainable one."""
        # No mask is stored: a buffer outside of the state dict would be lost when transformers loads a checkpoint.
        # Loading also forgets that a parameter is frozen, hence the explicit stop.
        return torch.cat([self.position_embedding.detach()[: self.keep], self.position_embedding_res[self.keep :]])

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed token ids ``[B, n]`` (or take ``inputs_embeds [B, n, D]``) and add the positions.

        Raises
        ------
        MethodError
            If neither is given, or the prompt is longer than the table.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise MethodError("the text tower got neither input_ids nor inputs_embeds; give one of them.")
            inputs_embeds = self.token_embedding(input_ids)
        length, limit = inputs_embeds.shape[1], self.position_embedding.shape[0]
        if length > limit:
            raise MethodError(f"the prompt has {length} tokens, the text tower {limit} positions; truncate it.")
        if position_ids is None:
            return inputs_embeds + self.weight[:length]
        return inputs_embeds + nn.functional.embedding(position_ids, self.weight)


def text_body(model: nn.Module) -> Any:
    """The module of a CLIP or SigLIP (text) model that owns `embeddings`.

    Raises
    ------
    MethodError
        If there is none.
    """
    body: Any = getattr(model, "text_model", model)
    if not hasattr(getattr(body, "embeddings", None), "token_embedding"):
        raise MethodError(f"{type(model).__name__} has no text embeddings; give a CLIP or SigLIP (text) model.")
    return body


def extend_context(model: Model, keep: int = KEEP, ratio: int = RATIO) -> Model:
    """Let the text tower of a model read longer prompts, in place.

    Parameters
    ----------
    model : nn.Module
        CLIP or SigLIP (text) model of transformers with a single position table.
    keep, ratio : int
        See :func:`extend_positions`.

    Returns
    -------
    nn.Module
        ``model``, with two copies of the stretched table and the new length in its configuration.
    """
    return _install(model, extend_positions(_table(model), keep, ratio), keep)


def split_tables(model: Model, keep: int = KEEP) -> Model:
    """Give a text tower with one long position table the two copies, in place; the opposite of `merge_tables`.

    Parameters
    ----------
    model : nn.Module
        CLIP or SigLIP (text) model of transformers with a single position table.
    keep : int
        Rows that come from the frozen copy.

    Returns
    -------
    nn.Module
        ``model``; its outputs do not change.
    """
    return _install(model, _table(model), keep)


def merge_tables(model: Model) -> Model:
    """Make one plain embedding of the two copies, in place, so that transformers can save and load the model.

    Parameters
    ----------
    model : nn.Module
        What :func:`extend_context` or :func:`split_tables` returned.

    Returns
    -------
    nn.Module
        ``model``; its outputs do not change, and every row is trainable again.

    Raises
    ------
    MethodError
        If the model has a single table already.
    """
    body = text_body(model)
    embeddings = body.embeddings
    if not isinstance(embeddings, ExtendedTextEmbeddings):
        raise MethodError(f"{type(model).__name__} has one position table already; there is nothing to merge.")
    # The embeddings that came with the model are gone; those of its class need a configuration only.
    stock = _stock_class(body)(body.config)
    stock.token_embedding = embeddings.token_embedding
    stock.position_embedding = nn.Embedding.from_pretrained(embeddings.weight.detach().clone(), freeze=False)
    body.embeddings = stock.to(embeddings.position_embedding.device)
    return model


def _stock_class(body: Any) -> type[nn.Module]:
    """Class of the text embeddings that transformers itself uses in a text tower."""
    if "siglip" in type(body).__name__.lower():
        from transformers.models.siglip.modeling_siglip import SiglipTextEmbeddings as Embeddings
    else:
        from transformers.models.clip.modeling_clip import CLIPTextEmbeddings as Embeddings
    return Embeddings


def _table(model: nn.Module) -> Tensor:
    """The single position table ``[L, D]`` of a text tower."""
    embeddings = text_body(model).embeddings
    if isinstance(embeddings, ExtendedTextEmbeddings):
        raise MethodError(f"{type(model).__name__} has two position tables already; call merge_tables first.")
    return embeddings.position_embedding.weight.detach()


def _install(model: Model, table: Tensor, keep: int) -> Model:
    """Put two copies of a table into a text tower and its length into every configuration that states it."""
    body = text_body(model)
    body.embeddings = ExtendedTextEmbeddings(body.embeddings.token_embedding, table, keep).train(body.training)
    for owner in (model, body):
        config = getattr(owner, "config", None)
        config = getattr(config, "text_config", None) or config
        if config is not None:
            config.max_position_embeddings = table.shape[0]
    return model
