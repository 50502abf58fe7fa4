"""The decode loop: rows of all prompts advance together from shared prompt keys; finished ones make room for others.

A step is tensors in, the same tensors out: no value of it reaches the host, which looks for finished rows once every
LOOK_EVERY steps. On CUDA it is replayed as a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from covo_rl.engines.decoder import Decoder, FusedDecoder, decoder_for
from covo_rl.engines.draws import Drawing, draw, noise_dtype, prompt_noise
from covo_rl.engines.graphs import StepGraphs
from covo_rl.engines.key_values import KeyMemory
from covo_rl.engines.plain import CacheDecoder, CacheMemory, blocks_of_one_length, prefill_caches
from covo_rl.engines.prefill import prefill
from covo_rl.policy import flash
from covo_rl.policy.attention import KeyValues
from covo_rl.policy.features import Features
from covo_rl.policy.packable import PackingError
from covo_rl.policy.packing import Span, identity, unique_prompts
from covo_rl.policy.policy import PromptCache
from covo_rl.policy.sharding import most

if TYPE_CHECKING:
    from covo_rl.config import RolloutConfig
    from covo_rl.policy.policy import Policy
    from covo_rl.types import Prompt

#: finished rows leave once they are more than this share of the rows that are written
DROP_SHARE = 0.25

#: steps between two looks at which rows have finished: a look waits for the device
LOOK_EVERY = 8


class Draws(NamedTuple):
    """Sampled completions, one row per rollout: ids (N, C) int64 and log-probs (N, C) float32 on the CPU.

    `lengths_N` counts ids, end token included; `stopped_N` says that an end token came.
    """

    ids_NC: torch.Tensor
    logps_NC: torch.Tensor
    lengths_N: torch.Tensor
    stopped_N: torch.Tensor


class DecodeRows:
    """The rows that are being written, R of at most `capacity`, and what all N rows have been written so far.

    `row_R` are the callers' numbers, `drawn_R` counts ids, at most C - 1: a row that ended goes on like the others
    until it leaves, into row N, which nobody reads. All tensors stay where they are; `size` of them are in use.
    """

    def __init__(
        self, noise_NC: torch.Tensor, prompt_lengths_N: torch.Tensor, end_ids: torch.Tensor, how: Drawing, capacity: int
    ) -> None:
        device = prompt_lengths_N.device
        self.noise_NC, self.prompt_lengths_N, self.end_ids, self.how = noise_NC, prompt_lengths_N, end_ids, how
        self.count, self.limit = noise_NC.shape
        self.ids = torch.zeros(self.count + 1, self.limit, dtype=torch.int64, device=device)
        self.logps = torch.zeros(self.count + 1, self.limit, dtype=torch.float32, device=device)
        self.lengths = torch.full((self.count + 1,), self.limit, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(self.count + 1, dtype=torch.bool, device=device)
        self._row, self._drawn, self._token = (
            torch.zeros(capacity, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._ended = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.size = 0

    @property
    def row_R(self) -> torch.Tensor:
        return self._row[: self.size]

    @property
    def drawn_R(self) -> torch.Tensor:
        return self._drawn[: self.size]

    @property
    def token_R(self) -> torch.Tensor:
        return self._token[: self.size]

    @property
    def ended_R(self) -> torch.Tensor:
        return self._ended[: self.size]

    def arrange(self, sources: Sequence[int], numbers: Sequence[int]) -> None:
        """From now on these: `sources` are present rows, or -1 for rows that begin, `numbers` the callers'."""
        device = self._row.device
        source_R = torch.tensor(sources, device=device)
        new_R, index_R = source_R < 0, source_R.clamp(min=0)
        self.size = len(sources)
        for state in (self._drawn, self._token, self._ended):
            state[: self.size] = state[index_R].masked_fill(new_R, 0)
        self._row[: self.size] = torch.tensor(numbers, device=device)

    def draw(self, logits_XV: torch.Tensor, part: torch.Tensor | None = None) -> None:
        """The next id of every row, or of the rows `part` alone, from float32 logits."""
        here = slice(None) if part is None else part
        row_X, drawn_X, ended_X = self.row_R[here], self.drawn_R[here], self.ended_R[here]
        if self.how.temperature != 1.0:
            logits_XV = logits_XV / self.how.temperature
        tokens_X, logps_X = draw(logits_XV, self.noise_NC[row_X, drawn_X], self.how)
        into_X = torch.where(ended_X, self.count, row_X)
        self.ids[into_X, drawn_X] = tokens_X
        self.logps[into_X, drawn_X] = logps_X
        drawn_X = drawn_X + 1
        stop_X = (tokens_X[:, None] == self.end_ids).any(-1)
        self.lengths[into_X] = drawn_X
        self.stopped[into_X] = stop_X
        self.ended_R[here] = ended_X | stop_X | (drawn_X == self.limit)
        self.drawn_R[here] = drawn_X.clamp(max=self.limit - 1)
        self.token_R[here] = tokens_X

    def draws(self) -> Draws:
        ids, logps, lengths = self.ids[:-1], self.logps[:-1], self.lengths[:-1]
        written_NC = torch.arange(self.limit, device=ids.device)[None, :] < lengths[:, None]
        results = ids.masked_fill(~written_NC, 0), logps.masked_fill(~written_NC, 0.0), lengths, self.stopped[:-1]
        return Draws(*(result.cpu() for result in results))


