"""Errors a user can meet. Each message is one sentence: what was wrong, with which value, and what to do."""

from __future__ import annotations


class TokensieveError(Exception):
    """Base of every error that tokensieve raises on purpose; the command line prints its text and exits with 2."""


class VideoError(TokensieveError):
    """A video, image or URL cannot be read, or gives no frame."""


class MethodError(TokensieveError):
    """A method is unknown, has a bad option, or cannot run on the sample it was given."""


class HostError(TokensieveError):
    """A model is not a supported video LLM, or its prompt does not match its visual features."""


class SignalError(HostError):
    """A method needs a signal that the host cannot give."""


class RetentionError(MethodError):
    """A retention outside (0, 1]."""


class BenchError(TokensieveError):
    """A benchmark's dataset, arguments or journal cannot be used."""
