"""The report of a run that goes on, at an address of this machine alone: `covo-rl watch RUN --page`.

    /         a frame that asks for the version every few seconds, and loads the report anew where it changed
    /version  the version, and a line on how far the run is
    /report   leads to the report, whose address is its path, so that its links to sounds lead to these, and to no
              other file

A page of another site may not read it: the server listens on 127.0.0.1, and answers requests to that name only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
import traceback
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from covo_rl.data.terminal import say
from covo_rl.records.console import clock
from covo_rl.records.follow import RunFollower
from covo_rl.run.report.page import render
from covo_rl.run.report.payload import report_payload
from covo_rl.types import UserError, visible

HOST = "127.0.0.1"
FRAME = Path(__file__).with_name("watch.html")
#: the report's text, and the files that it links: address -> file
Report = tuple[str, Mapping[str, Path]]
#: MB of a page that is sent again and again
MAX_MB = 6.0
#: a report that took a second to make is not made again for so many: the run needs the processors too
REST = 10.0
#: where one of these changes, the report does
SOURCES = ("metrics.jsonl", "result.json", "config.yaml", "before.json")


class PortTaken(UserError, OSError):
    """The address cannot be had."""


def report_of(folders: Sequence[Path]) -> Report:
    """The report of run folders, and the sounds beside it."""
    page = folders[0] / "report.html"  # where its links are counted from
    payload = report_payload(folders, page=page, max_mb=MAX_MB, sounds="none")  # they are played from their files
    return render(payload), linked_files(payload, page)


class LiveReport:
    """The report of `folders`, made anew by `build`, aside, where a run went on since the last time."""

    def __init__(self, folders: Sequence[Path], build: Callable[[Sequence[Path]], Report] = report_of) -> None:
        self.folders, self.build = list(folders), build
        self.page = self.folders[0] / "report.html"
        self.address = address_of(self.page)
        self.followers = [RunFollower(folder) for folder in folders]
        self._reading, self._making = threading.Lock(), threading.Lock()
        self._made: tuple[str, Report] | None = None
        self._rest = 0.0

    def version(self) -> str:
        """Of the report that can be had now, "" before the first; where a file of a run is another, the next one is
        begun, but for a while after one that took long."""
        version = self._made[0] if self._made else ""
        if version != self._state() and time.monotonic() >= self._rest and not self._making.locked():
            threading.Thread(target=self._make, daemon=True).start()
        return version

    def report(self) -> Report:
        """The last one, or the first."""
        if self._made is None:
            self._make()
        assert self._made is not None
        return self._made[1]

    def line(self) -> str:
        """How far the runs are."""
        lines = []
        with self._reading:
            for run in self.followers:
                run.read()
                left = "" if run.seconds_left is None else f", {clock(run.seconds_left)} left"
                lines.append(f"{run.folder}: step {run.step}/{run.total or '?'}, {run.status}{left}")
        return visible("; ".join(lines))

    def _make(self) -> None:
        with self._making:
            if self._made is not None and self._made[0] == self._state():
                return
            state, start = self._state(), time.monotonic()
            try:
                self._made = state, self.build(self.folders)
            finally:
                end = time.monotonic()
                self._rest = end + REST * (end - start)

    def _state(self) -> str:
        """Another text where a file of a run is another."""
        states = []
        for path in (folder / name for folder in self.folders for name in SOURCES):
            try:
                status = path.stat()
                states.append((str(path), status.st_mtime_ns, status.st_size))
            except OSError:
                states.append((str(path), 0, 0))
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


class Handler(BaseHTTPRequestHandler):
    """GET of the addresses above."""

    server: PageServer
    server_version, sys_version, timeout = "covo-rl", "", 30

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        path = urlsplit(self.path).path
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.FORBIDDEN, b"this page answers to its own address only", "text/plain")
        elif path == "/":
            self._answer(HTTPStatus.OK, FRAME.read_bytes(), "text/html; charset=utf-8")
        elif path == "/version":
            state = {"version": self.server.live.version(), "line": self.server.live.line()}
            self._answer(HTTPStatus.OK, json.dumps(state).encode(), "application/json")
        elif path == "/report":
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", self.server.live.address)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path == self.server.live.address:
            self._answer(HTTPStatus.OK, self.server.live.report()[0].encode(), "text/html; charset=utf-8")
        elif (file := self.server.live.report()[1].get(path)) is not None and file.is_file():
            self._answer(HTTPStatus.OK, file.read_bytes(), guess_type(file.name)[0] or "application/octet-stream")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is nothing here", "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        """The whole body, or the range of it that a player asks for."""
        start, end = 0, len(body)
        if status is HTTPStatus.OK and (wanted := _range(self.headers.get("Range", ""), len(body))):
            (start, end), status = wanted, HTTPStatus.PARTIAL_CONTENT
        self.send_response(status)
        if status is HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        headers = {"Content-Type": kind, "Content-Length": end - start, "Accept-Ranges": "bytes",
                   "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                   "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "SAMEORIGIN",
                   "Referrer-Policy": "no-referrer"}  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[start:end])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line every few seconds tells nobody anything."""


class PageServer(ThreadingHTTPServer):
    """Serves a report at 127.0.0.1; `port` 0 takes a free one.

    Raises:
        PortTaken: another process has the port.
    """

    daemon_threads = True
    request_queue_size = 64  # a browser asks for all sounds of a group at once

    def __init__(self, live: LiveReport, port: int = 0) -> None:
        self.live = live
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise PortTaken(f"port {port} cannot be had ({error}): give another --port, or none") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error; anything else is shown, and the next request answered."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            say("".join(traceback.format_exception(error)).rstrip(), err=True)


def serve_page(folders: Sequence[Path], *, port: int = 0, browser: bool = False) -> None:
    """Serve until Ctrl-C."""
    with PageServer(LiveReport(folders), port) as server:
        say(f"{' and '.join(map(str, folders))} at {server.url}   (Ctrl-C ends it)")
        if browser and not webbrowser.open(server.url):
            say("no browser could be opened", err=True)
        server.serve_forever(poll_interval=0.2)


def address_of(page: Path) -> str:
    """The path of a file as an address of the server: as deep as the file lies, so that no link leads above it."""
    return "/at" + quote(os.fsencode(os.path.abspath(page)))


def linked_files(payload: Mapping[str, Any], page: Path) -> dict[str, Path]:
    """Address -> file, for every sound of a payload that its page, the file `page`, links."""
    hrefs = [clip["href"] for clip in payload["clips"].values() if clip.get("href")]
    base = f"http://host{address_of(page)}"
    return {urlsplit(urljoin(base, href)).path: page.parent / unquote(href) for href in hrefs}


def _range(header: str, size: int) -> tuple[int, int] | None:
    """`bytes=2-` of 10 -> (2, 10): one range that lies in the file, or None for all of it."""
    unit, _, span = header.partition("=")
    first, dash, last = span.partition("-")
    if unit != "bytes" or not dash or not first.isdigit() or (last and not last.isdigit()):
        return None
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None
