"""Training of the models that come with tokensieve, on transformers' Trainer with PEFT and accelerate.

    from tokensieve.train import read_config, train

    train(read_config("sft.yaml"))                     # what `tokensieve train ppllava --config sft.yaml` does
    train(config, model=model, processor=processor, dataset=my_dataset)     # parts of one's own

A dataset of one's own is any sequence of :class:`Sample`. The parts:

- :mod:`.config`, what a recipe file may say,
- :mod:`.records`, the public JSON formats,
- :mod:`.check`, the look at all records before the first step,
- :mod:`.frames`, which frames of a clip training and evaluation see,
- :mod:`.collate`, from samples to model inputs and labels,
- :mod:`.freeze`, which parameters learn, and LoRA,
- :mod:`.loop` and :mod:`.dpo`, arguments, curves and the preference loss,
- :mod:`.run`, all of it in order.

Needs the extra ``train``: ``pip install "tokensieve[train]"``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokensieve.train.check import DataReport, check_records
    from tokensieve.train.collate import Collator
    from tokensieve.train.config import DataSource, LoraOptions, TrainConfig, read_config
    from tokensieve.train.records import RecordDataset, Sample, Turn, read_records
    from tokensieve.train.run import TrainResult, train

_LATER = {
    "Collator": "collate",
    "DataReport": "check",
    "DataSource": "config",
    "LoraOptions": "config",
    "RecordDataset": "records",
    "Sample": "records",
    "TrainConfig": "config",
    "TrainResult": "run",
    "Turn": "records",
    "check_records": "check",
    "read_config": "config",
    "read_records": "records",
    "train": "run",
}

__all__ = [
    "Collator",
    "DataReport",
    "DataSource",
    "LoraOptions",
    "RecordDataset",
    "Sample",
    "TrainConfig",
    "TrainResult",
    "Turn",
    "check_records",
    "read_config",
    "read_records",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
