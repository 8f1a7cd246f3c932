"""From a folder or a hub name to a model and its processor, or to one sentence that says why not.

Only safetensors weights are read, and everything that the configuration alone can tell (is it a model, is its
type supported, are there weights) is checked before any weight is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokensieve.errors import HostError
from tokensieve.hosts.registry import host_for_type
from tokensieve.library_errors import brief_error, library_errors

__all__ = [
    "BUNDLED",
    "DTYPES",
    "check_weight_files",
    "load_model",
    "meta_model",
    "model_type_of",
    "random_weight_model",
    "read_config",
]

DTYPES: Mapping[str, str] = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
"""Accepted names of weight types, and what transformers calls them."""

BUNDLED = "bundled"
"""Short name of the trained model that ships with the package."""

_LARGEST_JSON = 64 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KERNEL_NAME = re.compile(r"[a-z0-9_]+")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a video or image LLM and its processor through the Auto classes.

    Parameters
    ----------
    name : str or Path
        Folder of a checkpoint, a name on the Hugging Face hub such as ``"Qwen/Qwen2.5-VL-7B-Instruct"``, or
        ``"bundled"`` for the small trained model that ships with the package.
    dtype : str
        Type of the weights, a key of `DTYPES`; ``"auto"`` takes what the checkpoint states.
    device : str
        ``"auto"`` (the first CUDA device if there is one, else the CPU), or a device of torch (``"cuda:1"``).
    attn : str, optional
        Attention kernel (``"sdpa"``, ``"eager"``, ``"flash_attention_2"``); the library's choice unless given.
    trust_remote_code : bool
        Let transformers run code that comes with the checkpoint. Off unless the user asks for it.

    Returns
    -------
    tuple of PreTrainedModel and ProcessorMixin
        The model in evaluation mode on its device, and its processor.

    Raises
    ------
    HostError
        If there is no such model, it is no supported video or image LLM, its weights are missing, incomplete,
        damaged or pickled, it has no processor, or dtype, device or kernel cannot be used.
    """
    if dtype not in DTYPES:
        raise HostError(f"There is no dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
    if attn is not None and not _KERNEL_NAME.fullmatch(attn) and not trust_remote_code:
        raise HostError(
            f"The attention kernel {attn!r} would be fetched as code; name an installed one such as sdpa or eager, "
            "or allow remote code."
        )
    target = _device_of(device)
    config = read_config(name, trust_remote_code)
    folder = _folder(name)
    if folder.is_dir():
        check_weight_files(folder)
    processor = _load_processor(name, trust_remote_code)
    model = _load_weights(name, config, DTYPES[dtype], target, attn, trust_remote_code)
    return model.eval(), processor


def read_config(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint whose type is supported.

    Parameters
    ----------
    name, trust_remote_code
        As for `load_model`.

    Returns
    -------
    PreTrainedConfig

    Raises
    ------
    HostError
        If there is no such model or its type is not supported.
    """
    kind = model_type_of(name)
    _register_own_classes(kind)
    try:
        host_for_type(kind)
    except HostError as error:
        raise HostError(f"{name} cannot be used: {_lower_first(str(error))}") from None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_location(name), trust_remote_code=trust_remote_code)
    except library_errors() as error:
        raise HostError(
            f"The config.json of {name} cannot be used ({brief_error(error)}); take that of the published checkpoint."
        ) from error


def model_type_of(name: str | Path) -> str:
    """The ``model_type`` that a checkpoint's ``config.json`` states, read without building anything.

    Raises
    ------
    HostError
        If the file cannot be had, is no JSON or states no type.
    """
    settings = _read_json(_config_file(name), f"The config.json of {name}")
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str):
        raise HostError(f"The config.json of {name} states no model_type; give a Hugging Face model.")
    return kind


def meta_model(config: Any) -> Any:
    """Build the model of a configuration without weights, for questions about its structure.

    Parameters
    ----------
    config : PreTrainedConfig
        From `read_config`.

    Returns
    -------
    PreTrainedModel
        On the meta device: modules and shapes, no memory.

    Raises
    ------
    HostError
        If the configuration contradicts itself.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config).eval()
    except (ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise HostError(
            f"No model can be built from this config.json ({brief_error(error)}); "
            "take that of the published checkpoint."
        ) from error


def random_weight_model(real_layout: bool = False) -> Path:
    """Folder of a tiny LLaVA-OneVision of random weights, built the first time it is asked for.

    Its answers mean nothing; it shows what the other commands do without a download.

    Parameters
    ----------
    real_layout
        Give every frame the 14 x 14 tokens of the published checkpoints instead of 5 x 5.

    Raises
    ------
    HostError
        If the user's cache folder cannot be written.
    """
    from tokensieve.hosts import tiny

    try:
        overrides: dict[str, Any] = {"vision": {"image_size": 378, "patch_size": 14}} if real_layout else {}
        return tiny.cached("llava_onevision", **overrides)
    except OSError as error:
        raise HostError(
            f"The demonstration model cannot be written to the cache folder ({brief_error(error)}); set XDG_CACHE_HOME "
            "to a folder you can write to, or name a model."
        ) from error


def _device_of(device: str) -> torch.device:
    """The torch device of a name, checked to exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HostError(f"The device {device!r} cannot be used here ({brief_error(error)}); try 'cpu'.") from error
    if target.type == "meta":
        raise HostError("The device 'meta' holds no values; use 'cpu' or 'cuda'.")
    return target


def _folder(name: str | Path) -> Path:
    """The folder a name would be, with the bundled model by its short name."""
    if name == BUNDLED:
        from tokensieve.world.bundled import bundled

        return bundled("video-llm")
    return Path(name).expanduser()


def _location(name: str | Path) -> str:
    """What the Auto classes take: an expanded folder, or the hub name itself."""
    folder = _folder(name)
    return str(folder) if folder.is_dir() else str(name)


def _config_file(name: str | Path) -> Path:
    """The ``config.json`` of a folder or of a hub repository (fetched, or from the hub cache)."""
    folder = _folder(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HostError(f"The folder {name} has no config.json, so it is no Hugging Face model.")
        return folder / "config.json"
    if folder.exists():
        raise HostError(f"{name} is a file; give the folder of the model or its name on the hub.")
    if not _HUB_NAME.fullmatch(str(name)) or ".." in str(name):
        raise HostError(f"The model folder {name} does not exist; check the path.")
    return _fetch_config(str(name))


def _fetch_config(name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except errors.GatedRepoError as error:
        raise HostError(
            f"The hub model {name} is gated; accept its terms on its page and log in with 'hf auth login'."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HostError(
            f"There is no folder and no public hub model {name}; check the name, or log in for a private one."
        ) from error
    except (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise HostError(f"The hub repository {name} has no config.json, so it is no Hugging Face model.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HostError(
            f"There is no folder {name}, and the hub cannot be reached; check the path or the connection."
        ) from error
    except (OSError, ValueError) as error:
        raise HostError(f"The hub model {name} cannot be fetched ({brief_error(error)}).") from error


def _read_json(path: Path, what: str) -> Any:
    """A small JSON file."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise HostError(f"{what} is larger than 64 MiB, which no such file is; copy the checkpoint again.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HostError(f"{what} cannot be read ({brief_error(error)}); copy the checkpoint again.") from error


def check_weight_files(folder: Path) -> None:
    """Look for the weights of a checkpoint folder without reading them.

    Raises
    ------
    HostError
        Unless the folder holds every safetensors file that it should.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _read_json(index, str(index))
        shards = set((listed.get("weight_map") or {}).values()) if isinstance(listed, dict) else set()
        if not shards:
            raise HostError(f"{index} lists no weight files; copy or download the checkpoint again.")
        lost = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
        if lost:
            raise HostError(
                f"{folder} lacks {len(lost)} of {len(shards)} weight files, first {lost[0]}; copy or download them."
            )
        return
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise HostError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded and are refused; "
            "convert them to safetensors."
        )
    raise HostError(f"{folder} has a configuration but no weights (*.safetensors); copy or download them.")


def _load_processor(name: str | Path, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(_location(name), trust_remote_code=trust_remote_code)
    except library_errors() as error:
        raise HostError(
            f"The processor of {name} cannot be loaded ({brief_error(error)}); the folder needs the processor and "
            "tokenizer files of the published checkpoint."
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise HostError(
            f"{name} comes with a {type(processor).__name__} only, without image processing; copy the processor "
            "files of the published checkpoint."
        )
    return processor


def _load_weights(
    name: str | Path, config: Any, dtype: str, device: torch.device, attn: str | None, trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import is_accelerate_available

    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    if device.type != "cpu" and is_accelerate_available():
        # Straight to the device; without accelerate the weights pass through main memory.
        options["device_map"] = {"": str(device)}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            _location(name),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise HostError(f"{name} does not fit into the memory of {device}; use --dtype bfloat16.") from error
    except library_errors() as error:
        if attn is not None and (isinstance(error, ImportError) or "attn_implementation" in str(error)):
            raise HostError(
                f"The attention kernel {attn!r} cannot be used here ({brief_error(error)}); use sdpa or eager."
            ) from error
        raise HostError(
            f"The weights of {name} cannot be loaded ({brief_error(error)}); copy or download the checkpoint again."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise HostError(
            f"The weights of {name} are incomplete: {len(missing)} missing, first {missing[0]}; "
            "copy or download the checkpoint again."
        )
    return model


def _register_own_classes(kind: str) -> None:
    """Teach the Auto classes a family that transformers does not have."""
    if kind == "llava_video":
        from tokensieve.models import llava_video

        llava_video.register()
    if kind == "ppllava":
        from tokensieve.models import ppllava
        from tokensieve.models.ppllava.host import register_host

        ppllava.register()
        register_host()


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
