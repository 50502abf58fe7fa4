"""Servers held to one another: at the start, and when the probe asks all of them what it asks an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from covo_rl.engines.base import EngineError, Failed, Pending, check_groups
from covo_rl.engines.server_calls import Server, Unanswered
from covo_rl.engines.servers import LIVES, Servers
from covo_rl.types import Group, Prompt, shown, visible

if TYPE_CHECKING:
    from covo_rl.config import RolloutConfig
    from covo_rl.engines.vllm_server import VLLMServer

VERSION = "0.31."  # of vLLM, whose endpoints we know


def served_models(servers: Servers, server: Server) -> list[dict[str, Any]]:
    """What a server says of its base and its adapters. Raises Unanswered."""
    cards = servers.call_json(server, "/v1/models").get("data")
    return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []


def served_base(servers: Servers, max_model_len: int) -> str:
    """The name of the base model; every server must be there, of a version we know, and large enough.

    Raises:
        EngineError: one is not.
    """

    def base_of(server: Server) -> str:
        version = str(servers.call_json(server, "/version").get("version"))
        if not version.startswith(VERSION):
            raise EngineError(f"{server.url} is vLLM {visible(version)[:40]}, not {VERSION}x; start one of those")
        base = next((card for card in served_models(servers, server) if not card.get("parent")), {})
        room = base.get("max_model_len")
        if not isinstance(room, int) or room < max_model_len:
            raise EngineError(
                f"{server.url} has room for {shown(room)} positions, and a prompt with its completion may take "
                f"{max_model_len}: start it with --max-model-len {max_model_len}, or lower max_completion_length"
            )
        return str(base.get("id"))

    names = servers.together(base_of, servers.all)
    if missing := [str(name) for name in names if isinstance(name, Unanswered)]:
        raise EngineError(
            f"no answer from {len(missing)} of {len(names)} rollout servers: {'; '.join(missing)}. Start them first "
            "(covo-rl rollout-server --config FILE prints the command), and check vllm_server_base_url"
        )
    if len(set(names)) > 1:
        raise EngineError(f"the servers serve different models, {names}: give all the same --served-model-name")
    return str(names[0])


def answers_apart(one: Group, other: Group) -> float:
    """Largest difference of log-probs of two greedy completions, up to the first id in which they differ."""
    (a,), (b,) = one.rollouts, other.rollouts
    pairs = zip(a.completion_ids, b.completion_ids, strict=False)
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.logps), len(b.logps)))
    gaps = [abs(x - y) for x, y in zip(a.logps[: same + 1], b.logps[: same + 1], strict=False)]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


class AllServers:
    """The servers that are up as one for the probe: all must answer alike, and the first one's answer is taken.

    What comes back later is asked the same again, and compared with that answer.
    """

    failed: Sequence[Failed] = ()

    def __init__(self, engine: VLLMServer) -> None:
        self.engine = engine
        self.asked: tuple[Prompt, dict[str, Any]] | None = None
        self.group: Group | None = None

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        (prompt,), version = prompts, self.engine.version
        body = self.engine.request(prompt, config, seed, generations, greedy, version)
        self.asked, self.group = (prompt, body), None
        return Pending((prompt,), generations, version)

    def collect(self, pending: Pending) -> list[Group]:
        """Raises EngineError where servers part, and where none answers, on every rank."""
        self.group, problems = self.engine.from_main(self._ask_all)
        self.engine.adopt(problems)
        check_groups([self.group], pending, self.engine.policy.family)
        return [self.group]

    def _ask_all(self) -> tuple[Group, list[str]]:
        """Rank 0: the answer, and what is wrong with each server."""
        servers, first = self.engine.servers, None
        for _ in range(LIVES):
            asked = servers.wait_for_one()
            answers = servers.together(lambda server: servers.insist(server, self._ask), asked)
            for server, answer in zip(asked, answers, strict=True):
                if isinstance(answer, Unanswered):
                    servers.take_down(server, server.life, str(answer), poisoned=answer.poisoned)
                elif first is None:
                    first = server, answer
                elif (gap := answers_apart(first[1], answer)) > self.engine.probe.tolerance:
                    raise EngineError(f"{first[0].url} and {server.url} answer the same prompt {gap:.3g} nats apart: "
                                      "one of them does not run the policy")  # fmt: skip
            if first is not None:
                for server in servers.up:
                    if server not in asked:  # it came back just now, and nobody has compared it
                        servers.take_down(server, server.life, f"{server.url}: back in a sync, not compared yet")
                return first[1], servers.problems
        raise EngineError(f"no server answers a prompt: {'; '.join(servers.problems)}")

    def _ask(self, server: Server) -> Group:
        assert self.asked is not None
        prompt, body = self.asked
        return self.engine.group(server, prompt, body, 1, self.engine.version)

    def compare(self, server: Server) -> None:
        """One that comes back, with what the others have answered. Raises Unanswered where it has no such answer."""
        if self.group is not None and (gap := answers_apart(self.group, self._ask(server))) > (
            tolerance := self.engine.probe.tolerance
        ):
            raise Unanswered(f"{server.url} does not run the policy: its answer is {gap:.3g} nats from that of the "
                             f"others, above {tolerance:g}; is it another base model?")  # fmt: skip
