"""How servers get a version of the policy: an adapter each under a new name, or all weights, file by file.

Both in files of rank 0, which servers read from a folder that they see too, or fetch over HTTP
(`vllm_adapter_transport`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from covo_rl.engines.base import EngineError
from covo_rl.engines.policy_files import AdapterFiles, WeightFiles
from covo_rl.engines.served_files import ServedFiles
from covo_rl.engines.server_calls import LOAD, UNLOAD, Server, Unanswered
from covo_rl.engines.server_probe import served_models

if TYPE_CHECKING:
    from covo_rl.config import EngineConfig
    from covo_rl.engines.vllm_server import VLLMServer
    from covo_rl.policy.trainable import Trainable

Files = TypeVar("Files", AdapterFiles, WeightFiles)


class Sender(Generic[Files]):
    """Where the files of rank 0 are for each server. `run` keeps two runs on the same servers apart.

    `rounding` is that of the last adapter; weights are sent as they are, or in the precision that was asked for.
    """

    rounding: float | None = None

    def __init__(self, engine: VLLMServer, files: Files, transport: str) -> None:
        self.engine, self.servers, self.files = engine, engine.servers, files
        self.serving: ServedFiles | None = None
        urls = [server.url for server in self.servers.all]

        def roots() -> dict[str, str]:
            if transport == "http":
                self.serving = ServedFiles(files.folder.path, self.servers.key, urls)
                return self.serving.roots
            return dict.fromkeys(urls, str(files.folder.path))

        try:
            self.roots, self.run = engine.from_main(lambda: (roots(), secrets.token_hex(4)))
        except EngineError:
            files.close()
            raise

    def place(self, path: Path, server: Server) -> str:
        """A file or folder as that server reaches it."""
        return f"{self.roots[server.url]}/{path.name}"

    def close(self) -> None:
        """Remove the files."""
        if self.serving is not None:
            self.serving.close()
        self.files.close()


class SentAdapters(Sender[AdapterFiles]):
    """LoRA. The two newest versions stay loaded: what was asked of the one before may still be at work."""

    def __init__(self, engine: VLLMServer, trainable: Trainable, config: EngineConfig, dtype: torch.dtype) -> None:
        files = AdapterFiles(trainable, config.vllm_adapter_dir, dtype=dtype)
        super().__init__(engine, files, config.vllm_adapter_transport)
        self.paths: dict[int, Path] = {}  # version -> where its adapter lies, newest last

    def name(self, version: int) -> str:
        """Under which a version is asked for."""
        return f"policy-{self.run}-{version}"

    def send(self, version: int) -> dict[str, float]:
        """Write the adapter and load it on every server that is up; seconds by phase. A collective."""
        start = time.perf_counter()
        self.paths[version], self.rounding = self.files.write(version), self.files.rounding
        written = time.perf_counter()
        self.engine.adopt(self.engine.from_main(partial(self._load_everywhere, version)))
        return {"save": written - start, "load": time.perf_counter() - written}

    def _load_everywhere(self, version: int) -> list[str]:
        """Rank 0: what is wrong with each server, "" where it is up with this version."""
        servers, asked = self.servers, self.servers.up
        load = partial(self.load, version=version)
        results = servers.together(lambda server: servers.insist(server, load), asked)
        refusals = [str(result) for result in results if isinstance(result, Unanswered) and result.status]
        if refusals and len(refusals) == len(asked):
            raise EngineError(
                f"no server takes the adapter: {'; '.join(refusals)}. Each must see {self.paths[version]} "
                "(vllm_adapter_dir), or have covo_rl's --middleware to fetch it (docs/rollouts.md), and have been "
                "started with --enable-lora, --max-lora-rank of lora_r or more, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        for server, result in zip(asked, results, strict=True):
            if isinstance(result, Unanswered):
                servers.take_down(server, server.life, str(result))
        servers.wait_for_one()
        return servers.problems

    def load(self, server: Server, version: int) -> None:
        """Have the server read the adapter of a version under its name. Raises Unanswered."""
        asked = {"lora_name": self.name(version), "lora_path": self.place(self.paths[version], server)}
        try:
            self.servers.call(server, LOAD, asked)
        except Unanswered as error:
            if error.status != 400 or "already been loaded" not in str(error):
                raise

    def restore(self, server: Server) -> None:
        """Bring a server that was away up to date. Raises Unanswered."""
        served = {str(card.get("id")) for card in served_models(self.servers, server)}
        if server.poisoned and served & {self.name(version) for version in self.paths}:
            raise Unanswered(server.problem)  # not restarted yet
        for version in list(self.paths):
            self.load(server, version)

    def release(self, keep: int = 2) -> None:
        """Forget all versions but the newest ones."""
        for version in list(self.paths)[: len(self.paths) - keep]:
            del self.paths[version]
            if self.engine.main:
                unload = partial(self.servers.call, path=UNLOAD, body={"lora_name": self.name(version)}, seconds=5)
                with suppress(EngineError):  # one that does not let us, or was restarted, has nothing to forget
                    self.servers.together(unload, self.servers.up)
            self.files.release(version)

    def close(self) -> None:
        self.release(keep=0)
        super().close()

    def confirm(self, server: Server) -> None:
        """The name in an answer has said which version it is of."""


class SentWeights(Sender[WeightFiles]):
    """Training without LoRA. A server that was away gets its weights with the next version."""

    def __init__(self, engine: VLLMServer, trainable: Trainable, config: EngineConfig, dtype: torch.dtype) -> None:
        files = WeightFiles(trainable, config.vllm_adapter_dir, dtype=dtype)
        super().__init__(engine, files, config.vllm_adapter_transport)
        self.problems: dict[str, str] = {}
        self.failure: EngineError | None = None

    def name(self, version: int) -> str:
        """The base model's, whose weights are replaced."""
        return self.engine.base

    def send(self, version: int) -> dict[str, float]:
        """Send every file to every server that answers; seconds by phase. A collective."""
        start, waited = time.perf_counter(), 0.0
        self.problems, self.failure, taking = {}, None, self.servers.all if self.engine.main else []
        taking = self._step(taking, "/health")
        taking = self._step(taking, "/start_weight_update", lambda server: {})
        for path in self.files.shards():
            begun = time.perf_counter()
            taking = self._step(
                taking,
                "/update_weights",
                lambda server, path=path: {"update_info": {"source": self.place(path, server)}},
            )
            waited += time.perf_counter() - begun
        begun = time.perf_counter()
        self.engine.adopt(self.engine.from_main(partial(self._finish, taking)))
        end = time.perf_counter()
        return {"save": begun - start - waited, "load": waited + end - begun}

    def _step(
        self, asked: Sequence[Server], path: str, body: Callable[[Server], Any] | None = None
    ) -> list[Server]:  # fmt: skip
        """Rank 0: those that answered. The other ranks are gathering weights: a failure waits for `_finish`."""
        try:
            results = self.servers.together(
                lambda server: self.servers.call(server, path, body and body(server)), asked
            )
        except EngineError as error:
            self.failure = error
            return []
        failed = {
            s.url: str(result) for s, result in zip(asked, results, strict=True) if isinstance(result, Unanswered)
        }
        self.problems |= failed
        return [server for server in asked if server.url not in failed]

    def _finish(self, taking: list[Server]) -> list[str]:
        """What vLLM 0.31 does not do by itself: forget what was computed with other weights."""
        taking = self._step(taking, "/finish_weight_update", lambda server: {"weight_version": self._label()})
        taking = self._step(taking, "/reset_encoder_cache", lambda server: {})
        taking = [server for server in taking if self._forgets_prompts(server)]
        if self.failure:
            raise self.failure
        if not taking:
            raise EngineError(
                f"no server takes the weights: {'; '.join(self.problems.values())}. Each must have covo_rl beside "
                "vLLM, and have been started as covo-rl rollout-server prints it: with VLLM_SERVER_DEV_MODE=1 and "
                """--weight-transfer-config '{"backend": "covo_rl_files"}'; and see vllm_adapter_dir, or fetch"""
            )
        for server in self.servers.all:
            if server not in taking:
                self.servers.take_down(server, server.life, self.problems[server.url])
            elif not server.up:
                self.servers.bring_up(server)
        return self.servers.problems

    def _forgets_prompts(self, server: Server) -> bool:
        try:
            forgot = self.servers.call_json(server, "/reset_prefix_cache", {}).get("success") is True
            self.problems[server.url] = f"{server.url} keeps prompts of older weights: it is still sampling"
        except Unanswered as error:
            forgot, self.problems[server.url] = False, str(error)
        return forgot

    def confirm(self, server: Server) -> None:
        """Its answer names no version, and a restarted server has its base again. Raises Unanswered."""
        label = self.servers.call_json(server, "/weight_info").get("weight_version")
        if label != self._label():
            raise Unanswered(f"{server.url} has weights {json.dumps(label)[:80]}, not {self._label()}", stale=True)

    def restore(self, server: Server) -> None:
        """It may only have been out of reach. Raises Unanswered: it waits for the next version."""
        self.confirm(server)

    def release(self) -> None:
        """There is one version alone."""

    def _label(self) -> str:
        return f"{self.run}-{self.engine.version}"
