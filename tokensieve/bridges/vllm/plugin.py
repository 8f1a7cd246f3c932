"""What the engine calls in each of its processes before models are built."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from tokensieve.bridges.vllm.arguments import KNOWN_VERSIONS, engine_version, is_known
from tokensieve.bridges.vllm.choice import is_ours, read_choice
from tokensieve.bridges.vllm.families import FAMILIES, checked, family_of
from tokensieve.errors import MethodError

_LOGGER = logging.getLogger("vllm.tokensieve")
_MARK = "_tokensieve_replaced"


def register() -> None:
    """Make methods of tokensieve known to the engine; harmless when called again.

    Nothing changes for an engine that does not ask for one of them. With a release that is not known nothing is
    touched and a warning says so; the engine then refuses the names itself.
    """
    number = engine_version()
    if not is_known(number):
        _LOGGER.warning(
            "tokensieve knows vLLM %s, this is %s: its methods are not offered to --video-pruning-method.",
            ", ".join(KNOWN_VERSIONS),
            number,
        )
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    _replace(EngineArgs, "create_model_config", _model_config)
    _replace(EngineArgs, "add_cli_args", _cli_args, static=True)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        _replace(CPUModelRunner, "load_model", _load_on_cpu)


def _replace(owner: type, name: str, wrapper: Any, *, static: bool = False) -> None:
    """Put a function around one of the engine's, once in a process."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(replaced, _MARK, original)
    setattr(owner, name, staticmethod(replaced) if static else replaced)


def _cli_args(original: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
    """``--video-pruning-method`` takes every name; it is checked when the model is known."""
    parser = original(parser, *args, **kwargs)
    for action in parser._actions:
        if "--video-pruning-method" in action.option_strings:
            action.choices = None
            action.metavar = "{evs,vidcom2,tokensieve:NAME[:OPTION=VALUE,...]}"
    return parser


def _model_config(original: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's configuration, with our classes and our method where one was chosen."""
    name, rate = arguments.video_pruning_method, arguments.video_pruning_rate
    if not is_ours(name):
        config = original(arguments, *args, **kwargs)
        _warn_when_ignored(config)
        return config
    choice = read_choice(name, rate)
    overrides = {architecture: family.target for architecture, family in FAMILIES.items()}
    # The engine's own check knows two names; ours takes the place of one of them once it has passed.
    stand_in = dataclasses.replace(
        arguments,
        video_pruning_method="evs",
        model_class_overrides={**overrides, **arguments.model_class_overrides},
    )
    config = original(stand_in, *args, **kwargs)
    family = family_of(config.architecture)
    if config.multimodal_config is None:
        raise MethodError(f"{name} prunes videos, but {config.model} is run without them; leave the method out.")
    checked(choice.method, family)
    config.multimodal_config.video_pruning_method = choice.text
    return config


def _warn_when_ignored(config: Any) -> None:
    """The engine passes over a pruning rate for models that it cannot prune; say so."""
    multimodal = config.multimodal_config
    pruned = multimodal is not None and multimodal.get_video_pruning_spec() is not None
    if pruned and not config._model_info.supported_video_pruning_methods:
        _LOGGER.warning(
            "vLLM cannot prune %s by itself and ignores --video-pruning-rate; --video-pruning-method tokensieve:evs "
            "(or another method of tokensieve) may.",
            config.architecture,
        )


def _load_on_cpu(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model on the CPU, and set the flag that the runner for GPUs sets itself."""
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning

    result = original(runner, *args, **kwargs)
    multimodal = runner.model_config.multimodal_config
    runner.is_multimodal_pruning_enabled = (
        multimodal is not None
        and multimodal.is_multimodal_pruning_enabled()
        and supports_multimodal_pruning(runner.get_model())
    )
    return result
