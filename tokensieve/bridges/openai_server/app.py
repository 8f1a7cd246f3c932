"""The routes of the server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from tokensieve.bridges.openai_server.backend import Backend
from tokensieve.bridges.openai_server.errors import ApiError
from tokensieve.bridges.openai_server.exchange import Exchange, Service, authorize
from tokensieve.bridges.openai_server.gate import Gate
from tokensieve.bridges.openai_server.metrics import Metrics
from tokensieve.bridges.openai_server.settings import ServerSettings

__all__ = ["create_app"]


def create_app(backend: Backend, settings: ServerSettings) -> FastAPI:
    """Build the server around a backend, which it starts and stops.

    Routes: ``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /health``, ``GET /metrics``. The API key, if
    there is one, guards the first two.

    Parameters
    ----------
    backend : Backend
        Answers the requests.
    settings : ServerSettings
        Limits and defaults.

    Returns
    -------
    FastAPI
        An ASGI application; run it with lifespan events.

    Raises
    ------
    TokensieveError
        If an offered method cannot run on the model.
    """
    for name in settings.methods:
        backend.check(settings.choose(name, None)[2])
    metrics, ahead = Metrics(), settings.decoded_ahead(backend.parallel)
    service = Service(
        backend,
        settings,
        metrics,
        Gate(backend.parallel + ahead, settings.queue - ahead, backend.parallel, metrics),
        ThreadPoolExecutor(settings.decoders, thread_name_prefix="tokensieve-decode"),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start()
        try:
            yield
        finally:
            backend.stop()
            service.decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="tokensieve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        return Exchange(service)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorize(request.headers, settings.api_key)
        offered = {
            "methods": list(settings.methods),
            "method": settings.method,
            "retention": settings.retention,
            "min_retention": settings.min_retention,
            "max_retention": settings.highest_retention,
            "frames": settings.frames,
            "max_frames": settings.max_frames,
            "max_new_tokens": settings.max_new_tokens,
            "random_weights": backend.random_weights,
            **backend.describe(),
        }
        model = {"id": settings.model_name, "object": "model", "created": started, "owned_by": "tokensieve"}
        return {"object": "list", "data": [{**model, "tokensieve": offered}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = backend.alive
        return JSONResponse({"status": "ok" if alive else "down", "backend": backend.name}, 200 if alive else 503)

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path} is not offered here ({error.detail})."
        return JSONResponse(ApiError(message, status=error.status_code).body(), error.status_code)

    return app
