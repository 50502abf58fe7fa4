"""Rank 0's files over HTTP, for servers that share no folder with it.

Every request needs the key of the servers (VLLM_API_KEY): both sides know it, and it is in no address. On the servers'
side the files are fetched by covo_rl/serve/gate.py and covo_rl/serve/weights.py.
"""

from __future__ import annotations

import hmac
import shutil
import socket
import threading
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from covo_rl.engines.base import EngineError

SUFFIXES = (".safetensors", ".json")
IDLE_SECONDS = 60  # of a connection


class ServedFiles:
    """Serves what lies below `folder` until `close`. `roots`: its address as each of `servers` (URLs) reaches it."""

    def __init__(self, folder: Path, key: str, servers: Sequence[str]) -> None:
        if not key:
            raise EngineError("vllm_adapter_transport http needs VLLM_API_KEY, here and at the servers: without it "
                              "anybody could fetch the policy")  # fmt: skip
        ways = {url: _address_towards(url) for url in servers}
        self._server = _Server((ways[servers[0]] if len({*ways.values()}) == 1 else "", 0), folder, key)
        self.roots = {url: f"http://{address}:{self._server.server_port}" for url, address in ways.items()}
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, name="covo-rl-files", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def _address_towards(url: str) -> str:
    """This machine's IPv4 address on the way to a server; nothing is sent."""
    parts = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))
            return probe.getsockname()[0]
    except OSError as error:
        raise EngineError(f"no way from this machine to {parts.hostname!r}: {error}") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path, key: str) -> None:
        super().__init__(address, _Handler)
        self.folder, self.expected = folder.resolve(), f"Bearer {key}".encode()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """A file below the folder."""
        if not hmac.compare_digest(self.headers.get("Authorization", "").encode(), self.server.expected):
            return self.send_error(401)
        name = unquote(self.path).lstrip("/").replace("\0", "/")  # no path holds that
        path = (self.server.folder / name).resolve()
        if not (path.is_relative_to(self.server.folder) and path.suffix in SUFFIXES and path.is_file()):
            return self.send_error(404)
        with open(path, "rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)
        return None

    def log_message(self, *_: Any) -> None:
        """Say nothing: addresses of requests are anybody's text."""