def decode_rollouts(
    rows: DecodeRows,
    memory: KeyMemory | CacheMemory,
    decoder: Decoder,
    prompt_of_row: Sequence[int],
    first_ND: torch.Tensor,
    *,
    capacity: int,
    graphs: bool = False,
    anyone: Callable[[bool], bool] = bool,
) -> int:
    """Write all rows, `capacity` of them at a time; returns the row-steps that the decoder made.

    `first_ND` predict the first ids. `anyone` turns "this rank goes on" into "some rank goes on" where sharded ranks
    must make the same number of steps.
    """
    waiting = sorted(range(len(prompt_of_row)), key=lambda n: memory.rank[prompt_of_row[n]])
    device, work = rows.ids.device, 0
    numbers: list[int] = []  # the callers', of the rows in work
    ages: list[int] = []  # ids that each of them has, at most

    def advance() -> None:
        memory.begin(rows.drawn_R, max(ages), equal=min(ages) == max(ages))
        positions_R = rows.prompt_lengths_N[rows.row_R] + rows.drawn_R - 1
        rows.draw(decoder.logits(decoder.hidden(rows.token_R, positions_R, memory)))

    def admit(remaining: list[int]) -> None:
        """The rows in these places go on, and waiting ones take the others."""
        nonlocal numbers, ages
        room = capacity - len(remaining)
        new, waiting[:] = waiting[:room], waiting[room:]
        together = [(numbers[r], r, ages[r]) for r in remaining] + [(n, -1, 1) for n in new]
        together.sort(key=lambda row: memory.rank[prompt_of_row[row[0]]])
        numbers, sources, ages = (list(part) for part in zip(*together, strict=True))
        memory.arrange(sources, [prompt_of_row[n] for n in numbers])
        rows.arrange(sources, numbers)
        if new:
            begin_X = torch.tensor([r for r, source in enumerate(sources) if source < 0], device=device)
            rows.draw(decoder.logits(first_ND[rows.row_R[begin_X]]), begin_X)

    step = StepGraphs(advance, device).run if graphs else lambda rows: advance()
    admit([])
    while True:
        ended = rows.ended_R.tolist()  # waits for the device
        if not anyone(bool(waiting) or not all(ended)):
            return work
        share = 0.5 if graphs and not waiting else DROP_SHARE  # each new number of rows costs a graph
        if (all(ended) and waiting) or share * len(ended) < sum(ended) < len(ended):
            admit([r for r, end in enumerate(ended) if not end])
        for _ in range(min(1 if device.type == "cpu" else LOOK_EVERY, rows.limit - min(ages))):
            step(rows.size)
            ages = [min(age + 1, rows.limit - 1) for age in ages]
            work += rows.size


