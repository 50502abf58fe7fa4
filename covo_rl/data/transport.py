"""One HTTP exchange with one origin within a total time, by the standard library.

A socket's own time-out starts anew with every byte, so a server that drips would be read for ever: a timer cuts the
connection. A redirect is followed within the origin (scheme, host and port) only: what is sent, the key among it, goes
nowhere else.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import urljoin, urlsplit

from covo_rl.types import shown

MAX_SECONDS = 86_400.0  # what a timer and a socket can take
MAX_BYTES = 1_000_000  # of a response
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 307, 308)  # to be repeated as they are


def address_problem(url: str) -> str:
    """Why it is not the plain http(s) address of a host, or "": it stands in records, so no secret may."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError as error:
        return hidden(str(error))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must start with http:// or https:// and name a host"
    if not url.isprintable() or " " in url:
        return "holds spaces or other characters that no address has"
    if not plain or "@" in url:
        return "holds a user, password or query, which would stand in every record: write the address alone"
    return ""


def key_in(text: str, name: str) -> str:
    """A bearer key without white space around it. Raises ValueError, which does not show it: no header can hold it."""
    key = text.strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{name}: holds line breaks, spaces or other characters that a key cannot have")
    return key


def hidden(spec: str) -> str:
    """An address, or what holds one, for a message: without what stands before an @ in it, or after a ?."""
    return re.sub(r"[?#].*", "?***", re.sub(r"//.*@", "//***@", spec, flags=re.DOTALL), flags=re.DOTALL)


class OriginError(OSError):
    """The server redirects to another origin."""


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port) of a URL. Raises ValueError: it has none that can be read."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def exchange(url: str, body: bytes | None, headers: Mapping[str, str], seconds: float, limit: int = MAX_BYTES) -> bytes:
    """The body of the response to a POST of `body`, or to a GET without one.

    Raises:
        TimeoutError: it was not there after so many seconds in total.
        OriginError: a redirect to another origin.
        ValueError: it is longer than `limit` bytes.
        urllib.error.HTTPError: an error, whose `msg` is what the server says is wrong.
        OSError, http.client.HTTPException: any other failure.
    """
    late, sockets, seconds = threading.Event(), [], min(seconds, MAX_SECONDS)

    def cut() -> None:
        late.set()
        for one in sockets:
            with suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # of the connection, under whatever TLS thinks of it

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        direct = local(origin(url)[1])
        content = _follow(_opener(late, sockets, direct), url, body, headers, seconds, limit)
    except (OSError, http.client.HTTPException, ValueError):
        if late.is_set():
            raise TimeoutError(f"timed out after {seconds:.3g} s") from None
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"timed out after {seconds:.3g} s")
    return content


def _follow(
    opener: urllib.request.OpenerDirector, url: str, body: bytes | None, headers: Mapping[str, str], seconds: float,
    limit: int,
) -> bytes:  # fmt: skip
    start = urlsplit(url)
    for _ in range(MAX_REDIRECTS + 1):
        request = urllib.request.Request(url, body, dict(headers))
        try:
            with opener.open(request, timeout=seconds) as response:
                content = response.read(limit + 1)
        except urllib.error.HTTPError as error:
            with suppress(OSError, http.client.HTTPException):
                error.msg = message_in(error.read(10_000)) or error.msg
            error.close()
            target = urljoin(url, error.headers.get("Location") or "")
            if error.code not in REDIRECTS or target == url:
                raise
            if origin(target) != origin(url):
                scheme, host, port = origin(target)
                raise OriginError(
                    f"HTTP {error.code} to another origin, {f'{scheme}://{host}:{port}'[:100]!r}: if that is the right "
                    "one, write it into the address"
                ) from None
            url = urlsplit(target)._replace(scheme=start.scheme, netloc=start.netloc, fragment="").geturl()
            continue
        if len(content) > limit:
            raise ValueError(f"longer than {limit} bytes")
        return content
    raise OriginError(f"more than {MAX_REDIRECTS} redirects")


def message_in(content: bytes) -> str:
    """What a server says is wrong, as OpenAI-compatible ones write it; "" if it says nothing that can be read."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message", "detail"):
        value = value[name] if isinstance(value, dict) and name in value else value
    return shown(value) if isinstance(value, str) else ""


def local(host: str) -> bool:
    """This machine, which is never asked through a proxy."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(late: threading.Event, sockets: list[socket.socket], direct: bool) -> urllib.request.OpenerDirector:
    """Opens connections whose sockets are listed as soon as they are there, through proxies or `direct`."""

    def listed(kind: Callable[..., http.client.HTTPConnection]) -> Any:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            made = kind(host, **options)
            connect = made.connect

            def connect_and_list() -> None:
                connect()
                sockets.append(made.sock)
                if late.is_set():
                    raise TimeoutError

            made.connect = connect_and_list
            return made

        return connection

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(listed(http.client.HTTPConnection), req)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(listed(http.client.HTTPSConnection), req, context=_certificates())

    proxies = urllib.request.ProxyHandler({} if direct else None)
    return urllib.request.build_opener(_NoRedirect, Plain, Secure, proxies)


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()
