"""The nouns that the rooms hand to one another, and the axis legend.

    example -> prompt + clips -> rollouts -> rewards -> advantages -> loss -> adapter -> report

Axes in names: P prompts, G rollouts per prompt, N = P*G, R reward components, T prompt positions,
C completion positions, S audio slots, F mel frames, M mel bins, D width, V vocabulary.

Everything here is frozen and imports no torch, so that data, rewards and the command line stay light.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

StopReason = Literal["stop", "length"]
#: what of a reply a supervised stage teaches: its text ids, its codes, its codes and the end of the turn
Supervise = Literal["all", "text", "codes", "spoken"]
#: the tags of a completion (prompt.py): tokens of their own in some tokenizers
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
SHOWN = 300  # characters of a foreign value or message


def visible(text: object, keep: str = "") -> str:
    """Text as a message may show it: what does not print (controls, ANSI, bidi and zero-width marks, line breaks, lone
    surrogates) is written as Python escapes it, but for the characters of `keep`.

    >>> visible("a\\x1b[31m\\n")
    'a\\\\x1b[31m\\\\n'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c in keep or c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def shown(value: Any, limit: int = SHOWN) -> str:
    """A foreign value for a message: cut, and whatever its own `repr` does."""
    try:
        text = str(value) if isinstance(value, (str, BaseException)) else repr(value)
    except BaseException as error:  # a plugin's own __repr__, or an integer of too many digits
        text = f"{type(value).__name__} (its repr raises {type(error).__name__})"
    return text if len(text) <= limit else f"{text[:limit]}..."


class UserError(Exception):
    """What the user can mend: a command shows the message alone, without a traceback.

    `everywhere`: every rank raises it, with the same message, which one of them shows.
    """

    everywhere = False


@contextmanager
def user_errors(command: str, code: int = 2) -> Iterator[None]:
    """A UserError, or a file that cannot be read or written, ends the process with `command: message` and `code`.

    Raises:
        SystemExit: with `code`.
    """
    try:
        yield
    except (UserError, OSError) as error:
        print(visible(f"{command}: {error}", keep="\n"), file=sys.stderr)
        raise SystemExit(code) from error


@dataclass(frozen=True)
class Clip:
    """One audio clip by reference: exactly one of `path`, `data` (an encoded file) or `array` is set.

    `array` is a float waveform, `(samples,)` or `(samples, channels)`, and needs `sampling_rate` in Hz.
    """

    path: str | None = None
    data: bytes | None = None
    array: np.ndarray | None = None
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        sources = [name for name in ("path", "data", "array") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(f"a Clip needs exactly one of path, data, array; got {sources or 'none'}")
        if self.array is not None and self.sampling_rate is None:
            raise ValueError("a Clip made from an array needs its sampling_rate in Hz")

    @property
    def name(self) -> str:
        """What an error message calls this clip."""
        if self.path is not None:
            return self.path
        return "<bytes>" if self.data is not None else "<array>"


@dataclass(frozen=True)
class Example:
    """One row of a data set. `columns` holds every further column of the row, untouched.

    `system` is the row's own system message, which takes the place of the option `system_prompt`. `history` holds the
    messages of a conversation before the question, whose clips come first; a reply may bring the `ids` that it was
    sampled as, which its text cannot write where there are audio codes among them.
    """

    id: str
    clips: tuple[Clip, ...]
    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What the row itself writes into a prompt."""
        return (self.system or "", self.question, *self.choices)


@dataclass(frozen=True)
class Prompt:
    """An example as the policy sees it: messages, token ids with expanded audio slots, clips by content.

    `clip_keys[i]` (a content hash) fills `slots[i]` audio positions, in order of appearance in `input_ids`.
    """

    example: Example
    messages: tuple[Mapping[str, Any], ...]
    text: str
    input_ids: tuple[int, ...]
    clip_keys: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled completion. `logps` are its sampling log-probs, one per id, end token included.

    `stop` says that an end token was produced (it is the last id), `length` that the limit cut it.
    `think` and `answer` are None where the grammar finds none; `problems` says what is wrong. `version` counts the
    optimiser updates behind the policy that sampled it. `codes` are the audio codes among the ids, in order (0 is the
    first code; empty where the family has none); `text` is what stands without them.
    """

    completion_ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    stop_reason: StopReason
    think: str | None = None
    answer: str | None = None
    problems: tuple[str, ...] = ()
    version: int = 0
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Group:
    """A prompt and its G rollouts: the unit that is never split between ranks."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class RewardTable:
    """Scores of a step. NaN in `rewards_PGR` means "not gradeable" and is explained in `missing`.

    `rewards_PGR` (P, G, R) float64 raw components in [0, 1]; `weights_R` float64;
    `rewards_PG` (P, G) the weighted sum (NaN where no component could be graded).
    `missing` maps (p, g, component name) to the reason. `seconds` is wall time per component.
    `extras` holds what rewards logged per rollout: name -> P*G values in group-major order. `gate` names the component
    behind which the others count, or is "none".
    """

    names: tuple[str, ...]
    weights_R: np.ndarray
    rewards_PGR: np.ndarray
    rewards_PG: np.ndarray
    missing: Mapping[tuple[int, int, str], str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    gate: str = "none"

    def failures(self, name: str) -> list[str]:
        """Why scores of this component failed (raised, took too long), leaving out those that are not gradeable."""
        return [why for (_, _, c), why in self.missing.items() if c == name and why.startswith("failed")]
