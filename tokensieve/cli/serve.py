"""``tokensieve serve``: an OpenAI-compatible server with video input."""

from __future__ import annotations

import importlib
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, quiet_transformers
from tokensieve.errors import TokensieveError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a model or its name on the hub; the bundled one without it.", show_default=False
        ),
    ] = None,
    method: options.MethodName = "vidcom2",
    retention: Annotated[
        float, typer.Option("--retention", "-r", help="Share of the visual tokens to keep unless a request says other.")
    ] = 0.25,
    allow_method: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-method",
            help="Method that requests may choose besides --method; repeat, wildcards allowed.",
            show_default=False,
        ),
    ] = None,
    min_retention: Annotated[float, typer.Option("--min-retention", help="Least that requests may choose.")] = 0.01,
    max_retention: Annotated[
        float | None,
        typer.Option(
            "--max-retention", help="Most that requests may choose; --retention unless given.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="Port; 0 for any free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="What requests call the model.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with a key that requests must send.", show_default=False),
    ] = None,
    frames: options.Frames = 32,
    max_frames: Annotated[int, typer.Option("--max-frames", help="Most frames a request may ask for.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Longest answer unless a request says other.")] = 256,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer a request may ask for.")
    ] = 2048,
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait; further ones are refused.")] = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Most requests answered together: 4 on transformers, 16 on vLLM unless given.",
            min=1,
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option("--engine", help="auto (vLLM where it is installed and can), vllm or transformers."),
    ] = "auto",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-option",
            help="name=value for vLLM, for example max_model_len=8192; repeat.",
            show_default=False,
        ),
    ] = None,
    decoders: Annotated[int, typer.Option("--decoders", help="Threads that read clips.")] = 2,
    media_root: Annotated[
        Path | None,
        typer.Option("--media-root", help="Folder whose files requests may name by file:.", show_default=False),
    ] = None,
    max_bytes: Annotated[int, typer.Option("--max-bytes", help="Largest clip, bytes.")] = 256 << 20,
    max_body: Annotated[int, typer.Option("--max-body", help="Largest request body, bytes.")] = 64 << 20,
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="Longest clip, seconds.")] = 3600.0,
    max_pixels: Annotated[int, typer.Option("--max-pixels", help="Largest frame, pixels.")] = 1 << 25,
    max_redirects: Annotated[int, typer.Option("--max-redirects", help="Most redirects of a download.")] = 5,
    allow_http: Annotated[bool, typer.Option("--allow-http", help="Fetch http: addresses too.")] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from private and local addresses too.")
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    trust_remote_code: options.RemoteCode = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Serve a model over HTTP in OpenAI's chat format, with compressed video and image input."""
    uvicorn = _needed()
    from tokensieve.bridges.openai_server.settings import MediaLimits, ServerSettings

    media = MediaLimits(
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        max_pixels=max_pixels,
        max_redirects=max_redirects,
        allow_http=allow_http,
        allow_private=allow_private,
        root=media_root,
    )
    settings = ServerSettings(
        model_name=name or model or "bundled",
        method=method,
        retention=retention,
        allowed_methods=tuple(allow_method or ()),
        min_retention=min_retention,
        max_retention=max_retention,
        frames=frames,
        max_frames=max_frames,
        new_tokens=new_tokens,
        max_new_tokens=max_new_tokens,
        queue=queue,
        decoders=decoders,
        api_key=None if api_key_file is None else _key(api_key_file),
        max_body=max_body,
        media=media,
    )
    with quiet_transformers():
        backend = _backend(
            _engine(engine, model, settings, device, attn, trust_remote_code),
            model,
            settings,
            batch_size,
            _options(engine_option),
            {"dtype": dtype, "device": device, "attn": attn, "trust_remote_code": trust_remote_code},
            not no_progress,
        )
        from tokensieve.bridges.openai_server import create_app

        app = create_app(backend, settings)
        if host not in _LOOPBACK and settings.api_key is None:
            note(f"anybody who reaches {host} can use this server; give --api-key-file to ask for a key.")
        _run(uvicorn, app, host, port, settings.model_name)


def _engine(
    wanted: str, model: str | None, settings: Any, device: str, attn: str | None, trust_remote_code: bool
) -> str:
    """The engine to use; with ``auto`` a note says why an installed vLLM is passed over."""
    from tokensieve.bridges.openai_server.engines import ENGINES, why_not_vllm
    from tokensieve.bridges.vllm.arguments import engine_version
    from tokensieve.load import read_config

    if wanted not in ENGINES:
        raise TokensieveError(f"There is no engine {wanted!r}; use {', '.join(ENGINES)}.")
    if wanted == "transformers":
        return wanted
    if model is None:
        reason: str | None = "The bundled model runs on transformers only."
    else:
        reason = why_not_vllm(settings, read_config(model, trust_remote_code), device, attn)
    if reason is None:
        return "vllm"
    if wanted == "vllm":
        raise TokensieveError(f"This server cannot run on vLLM: {reason}")
    if engine_version() is not None:
        note(f"running on transformers, not on vLLM: {reason}")
    return "transformers"


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """Arguments of an engine from ``name=value``; values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise TokensieveError(f"--engine-option takes name=value, not {pair!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _backend(
    engine: str,
    model: str | None,
    settings: Any,
    batch_size: int | None,
    options: dict[str, Any],
    loading: dict[str, Any],
    show: bool,
) -> Any:
    """The engine with its model loaded."""
    from tokensieve.cli import _common as common

    if engine == "vllm" and model is not None:
        from tokensieve.bridges.openai_server.vllm_backend import VllmBackend
        from tokensieve.load import _load_processor

        trust = loading["trust_remote_code"]
        arguments = {"dtype": loading["dtype"], "trust_remote_code": trust, **options}
        processor = _load_processor(model, trust)
        return VllmBackend(model, processor, settings.method, settings.retention, batch_size or 16, **arguments)
    if options:
        raise TokensieveError("--engine-option is for vLLM; this server runs on transformers.")
    from tokensieve.bridges.openai_server import TransformersBackend

    choices = [settings.choose(one, None)[2] for one in settings.methods]
    common.check_model(model, *choices, trust_remote_code=loading["trust_remote_code"])
    loaded = common.open_model(model, **loading, show=show)
    return TransformersBackend(loaded.model, loaded.processor, loaded.random_weights, batch_size or 4)


def _needed() -> Any:
    """The web server, or an error that says how to get it."""
    try:
        for package in ("fastapi", "prometheus_client"):
            importlib.import_module(package)
        return importlib.import_module("uvicorn")
    except ImportError as error:
        raise TokensieveError(
            f"The server needs the package {error.name}; install it with pip install 'tokensieve[serve]'."
        ) from error


def _key(path: Path) -> str:
    """The first line of a small file."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(4096).partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokensieveError(f"The API key file {path} cannot be read ({error}); check the path.") from error


def _run(uvicorn: Any, app: Any, host: str, port: int, name: str) -> None:
    """Listen until interrupted."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10, lifespan="on"
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise TokensieveError(
                f"The address {host}:{port} cannot be listened on ({error.strerror}); choose another --port."
            ) from error
        listener.listen(2048)
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {name} at http://{shown}:{listener.getsockname()[1]}/v1 (Ctrl-C ends).")
        # The web server finishes what it has begun and then raises the interrupt anew: a clean end.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
