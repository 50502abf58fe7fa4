"""A judge's address and key, clips as it is sent them, and one POST to one origin within a total time.

A socket's own time-out starts anew with every byte, so a server that drips would be read for ever: a timer cuts the
connection. A redirect is followed within the origin (scheme, host and port) only: what is sent, the key among it, goes
nowhere else.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np

from covo_rl.audio import AudioError, decode, resample
from covo_rl.rewards.call import shown
from covo_rl.rewards.specs import RewardError
from covo_rl.types import Clip

KEY_VARIABLES = ("COVO_RL_JUDGE_KEY", "OPENAI_API_KEY")
MAX_SECONDS = 86_400.0  # what a timer and a socket can take
HINTS: dict[int, str] = dict.fromkeys((401, 403), f"; is the key in {' or '.join(KEY_VARIABLES)} the right one?")
HINTS |= {404: "; is the address right (most end in /v1), and is that the model's name at the server?"}
MAX_BYTES = 1_000_000  # of a response
AUDIO_RATE = 16_000  # Hz, of clips for a judge
MAX_AUDIO = 20_000_000  # bytes of base64 in one request
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 307, 308)  # to be repeated as they are


def judge_key() -> str:
    """The endpoint's key from the environment, without white space around it; "" if there is none.

    Raises:
        RewardError: no header can hold it; the message does not show it.
    """
    for name in KEY_VARIABLES:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise RewardError(f"{name}: holds line breaks, spaces or other characters that a key cannot have")
            return key
    return ""


def env_limit(name: str, default: float) -> float:
    """Raises RewardError: the variable holds no number that a timer and a socket can take."""
    text = os.environ.get(name) or str(default)
    with suppress(ValueError):
        if 0 < float(text) <= MAX_SECONDS:
            return float(text)
    raise RewardError(f"{name} is {text!r}: write a number above 0 and up to {MAX_SECONDS:g}")


def check_address(url: str) -> None:
    """Raises RewardError unless it is the plain http(s) address of a host: it stands in records, so no secret may."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError as error:
        raise RewardError(f"judge address {hidden(url)!r}: {hidden(str(error))}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(f"judge address {hidden(url)!r}: must start with http:// or https:// and name a host")
    if not url.isprintable() or " " in url:
        raise RewardError(f"judge address {hidden(url)!r}: holds spaces or other characters that no address has")
    if not plain or "@" in url:
        raise RewardError(
            f"judge address {hidden(url)!r}: holds a user, password or query, which would stand in every record: "
            f"write the address alone, and put the key into {KEY_VARIABLES[0]}"
        )


def hidden(spec: str) -> str:
    """A judge's spec or address for a message: without what stands before an @ in it, or after a ?."""
    return re.sub(r"[?#].*", "?***", re.sub(r"//.*@", "//***@", spec, flags=re.DOTALL), flags=re.DOTALL)


def audio_parts(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Clips as the `input_audio` parts of an OpenAI-style message.

    Raises:
        AudioError: a clip cannot be decoded, or they are longer than MAX_AUDIO.
    """
    sounds = [base64_wav(clip) for clip in clips]
    if (size := sum(map(len, sounds))) > MAX_AUDIO:
        names, minutes = ", ".join(clip.name for clip in clips), MAX_AUDIO * 3 / 4 / 2 / AUDIO_RATE / 60
        raise AudioError(
            f"{names}: {size / 1e6:.1f} MB as base64 of a {AUDIO_RATE} Hz wav; a judge is sent at most "
            f"{MAX_AUDIO / 1e6:g} MB (about {minutes:.0f} minutes): shorten the clips, or leave judge_audio out"
        )
    return [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}} for sound in sounds]


def base64_wav(clip: Clip) -> str:
    """The clip as a wav file, mono, 16 bits, AUDIO_RATE Hz. Raises AudioError: it cannot be decoded."""
    waveform, rate = decode(clip)
    samples = np.clip(np.rint(resample(waveform, rate, AUDIO_RATE) * 32_767), -32_768, 32_767).astype("<i2")
    with io.BytesIO() as file:
        with wave.open(file, "wb") as wav:
            wav.setparams((1, 2, AUDIO_RATE, 0, "NONE", ""))
            wav.writeframes(samples.tobytes())
        return base64.b64encode(file.getvalue()).decode()


class OriginError(OSError):
    """The server redirects to another origin."""


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port) of a URL. Raises ValueError: it has none that can be read."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def post(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> bytes:
    """The response's body.

    Raises:
        TimeoutError: it was not there after so many seconds in total.
        OriginError: a redirect to another origin.
        ValueError: it is longer than MAX_BYTES.
        urllib.error.HTTPError, OSError, http.client.HTTPException: any other failure.
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
        content = _follow(_opener(late, sockets, direct), url, body, headers, seconds)
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
    opener: urllib.request.OpenerDirector, url: str, body: bytes, headers: Mapping[str, str], seconds: float
) -> bytes:
    start = urlsplit(url)
    for _ in range(MAX_REDIRECTS + 1):
        request = urllib.request.Request(url, body, dict(headers), method="POST")
        try:
            with opener.open(request, timeout=seconds) as response:
                content = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            with suppress(OSError, http.client.HTTPException):
                error.msg = (message_in(error.read(10_000)) or error.msg) + HINTS.get(error.code, "")
            error.close()
            target = urljoin(url, error.headers.get("Location") or "")
            if error.code not in REDIRECTS or target == url:
                raise
            if origin(target) != origin(url):
                scheme, host, port = origin(target)
                raise OriginError(
                    f"HTTP {error.code} to another origin, {f'{scheme}://{host}:{port}'[:100]!r}: if that is the right "
                    "one, write it into the judge's address"
                ) from None
            url = urlsplit(target)._replace(scheme=start.scheme, netloc=start.netloc, fragment="").geturl()
            continue
        if len(content) > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes")
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