@torch.no_grad()
def sample_draws(
    policy: Policy,
    prompts: Sequence[Prompt],
    features: Features,
    config: RolloutConfig,
    *,
    seed: int,
    generations: int,
    greedy: bool = False,
    keep_prompts: bool = False,
) -> Draws:
    """Prefill every unique prompt once, then decode `generations` rollouts of each, prompt-major.

    `keep_prompts` leaves the prompts' keys to `Policy.old_logps`, until the next call.
    """
    device, sharded = policy.device, policy.sharded
    policy.prompt_cache = None
    policy.autocast_seen |= torch.is_autocast_enabled(device.type)
    how = Drawing(config.temperature, config.top_p, config.top_k, config.min_p, greedy)
    limit = config.max_completion_length
    if not prompts and not sharded:
        return Draws(*(torch.zeros(shape) for shape in ((0, limit), (0, limit), 0, 0)))  # type: ignore[arg-type]
    unique, index = unique_prompts(prompts)
    noise = torch.zeros(len(prompts), generations, limit) if greedy else prompt_noise(prompts, seed, generations, limit)
    noise_NC = noise.flatten(0, 1).to(noise_dtype(device)).to(device)
    prompt_of_row = [p for p in index for _ in range(generations)]
    capacity = len(prompt_of_row) if sharded else min(len(prompt_of_row), config.decode_rows)
    ends = torch.tensor(sorted({*policy.family.eos_token_ids}), dtype=torch.int64, device=device)
    if not policy.family.packable:
        return plain_draws(policy, unique, prompt_of_row, features, noise_NC, ends, how, capacity)
    with policy.evaluating():
        keys, spans, last_PD = prefill(policy, unique, features)
        lengths_N = torch.tensor([spans[p][1] - spans[p][0] for p in prompt_of_row], device=device)
        first_ND = last_PD[torch.tensor(prompt_of_row, device=device)]
        rows = DecodeRows(noise_NC, lengths_N, ends, how, capacity)
        memory, where = _key_memory(keys, spans, prompt_of_row, config, capacity)
        decoder = decoder_for(policy, rows=capacity, longest=memory.longest_prompt + limit)
        fused = isinstance(decoder, FusedDecoder)
        # not around the modules: what their hooks gather is used in training too
        with torch.inference_mode() if fused else nullcontext():
            policy.counters.decode_positions += decode_rollouts(
                rows, memory, decoder, where, first_ND, capacity=capacity,
                graphs=fused and memory.varlen is not None and policy.decode_graphs,
                anyone=(lambda value: bool(most(int(value), device))) if sharded else bool,
            )  # fmt: skip
            draws = rows.draws()
    if keep_prompts and not sharded:
        numbers = {identity(prompt): n for n, prompt in enumerate(unique)}
        policy.prompt_cache = PromptCache(keys, numbers, spans, last_PD, version=policy.weights_version())
    return draws


def _key_memory(
    keys: KeyValues, spans: Sequence[Span], prompt_of_row: list[int], config: RolloutConfig, capacity: int
) -> tuple[KeyMemory, list[int]]:
    """Prompt keys and room for own ones, and which of the prompts each row reads."""
    if not config.shared_decode:  # every row with a copy of its prompt's keys, as `generate` has
        spans, prompt_of_row = [spans[p] for p in prompt_of_row], list(range(len(prompt_of_row)))
    limit = config.max_completion_length - 1
    kinds = {(k.device, k.dtype, k.shape[-1]) for k, _ in keys.values()}  # layers may have heads of other widths
    varlen = all(flash.available(*kind) for kind in kinds)
    widest = max(Counter(prompt_of_row).values())
    return KeyMemory(keys, spans, rows=capacity, limit=limit, widest=widest, varlen=varlen), prompt_of_row


def plain_draws(
    policy: Policy, prompts: Sequence[Prompt], prompt_of_row: Sequence[int], features: Features,
    noise_NC: torch.Tensor, ends: torch.Tensor, how: Drawing, capacity: int,
) -> Draws:  # fmt: skip
    """The same for a decoder that cannot be packed: prompts of one length together, at most `capacity` rows at a time.

    Raises PackingError with sharded weights, whose ranks must make the same number of calls.
    """
    if policy.sharded:
        raise PackingError(
            f"{type(policy.family.decoder).__name__} cannot be packed, so it samples prompts of one length at a time, "
            "and ranks with pieces of its weights would wait for one another: launch without FSDP and without ZeRO-3"
        )
    decoder, parts = CacheDecoder(policy.family), []
    blocks = blocks_of_one_length([len(prompts[p].input_ids) for p in prompt_of_row], capacity)
    with policy.evaluating():
        for block in blocks:
            mine, index = unique_prompts([prompts[prompt_of_row[n]] for n in block])
            memory, last_PD = prefill_caches(policy, decoder, mine, features)
            lengths_R = torch.full((len(block),), len(mine[0].input_ids), device=policy.device)
            rows = DecodeRows(noise_NC[block], lengths_R, ends, how, len(block))
            policy.counters.decode_positions += decode_rollouts(
                rows, memory, decoder, index, last_PD[index], capacity=len(block)
            )
            parts.append(rows.draws())
    order = torch.tensor([n for block in blocks for n in block]).argsort()
    return Draws(*(torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)))
