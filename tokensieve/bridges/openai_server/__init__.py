"""An OpenAI-compatible chat server with video input, whose visual tokens any method compresses."""

from tokensieve.bridges.openai_server.app import create_app
from tokensieve.bridges.openai_server.backend import Backend, Done, Event, Generation, Piece, Usage
from tokensieve.bridges.openai_server.settings import MediaLimits, ServerSettings
from tokensieve.bridges.openai_server.transformers_backend import TransformersBackend

__all__ = [
    "Backend",
    "Done",
    "Event",
    "Generation",
    "MediaLimits",
    "Piece",
    "ServerSettings",
    "TransformersBackend",
    "Usage",
    "create_app",
]
