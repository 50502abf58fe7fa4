"""A gate before vLLM's server: the key is wanted everywhere, and adapters may come from the trainer over HTTP.

    VLLM_API_KEY=... vllm serve BASE --enable-lora --middleware covo_rl.serve.gate.Gate

vLLM 0.31 asks for the key under /v1, /v2 and /inference alone: what VLLM_SERVER_DEV_MODE opens (/collective_rpc,
/update_weights, /sleep, the resets) is anybody's. Of `/v1/load_lora_adapter` a `lora_path` that is an http address is
fetched first, and vLLM is given the folder.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import shutil
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from covo_rl.engines.server_calls import KEY_VARIABLE, LOAD, UNLOAD
from covo_rl.serve.fetch import ADAPTER, FetchError, fetched, is_address

Message = MutableMapping[str, Any]
OPEN = ("/health", "/ping", "/version", "/metrics")
MAX_BODY = 1_000_000  # bytes of a request that loads or unloads


class Gate:
    """ASGI middleware. Fetched adapters stay until they are unloaded: vLLM reads them again after an eviction."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.folders: dict[str, Path] = {}

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN:
            return await self.app(scope, receive, send)
        if self.key and not self._authorised(scope):
            return await _answer(send, 401, f"the key of {KEY_VARIABLE} is wanted")
        if scope["method"] != "POST" or path not in (LOAD, UNLOAD):
            return await self.app(scope, receive, send)
        body = await _body(receive)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            return await _answer(send, 400, f"expected a JSON object of at most {MAX_BODY} bytes")
        act = self._load if path == LOAD else self._unload
        return await act(scope, content, receive, send)

    def _authorised(self, scope: Message) -> bool:
        headers = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return any(hmac.compare_digest(value, f"Bearer {self.key}".encode()) for value in headers)

    async def _load(self, scope: Message, content: dict[str, Any], receive: Callable, send: Callable) -> None:
        folder = None
        if is_address(content.get("lora_path")):
            try:
                folder = await asyncio.to_thread(fetched, content["lora_path"], ADAPTER)
            except FetchError as error:
                return await _answer(send, 502, str(error))
            content["lora_path"] = str(folder)
        try:
            if await self._pass_on(scope, content, receive, send) == 200 and folder:
                self._forget(content["lora_name"])
                self.folders[content["lora_name"]], folder = folder, None
        finally:
            if folder:  # refused, or the client has gone
                shutil.rmtree(folder)
        return None

    async def _unload(self, scope: Message, content: dict[str, Any], receive: Callable, send: Callable) -> None:
        if await self._pass_on(scope, content, receive, send) == 200:
            self._forget(content["lora_name"])

    def _forget(self, name: str) -> None:
        if folder := self.folders.pop(name, None):
            shutil.rmtree(folder)

    async def _pass_on(self, scope: Message, content: dict[str, Any], receive: Callable, send: Callable) -> int:
        """Hand the request to vLLM with this content; returns the status of its answer."""
        body, statuses = json.dumps(content).encode(), [0]
        first = iter([{"type": "http.request", "body": body, "more_body": False}])
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]

        async def rewritten() -> Message:
            return next(first, None) or await receive()

        async def noted(message: Message) -> None:
            statuses.append(message.get("status", statuses[-1]))
            await send(message)

        await self.app({**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}, rewritten, noted)
        return statuses[-1]


async def _body(receive: Callable) -> bytes:
    """The request's body; empty where it is longer than MAX_BODY, or the client has gone."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if message["type"] == "http.disconnect" or len(body) > MAX_BODY:
            return b""
    return body


async def _answer(send: Callable, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
