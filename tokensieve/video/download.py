"""Fetching a video over http(s) without trusting the other side.

Bounded in bytes, time and redirects. Addresses that are not public are refused, and the check is made on
the very address that is connected to, on every hop, so that neither a redirect nor a changing name server can
lead into the local network.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, Any

from tokensieve.errors import VideoError

_CHUNK_BYTES = 1 << 16
# A server that trickles bytes never runs into the time limit of a single read.
_LONGEST_SECONDS = 3600.0
_PLAUSIBLE_TYPES = (
    "video/",
    "image/",
    "application/octet-stream",
    "binary/octet-stream",
    "application/mp4",
    "application/x-matroska",
    "application/ogg",
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"{", b"#EXTM3U")
_TRANSLATED_NETWORKS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class FetchLimits:
    """Bounds on what is fetched.

    Attributes
    ----------
    max_bytes : int
        Largest body, bytes (2 GiB).
    timeout : float
        Seconds to wait for the server at each step.
    max_redirects : int
        Most redirects to follow.
    allow_private : bool
        Whether loopback, private and other addresses that are not public may be connected to.
    """

    max_bytes: int = 2 << 30
    timeout: float = 30.0
    max_redirects: int = 5
    allow_private: bool = False


def public_label(url: str) -> str:
    """Shorten a URL for messages: no user, password, query or fragment, which may hold secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{host}{port}{parts.path}"


def download(url: str, target: IO[bytes], limits: FetchLimits) -> None:
    """Write the body of an http(s) URL to a file.

    Proxy settings of the environment are not used: behind a proxy the address could not be checked.

    Parameters
    ----------
    url : str
        Address with scheme http or https.
    target : binary file object
        Where the body goes.
    limits : FetchLimits
        Bounds.

    Raises
    ------
    VideoError
        If the server cannot be reached, answers with an error, sends something that is no video or image, or
        a bound is exceeded.
    """
    label = public_label(url)
    opener = urllib.request.OpenerDirector()
    for handler in (
        _HTTPHandler(limits.allow_private),
        _HTTPSHandler(limits.allow_private),
        _RedirectHandler(limits.max_redirects),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.username is not None or not parts.hostname:
            raise VideoError(f"{label} has no host or carries a password; use a URL without user name and password.")
        quoted = parts._replace(
            path=urllib.parse.quote(parts.path, safe="%/:=&~+!$,;'@()*"),
            query=urllib.parse.quote(parts.query, safe="%/:=&?~+!$,;'@()*[]"),
            fragment="",
        )
        request = urllib.request.Request(
            quoted.geturl(),
            headers={
                "User-Agent": "tokensieve",
                "Accept": "video/*, image/*, */*;q=0.1",
                "Accept-Encoding": "identity",
            },
        )
        with opener.open(request, timeout=limits.timeout) as response:
            _copy_body(label, response, target, limits)
    except urllib.error.HTTPError as error:
        error.close()
        raise VideoError(f"{label} answered {error.code} {error.reason}; check the URL.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        detail = str(reason) or type(reason).__name__
        raise VideoError(f"{label} could not be fetched ({detail}); check the URL and the network.") from error


def _copy_body(label: str, response: Any, target: IO[bytes], limits: FetchLimits) -> None:
    kind = (response.headers.get("Content-Type") or "").split(";")[0].strip().lower()
    if kind and not kind.startswith(_PLAUSIBLE_TYPES):
        raise VideoError(f"{label} sent {kind}, which is no video or image; give the address of the file itself.")
    encoding = (response.headers.get("Content-Encoding") or "identity").lower()
    if encoding != "identity":
        raise VideoError(f"{label} sent a body in encoding {encoding!r}; fetch the file yourself and give its path.")
    stated = response.headers.get("Content-Length") or ""
    expected = int(stated) if stated.isdecimal() else None
    too_large = f"{label} is larger than max_bytes={limits.max_bytes}; raise max_bytes to fetch it."
    if expected is not None and expected > limits.max_bytes:
        raise VideoError(too_large)
    started, size = time.monotonic(), 0
    # read1 returns what has arrived, so the clock is looked at even if the server trickles.
    while chunk := response.read1(_CHUNK_BYTES):
        if not size and chunk.lstrip()[:16].lower().startswith(tuple(mark.lower() for mark in _MARKUP)):
            raise VideoError(f"{label} sent text, not a video or image; give the address of the file itself.")
        size += len(chunk)
        if size > limits.max_bytes:
            raise VideoError(too_large)
        if time.monotonic() - started > _LONGEST_SECONDS:
            raise VideoError(f"{label} took longer than {_LONGEST_SECONDS:g} s; fetch the file yourself.")
        target.write(chunk)
    if expected is not None and size < expected:
        raise VideoError(f"{label} broke off after {size} of {expected} bytes; try again.")


def _connect(host: str, port: int, timeout: float, allow_private: bool) -> socket.socket:
    """Connect to a host after checking every address its name stands for."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not allow_private:
        for *_, address in found:
            if not _is_public(str(address[0])):
                raise VideoError(
                    f"{host} stands for {address[0]}, which is not a public address; "
                    "pass allow_private=True to allow it."
                )
    last: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            last = error
        except BaseException:
            connection.close()
            raise
    raise last or OSError(f"no address for {host}")


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address can lead to a private one.
        if address.sixtofour or address.teredo or any(address in network for network in _TRANSLATED_NETWORKS):
            return False
        if address.ipv4_mapped:
            address = address.ipv4_mapped
    return address.is_global and not address.is_multicast


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to a checked address."""

    def __init__(self, *args: Any, allow_private: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_private = allow_private

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, float(self.timeout or 30.0), self.allow_private)


class _TLSConnection(_Connection):
    """An HTTPS connection to a checked address; the certificate is verified against the name."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)


class _HTTPHandler(urllib.request.AbstractHTTPHandler):
    def __init__(self, allow_private: bool) -> None:
        super().__init__()
        self.connection = functools.partial(_Connection, allow_private=allow_private)

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self.connection, request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_


class _HTTPSHandler(urllib.request.AbstractHTTPHandler):
    def __init__(self, allow_private: bool) -> None:
        super().__init__()
        self.connection = functools.partial(_TLSConnection, allow_private=allow_private)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self.connection, request)

    https_request = urllib.request.AbstractHTTPHandler.do_request_


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects to http or https, never from https back to http."""

    def __init__(self, max_redirects: int) -> None:
        self.max_redirects = max_redirects
        self.hops = 0

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.hops += 1
        # The base class would otherwise read the body of the redirect, however long it is.
        fp.close()
        label = public_label(req.full_url)
        if self.hops > self.max_redirects:
            raise VideoError(f"{label} redirects more than {self.max_redirects} times; give the final URL.")
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise VideoError(
                f"{label} redirects to a {scheme or 'broken'} address, which is refused; give the final URL."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
