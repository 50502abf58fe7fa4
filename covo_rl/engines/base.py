"""What a rollout engine is: prompts go in with a seed, groups of completions come out with their log-probs.

    pending = engine.submit(prompts, options.rollout, seed=7, generations=8)      returns at once
    groups = engine.collect(pending)                                              one per prompt, in order
    engine.sync(version)                                                          from now on, sample with this policy

`own` (own.py) is the policy itself. Another engine implements the same methods and is held to the same checks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from covo_rl.models.text import special_tokens
from covo_rl.prompt import parse
from covo_rl.types import TAG_TOKENS, Group, Prompt, Rollout, StopReason, UserError, visible

if TYPE_CHECKING:
    from covo_rl.config import RolloutConfig
    from covo_rl.models.base import AudioFamily


ROUNDING = 1e-3  # nats that a log-prob may be above 0


class EngineError(UserError, RuntimeError):
    """An engine failed, or returned something that cannot be a rollout of this policy; the message names the row."""


class EngineLost(EngineError):
    """Nothing answers any more: the run saves a checkpoint and ends with 75, as after a signal."""


@dataclass(frozen=True)
class SyncReport:
    """`version` of the policy that the engine samples with from now on.

    `seconds` by phase: save, load. `probe_abs`: largest difference of log-probs between engine and policy afterwards.
    `rounding`: the largest change of a number of the adapter, which is trained in float32, by the engine's precision.
    """

    version: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    probe_abs: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class Failed:
    """A prompt without its group: the row's id, and what every try ended with."""

    row: str
    reason: str


@dataclass(frozen=True)
class Pending:
    """Groups on their way. `version` is the policy they are sampled with, `work` the engine's handle, say futures."""

    prompts: tuple[Prompt, ...]
    generations: int
    version: int
    work: Any = None

    def ready(self, seconds: float) -> bool:
        """Whether `collect` would not wait; waits for that at most so many seconds."""
        works = self.work if isinstance(self.work, list) else [self.work]
        return not wait([work for work in works if isinstance(work, Future)], seconds).not_done


class Sampler(Protocol):
    """Prompts in, groups out. `failed`: the prompts of the last collection whose groups did not come."""

    failed: Sequence[Failed]

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        """Ask for `generations` completions of each prompt; returns at once."""
        ...

    def collect(self, pending: Pending) -> list[Group]:
        """The groups, in the order of the prompts, without those in `failed`.

        Raises:
            EngineLost: nothing answers any more.
            EngineError: sampling failed, or a group is not one of this policy.
        """
        ...


class RolloutEngine(Sampler, Protocol):
    """Samples completions. `exact`: its log-probs are those of the scoring pass, so no correction is needed."""

    name: str

    @property
    def exact(self) -> bool: ...

    def sync(self, version: int) -> SyncReport:
        """From now on, sample with this version of the policy; what was submitted before keeps its own.

        Under sharding a collective, as `submit` and `collect` are for the policy's own decoder.

        Raises:
            EngineError: the engine does not run the policy.
        """
        ...

    def rest(self) -> None:
        """Give the memory back that an update needs."""
        ...

    def close(self) -> None:
        """End everything that the engine started."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Figures of the last collection; names that end in _s are seconds."""
        ...


def rollout_of(
    ids: Sequence[int], logps: Sequence[float], stop_reason: StopReason, decoder: TextDecoder, version: int
) -> Rollout:
    """A completion, end token included, with its text, what that says, and its audio codes."""
    text = decoder(ids)
    parsed = parse(text, stop_reason)
    return Rollout(
        tuple(ids), tuple(logps), text, stop_reason, parsed.think, parsed.answer, parsed.problems, version,
        decoder.codes(ids),
    )  # fmt: skip


