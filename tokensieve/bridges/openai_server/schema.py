"""The body of ``POST /v1/chat/completions``, and answers in the same format."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokensieve.bridges.generation import Sampling
from tokensieve.bridges.openai_server.backend import Done, Usage
from tokensieve.bridges.openai_server.errors import ApiError
from tokensieve.bridges.openai_server.settings import ServerSettings

__all__ = ["AnswerFormat", "ChatBody", "MediaPart", "TextPart", "parse_body"]


class _Strict(BaseModel):
    """Numbers are numbers and texts are texts; fields that are not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Strict):
    """Text inside a message."""

    type: Literal["text"]
    text: str


class Address(_Strict):
    """Where a clip is."""

    url: Annotated[str, Field(min_length=1)]


class VideoPart(_Strict):
    """A video inside a message."""

    type: Literal["video_url"]
    video_url: Address


class ImagePart(_Strict):
    """A still image inside a message."""

    type: Literal["image_url"]
    image_url: Address


MediaPart = VideoPart | ImagePart
Part = Annotated[TextPart | VideoPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def parts(self) -> list[TextPart | VideoPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


class StreamOptions(_Strict):
    """What a stream should contain besides the text."""

    include_usage: bool = False


class ChatBody(_Strict):
    """A request; ``method``, ``retention``, ``frames``, ``fps`` and ``top_k`` are our own additions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    method: str | None = None
    retention: float | None = None
    frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0, le=240)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_unsupported(cls, data: Any) -> Any:
        """Refuse fields that would change the answer and are not supported; neutral values pass."""
        if not isinstance(data, dict):
            return data
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (1,),
            "logprobs": (False,),
            "top_logprobs": (0,),
            "tools": ([],),
            "functions": ([],),
            "tool_choice": ("none", "auto"),
            "frequency_penalty": (0,),
            "presence_penalty": (0,),
            "logit_bias": ({},),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "audio": (),
        }
        for name, allowed in neutral.items():
            if data.get(name) is not None and data[name] not in allowed:
                raise ValueError(f"{name} is not supported here, leave it out")
        return data

    @property
    def media(self) -> list[MediaPart]:
        """All clips in order."""
        parts = [part for message in self.messages for part in message.parts]
        return [part for part in parts if not isinstance(part, TextPart)]

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, settings: ServerSettings) -> Sampling:
        """How to generate, within the server's limits.

        Raises
        ------
        ApiError
            For more tokens, frames or stops than offered.
        """
        wanted = self.max_completion_tokens or self.max_tokens
        if wanted is not None and wanted > settings.max_new_tokens:
            raise ApiError(f"max_tokens may be at most {settings.max_new_tokens} here, not {wanted}.", "max_tokens")
        if len(self.stops) > 4 or any(not 1 <= len(text) <= 256 for text in self.stops):
            raise ApiError("stop takes up to 4 texts of 1 to 256 characters.", "stop")
        return Sampling(
            max_new_tokens=wanted or settings.new_tokens,
            temperature=self.temperature or 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**63,
            stop=self.stops,
        )


def parse_body(body: bytes) -> ChatBody:
    """Read a request body.

    Raises
    ------
    ApiError
        With status 400 and one sentence on the first thing that is wrong.
    """
    try:
        return ChatBody.model_validate(json.loads(body))
    except ValidationError as error:
        # Of the readings of a field that may be of several kinds, the one that went furthest is what was meant.
        first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
        place = ".".join(str(step) for step in first["loc"] if not str(step).startswith(("str", "list[")))
        reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        raise ApiError(f"{place}: {reason}." if place else f"{reason}.", place or None) from error
    except RecursionError as error:
        raise ApiError("The body is nested too deeply; send a chat completion request.") from error
    except ValueError as error:
        raise ApiError(f"The body is no JSON ({error}); send a chat completion request.") from error


@dataclass
class AnswerFormat:
    """Builds the parts of one response.

    Attributes
    ----------
    identity
        Of the response.
    model
        Name that was asked for.
    method, retention
        What runs.
    """

    identity: str
    model: str
    method: str
    retention: float
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, done: Done, seconds: dict[str, float]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        message = {"role": "assistant", "content": text}
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": done.reason}],
            "usage": self.usage(done.usage),
            "tokensieve": self.account(done.usage, seconds),
        }

    def chunk(self, delta: dict[str, str], reason: str | None = None, **more: Any) -> bytes:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self.event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that only carries the usage."""
        return self.event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(usage)})

    @staticmethod
    def event(data: dict[str, Any]) -> bytes:
        """Data as a server-sent event."""
        return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    @staticmethod
    def usage(usage: Usage) -> dict[str, int]:
        """Tokens as OpenAI counts them; the prompt counts what entered the language model."""
        prompt, new = usage.tokens.prompt, usage.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def account(self, usage: Usage, seconds: dict[str, float]) -> dict[str, Any]:
        """Our own addition: what was compressed and where the time went."""
        return {
            "method": self.method,
            "retention": self.retention,
            **usage.tokens.to_dict(),
            "seconds": {name: round(value, 6) for name, value in (seconds | usage.seconds).items()},
            "notes": usage.notes,
            **({} if usage.batch is None else {"batch": usage.batch}),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}
