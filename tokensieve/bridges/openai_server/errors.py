"""Errors as a client sees them: a status, and one sentence in OpenAI's format."""

from __future__ import annotations

from typing import Any

from tokensieve.errors import TokensieveError

__all__ = ["ApiError", "ClientGone"]

_LONGEST = 1000
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(TokensieveError):
    """A request that is answered with an error.

    Parameters
    ----------
    message
        One sentence.
    parameter
        Field of the request that is wrong.
    status
        HTTP status.
    headers
        Of the response.
    """

    def __init__(
        self, message: str, parameter: str | None = None, status: int = 400, headers: dict[str, str] | None = None
    ) -> None:
        # What requests contain is quoted in messages: not at any length, and only what can be sent.
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
        super().__init__(message.encode("utf-8", "replace").decode("utf-8"))
        self.parameter, self.status, self.headers = parameter, status, headers or {}

    def body(self) -> dict[str, Any]:
        """The response body."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.status}}


class ClientGone(Exception):
    """The client has closed the connection."""