def check_groups(
    groups: Sequence[Group],
    pending: Pending,
    family: AudioFamily,
    *,
    finite: bool = True,
    failed: Sequence[Failed] = (),
) -> None:
    """Are these the groups that were asked for, but for the `failed`? `finite` False leaves non-finite log-probs to
    the step guard.

    Raises:
        EngineError: other prompts, another number of rollouts or version, ids beyond the vocabulary, log-probs that
            are missing or not finite, an end token without `stop` or the other way round. Nothing is repaired.
    """
    missing, expected = Counter(one.row for one in failed), []
    for prompt in pending.prompts:
        if missing[prompt.example.id]:
            missing[prompt.example.id] -= 1  # a row that is there twice is the same prompt twice
        else:
            expected.append(prompt.input_ids)
    if missing.total() or [group.prompt.input_ids for group in groups] != expected:
        raise EngineError(f"the engine returned {len(groups)} groups of other prompts than the {len(pending.prompts)} "
                          f"it was given, or in another order; {len(failed)} failed")  # fmt: skip
    vocabulary, ends = family.model.config.get_text_config().vocab_size, set(family.eos_token_ids)
    for group in groups:
        row = visible(group.prompt.example.id)
        if len(group.rollouts) != pending.generations:
            raise EngineError(f"row {row}: {len(group.rollouts)} rollouts, {pending.generations} were asked for")
        for g, rollout in enumerate(group.rollouts):
            ids, logps = rollout.completion_ids, rollout.logps
            rules = [
                (rollout.version == pending.version, f"sampled by version {rollout.version}, not {pending.version}"),
                (len(ids) > 0 and len(ids) == len(logps), f"{len(ids)} ids and {len(logps)} log-probs"),
                (not ids or 0 <= min(ids) <= max(ids) < vocabulary, f"ids beyond the vocabulary of {vocabulary}"),
                (not finite or all(map(math.isfinite, logps)), "log-probs that are not finite"),
                (not any(logp > ROUNDING for logp in logps), "log-probs above 0"),
                (bool(ids) and (ids[-1] in ends) == (rollout.stop_reason == "stop"),
                 f"stop reason {rollout.stop_reason!r}, last id {ids[-1:]}, end tokens {sorted(ends)}"),
            ]  # fmt: skip
            if wrong := [what for right, what in rules if not right]:
                raise EngineError(f"row {row}, rollout {g}: {'; '.join(wrong)}")


class TextDecoder:
    """Completion ids -> text without its end: end, padding and other special tokens after the last other id are left
    out. Special tokens before that are shown as they are written, so that nobody reads over them.

    Audio codes, and other ids beyond the tokenizer, have no text and are dropped.
    """

    def __init__(self, family: AudioFamily) -> None:
        self.tokenizer: Any = family.tokenizer
        tags = set(self.tokenizer.convert_tokens_to_ids(list(TAG_TOKENS)))
        special = {*self.tokenizer.convert_tokens_to_ids(special_tokens(self.tokenizer)), family.audio_token_id}
        self.ends = (special - tags) | {*family.eos_token_ids, family.pad_token_id}
        self.size, self.code_ids = len(self.tokenizer), family.code_ids
        self._pieces: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> str:
        text_ids = [*filter(self._has_text, ids)]
        while text_ids and text_ids[-1] in self.ends:
            text_ids.pop()
        return self._decode(text_ids)

    def codes(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The audio codes among the ids, in order; the family's first is 0."""
        return tuple(i - self.code_ids.start for i in ids if i in self.code_ids)

    def characters(self, ids: Sequence[int], text: str) -> list[int] | None:
        """How many characters of `text`, which is `self(ids)`, each id has written; in sum all.

        A character that several ids spell counts for the last of them; what is left out or has no text, for nothing.
        None where this tokenizer writes ids together otherwise than one after the other, or bytes follow one another
        that are no text.
        """
        end = len(ids)
        while end and (ids[end - 1] in self.ends or not self._has_text(ids[end - 1])):
            end -= 1
        pieces = [self._piece(i) for i in ids[:end]]
        counts = [*map(len, pieces), *[0] * (len(ids) - end)]
        if "".join(pieces) == text:
            return counts
        part: list[int] = []  # ids since the last whole character
        for n, piece in enumerate(pieces):
            if len(part) == 64:
                return None
            if part or "\ufffd" in piece:
                part.append(ids[n])
                written = self._after(part)
                is_whole = not written.endswith("\ufffd") or n == end - 1
                counts[n], part = (len(written), []) if is_whole else (0, part)
        return counts if sum(counts) == len(text) else None

    def _has_text(self, i: int) -> bool:
        return i < self.size and i not in self.code_ids

    def _piece(self, i: int) -> str:
        if i not in self._pieces:
            self._pieces[i] = self._after([i]) if self._has_text(i) else ""
        return self._pieces[i]

    def _after(self, ids: Sequence[int]) -> str:
        """What the ids write in the middle of a text: at its start some tokenizers leave a space out."""
        before = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self._decode([*before, *filter(self._has_text, ids)])[len(self._decode(before)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
