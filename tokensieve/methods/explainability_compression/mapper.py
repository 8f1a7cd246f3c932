"""The network that predicts relevance from attention, its target and its loss."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokensieve.errors import MethodError
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

FORMAT = "tokensieve-relevance-mapper-1"
CHANNELS = (32, 64, 128, 256, 512)
_GROUPS = 8
_MAX_CONFIG = 1 << 16
_MAX_WEIGHTS = 1 << 28
Modality = Literal["image", "video", "any"]


@dataclass(frozen=True)
class MapperConfig:
    """Shape of a mapper, and which model it is for.

    Attributes
    ----------
    channels
        Output channels of the depthwise separable layers.
    kernel
        Width of the depthwise convolutions, odd.
    host, decoder_layers
        Family and depth of the model whose labels it learnt; empty and 0 where it is not tied to one.
    modality
        Visual items that it was trained on.
    model
        Name of that model, for people.
    """

    channels: tuple[int, ...] = CHANNELS
    kernel: int = 3
    host: str = ""
    decoder_layers: int = 0
    modality: Modality = "any"
    model: str = ""

    def __post_init__(self) -> None:
        sizes = (*self.channels, self.kernel)
        if not self.channels or not all(isinstance(n, int) and 1 <= n <= 8192 for n in sizes) or self.kernel % 2 == 0:
            raise MethodError(
                f"a mapper has layers of 1 to 8192 channels and an odd kernel, not {self.channels} and {self.kernel}."
            )
        if self.modality not in get_args(Modality):
            raise MethodError(f"modality is {self.modality!r}; use {', '.join(get_args(Modality))}.")

    @classmethod
    def load(cls, folder: str | Path) -> MapperConfig:
        """From ``config.json`` in a folder."""
        path = Path(folder) / "config.json"
        try:
            if path.stat().st_size > _MAX_CONFIG:
                raise MethodError(f"{path} is larger than 64 KiB, which no mapper's configuration is.")
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MethodError(f"{folder} holds no mapper ({error}); name a folder that a training wrote.") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise MethodError(f"{path} is not of the format {FORMAT}; name a folder that a training wrote.")
        try:
            return cls(
                tuple(found["channels"]),
                found["kernel"],
                str(found["host"]),
                int(found["decoder_layers"]),
                found["modality"],
                str(found.get("model", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MethodError(f"{path} lacks an entry or has a wrong one ({error}); train the mapper anew.") from error

    def save(self, folder: str | Path) -> None:
        """To ``config.json`` in a folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")


class RelevanceMapper(nn.Module):
    """Depthwise separable convolutions over the sequence of visual tokens; fully convolutional, any length (step 6).

    Parameters
    ----------
    config : MapperConfig
        Its shape. Kernel 3, padding to the same length, group norms and ReLU are not given by the paper.
    """

    def __init__(self, config: MapperConfig | None = None) -> None:
        super().__init__()
        self.config = config or MapperConfig()
        widths = (1, *self.config.channels)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv1d(before, before, self.config.kernel, padding=self.config.kernel // 2, groups=before),
                nn.Conv1d(before, after, 1),
                nn.GroupNorm(_GROUPS if after % _GROUPS == 0 else 1, after),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv1d(widths[-1], 1, 1)

    def forward(self, attention: Tensor) -> Tensor:
        """Logarithm of the predicted relevance.

        Parameters
        ----------
        attention : Tensor
            ``[B, N]`` attention of the instruction to the visual tokens in the first layer of the LLM. Only its
            proportions matter: it is divided by its mean, since values near 1 / N would vanish in the norms.

        Returns
        -------
        Tensor
            ``[B, N]`` float32, log softmax over the N tokens.
        """
        values = as_float32(attention)
        scaled = values / values.mean(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        return self.head(self.layers(scaled.unsqueeze(1)))[:, 0].log_softmax(dim=1)

    @torch.no_grad()
    def score(self, attention: Tensor) -> Tensor:
        """Predicted relevance ``[n]`` of one sequence of tokens, summing to 1; moves to the device of the input."""
        if next(self.parameters()).device != attention.device:
            self.to(attention.device)
        return self(attention.unsqueeze(0))[0].exp()

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": FORMAT})

    @classmethod
    def load(cls, folder: str | Path) -> RelevanceMapper:
        """Read what `save` wrote; a MethodError says what is wrong with it."""
        mapper = cls(MapperConfig.load(folder))
        mapper.load_state_dict(_checked(read_tensors(Path(folder) / "model.safetensors"), mapper, folder))
        return mapper.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file of at most 256 MiB."""
    try:
        if path.stat().st_size > _MAX_WEIGHTS:
            raise MethodError(f"{path} is larger than 256 MiB, which no file of this kind is; name the right one.")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MethodError(f"{path} cannot be read as safetensors ({error}); name the right file.") from error


def _checked(found: dict[str, Tensor], mapper: nn.Module, folder: Any) -> dict[str, Tensor]:
    wanted = {name: tuple(value.shape) for name, value in mapper.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise MethodError(f"the weights in {folder} do not fit its configuration (first of all {wrong[0]}).")
    return found


def relevance_target(relevance: Tensor) -> Tensor:
    """R*: relevances with the lower half set to 0, divided by their sum (step 4).

    Parameters
    ----------
    relevance : Tensor
        ``[N]``, not negative.

    Returns
    -------
    Tensor
        ``[N]`` float32 with at most ``ceil(N / 2)`` entries above 0; all equal where no token has any relevance.
    """
    values = as_float32(relevance).clamp(min=0)
    upper = top_indices(values, -(-values.numel() // 2))
    kept = torch.zeros_like(values).index_copy(0, upper, values[upper])
    total = kept.sum()
    if not float(total) > 0:
        return torch.full_like(values, 1.0 / values.numel())
    return kept / total


def relevance_loss(target: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(R* || R~), mean over the batch (step 7).

    Parameters
    ----------
    target : Tensor
        ``[B, N]`` from `relevance_target`.
    log_predicted : Tensor
        ``[B, N]`` from `RelevanceMapper`.
    """
    return (torch.xlogy(target, target) - target * log_predicted).sum(dim=1).mean()
