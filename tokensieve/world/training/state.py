"""Checkpoints of a training run that may be killed at any moment, and the log it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Modules = dict[str, torch.nn.Module]
Optimisers = dict[str, torch.optim.Optimizer]


class Checkpoint:
    """Model and optimiser state under a folder, written so that a kill never leaves a broken one.

    Tensors go into one safetensors file, numbers into a JSON file beside it that is replaced last; a file without its
    JSON is ignored.

    Parameters
    ----------
    folder
        Where the files lie; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, modules: Modules, optimisers: Optimisers) -> None:
        """Write everything that is needed to go on after ``step`` steps."""
        tensors: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            for key, value in module.state_dict().items():
                tensors[f"module/{name}/{key}"] = value.detach().clone().contiguous()
        for name, optimiser in optimisers.items():
            for index, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    tensors[f"optimiser/{name}/{index}/{key}"] = torch.as_tensor(value).detach().clone().contiguous()
        data = self.folder / f"state-{step}.safetensors"
        save_file(tensors, data)
        _replace(self.folder / "state.json", json.dumps({"step": step, "data": data.name}))
        for old in self.folder.glob("state-*.safetensors"):
            if old != data:
                old.unlink()

    def load(self, modules: Modules, optimisers: Optimisers) -> int:
        """Restore what was saved last and return its step; 0 when there is nothing."""
        index = self.folder / "state.json"
        if not index.exists():
            return 0
        found = json.loads(index.read_text())
        tensors = load_file(self.folder / found["data"])
        for name, module in modules.items():
            prefix = f"module/{name}/"
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimiser in optimisers.items():
            _restore(optimiser, f"optimiser/{name}/", tensors)
        return int(found["step"])


def _restore(optimiser: torch.optim.Optimizer, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key[len(prefix) :].split("/")
            state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSONL log."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
