"""Rollouts from stock `vllm serve` processes: token ids and clips in, token ids and log-probs out, over HTTP.

A group is one request to one server. Every version of the policy has an adapter name of its own, so that neither
prefix cache nor a server that was left behind can answer with another one's weights; the answer says the name again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from covo_rl.config import server_urls
from covo_rl.engines.base import EngineError, Failed, Pending, SyncReport, TextDecoder, check_groups
from covo_rl.engines.draws import prompt_seeds
from covo_rl.engines.probe import Probe
from covo_rl.engines.server_calls import Server, Unanswered, Workers
from covo_rl.engines.server_probe import AllServers, served_base
from covo_rl.engines.server_weights import SentAdapters, SentWeights
from covo_rl.engines.servers import RequestFailed, Servers
from covo_rl.engines.vllm_requests import (
    GENERATE,
    clip_uuid,
    clip_waveform,
    data_uri,
    group_of,
    prompt_ids,
    read_answer,
    sampling_fields,
)
from covo_rl.policy.sharding import every_rank
from covo_rl.types import Group, Prompt, shown, visible

if TYPE_CHECKING:
    from covo_rl.config import Options, RolloutConfig
    from covo_rl.policy.policy import Policy
    from covo_rl.policy.trainable import Trainable

T = TypeVar("T")

CONCURRENCY = 64  # requests of one rank at a time; a group each
COUNTERS = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:mm_cache_queries", "vllm:mm_cache_hits")


class VLLMServer:
    """An engine on servers that `options.engine` names. Rank r asks server r modulo their number first.

    `trainable` None serves the base model. `max_model_len`: positions that the servers must have room for;
    `probe_prompt` has a clip. Made, synced and closed by all ranks together.

    Raises:
        EngineError: a server does not answer, is of another version or too small, or does not run the policy.
    """

    name = "vllm_server"
    exact = False
    failed: Sequence[Failed] = ()

    def __init__(
        self, policy: Policy, trainable: Trainable | None, options: Options, *, max_model_len: int,
        probe_prompt: Prompt, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        engine = options.engine
        self.policy, self.main = policy, rank == 0
        self.decoder = TextDecoder(policy.family)
        self.servers = Servers(
            server_urls(engine), self._restore, first=rank, timeout=engine.vllm_server_timeout,
            patience=engine.engine_patience,
        )  # fmt: skip
        self.base = self.from_main(lambda: served_base(self.servers, max_model_len))
        self.sender: SentAdapters | SentWeights | None = None
        if trainable is not None:
            kind = SentWeights if trainable.peft_model is None else SentAdapters
            self.sender = kind(self, trainable, engine, policy.family.embed_tokens.weight.dtype)
        self.version = 0
        self.workers = Workers(CONCURRENCY)
        self.probe = Probe(policy, probe_prompt, engine.engine_probe_tolerance)
        self.everyone = AllServers(self)
        self.seconds: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.counts: dict[str, dict[str, float]] = {}  # of a server, at the last look
        if self.sender is not None:
            self.probe.check_random(self)
        self.sync(0)
        if self.main:
            self._rates()  # what they have counted so far is of other runs

    # -- weights ---------------------------------------------------------------------------------------------------

    def sync(self, version: int) -> SyncReport:
        """Send this version to every server that is up, and see that they run it."""
        self.version, self.everyone.group = version, None
        seconds = self.sender.send(version) if self.sender else {}
        difference = self.probe.check(self.everyone, version)
        if self.sender:
            self.sender.release()
        return SyncReport(version, seconds, difference, self.sender.rounding if self.sender else None)

    def adopt(self, problems: Sequence[str]) -> None:
        """What rank 0 knows of the servers."""
        for server, problem in zip(self.servers.all, problems, strict=True):
            if problem:
                self.servers.take_down(server, server.life, problem)
            elif not server.up and not server.poisoned:  # that this rank alone may know
                self.servers.bring_up(server)

    def _restore(self, server: Server) -> None:
        """Bring a server that was away up to date, and compare it with the others."""
        if self.sender:
            self.sender.restore(server)
        self.everyone.compare(server)

    def model(self, version: int) -> str:
        """The name under which a version is served; what is sent nothing is the base."""
        return self.sender.name(version) if self.sender else self.base

    def from_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, everywhere; what it raises, too."""
        value: Any = None
        failure: EngineError | None = None
        if self.main:
            try:
                value = action()
            except EngineError as error:
                failure, error.everywhere = error, True
        value, failure = every_rank((value, failure))[0]
        if failure is not None:
            raise failure
        return value

    # -- rollouts --------------------------------------------------------------------------------------------------

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        requests = [
            partial(self._answered, prompt, config, number, generations, greedy, self.version)
            for prompt, number in zip(prompts, prompt_seeds(prompts, seed), strict=True)
        ]
        return Pending(tuple(prompts), generations, self.version, self.workers.submit(requests))

    def collect(self, pending: Pending) -> list[Group]:
        start, groups, failed = time.perf_counter(), [], []
        for prompt, future in zip(pending.prompts, pending.work, strict=True):
            try:
                groups.append(future.result())
            except RequestFailed as error:
                failed.append(Failed(prompt.example.id, str(error)))
        self.failed, self.seconds = failed, {"wait": time.perf_counter() - start}
        self.rates = self._rates() if self.main else {}
        check_groups(groups, pending, self.policy.family, failed=failed)
        return groups

    def _answered(
        self, prompt: Prompt, config: RolloutConfig, seed: int, generations: int, greedy: bool, version: int
    ) -> Group:
        body = self.request(prompt, config, seed, generations, greedy, version)
        return self.servers.ask(lambda server: self.group(server, prompt, body, generations, version))

    def request(
        self, prompt: Prompt, config: RolloutConfig, seed: int, generations: int, greedy: bool, version: int
    ) -> dict[str, Any]:
        """The body of a request, but for the model's name."""
        family, store = self.policy.family, self.policy.store
        assert store.clips is not None
        parts = [
            {"type": "audio_url", "url": data_uri(*clip_waveform(key, store.clips, family)),
             "uuid": clip_uuid(key, None if store.frozen else version)}
            for key in prompt.clip_keys
        ]  # fmt: skip
        fields = sampling_fields(config, family, generations=generations, seed=seed, greedy=greedy)
        return {"token_ids": prompt_ids(prompt, family), "content_parts": parts or None, "sampling_params": fields,
                "return_token_ids": True}  # fmt: skip

    def group(self, server: Server, prompt: Prompt, body: dict[str, Any], generations: int, version: int) -> Group:
        """One server's answer.

        Raises:
            Unanswered: there is none, or it is another version's, which is thrown away.
            EngineError: it is not an answer of this policy to this prompt.
        """
        name, length = self.model(version), body["sampling_params"]["max_tokens"]
        limit = 65_536 + 16 * len(prompt.input_ids) + 512 * generations * length  # bytes; an id takes about 150
        answer = self.servers.call_json(server, GENERATE, {**body, "model": name}, limit=limit)
        if answer.get("model") != name:
            raise Unanswered(f"{server.url} answered as {shown(answer.get('model'))!r}, not as {name}", stale=True)
        if self.sender:
            self.sender.confirm(server)
        used, completions = read_answer(answer, f"{server.url}, row {visible(prompt.example.id)}")
        return group_of(prompt, used, completions, limit=length, decoder=self.decoder, version=version,
                        copies=generations // body["sampling_params"]["n"])  # fmt: skip

    def _rates(self) -> dict[str, float]:
        """What the servers counted since the last collection, for all ranks: prompt blocks reused, clips prepared."""
        up, since = self.servers.up, dict.fromkeys(COUNTERS, 0.0)
        figures = self.servers.together(lambda server: self.servers.figures(server, COUNTERS), up)
        for server, counts in zip(up, cast("list[dict[str, float]]", figures), strict=True):
            before = self.counts.get(server.url, {})
            if any(counts[name] < before.get(name, 0.0) for name in COUNTERS):
                before = {}  # a restarted one begins at 0
            for name in COUNTERS:
                since[name] += counts[name] - before.get(name, 0.0)
            self.counts[server.url] = counts
        queries, hits, clips, known = since.values()
        return {"prefix_hit_rate": hits / queries, "clips_prepared": clips - known} if queries else {}

    def rest(self) -> None:
        """Its memory is elsewhere."""

    def close(self) -> None:
        self.workers.close()
        if self.sender:
            self.sender.close()
        self.servers.close()

    def metrics(self) -> Mapping[str, float]:
        """Since the last collection, of this rank; on rank 0 `prefix_hit_rate` and `clips_prepared` of all ranks."""
        retries, self.servers.retries = self.servers.retries, 0
        return {
            "retries": retries,
            "servers_up": len(self.servers.up),
            **self.rates,
            **{f"{phase}_s": seconds for phase, seconds in self.seconds.items()},
        }
