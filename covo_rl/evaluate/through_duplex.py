"""`--through duplex`: questions asked in a live session, and the options that mean something to one.

The session hears a row's audio and nothing else: the written question and its options are there for the scorer. Its
first turn is the answer, whenever it comes; without one the answer is empty, and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.records import TurnRollout
from covo_rl.evaluate.sets import EvalInputError, EvalSet
from covo_rl.types import Example, Group, Prompt

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import RolloutConfig
    from covo_rl.duplex.session import DuplexSession

#: options of a prompt, which a session has none of
_OF_PROMPTS = ("prompt", "instruction", "choice_style", "speech_mode", "listen", "predictions")
#: and those of replies and of rows, where a stream only asks when the model speaks
_OF_REPLIES = ("greedy", "num_generations", "temperature", "top_p", "max_completion_length", "rewards", "audio_dir",
               "columns", "through")  # fmt: skip


def session_problems(request: Any, eval_set: EvalSet) -> list[str]:
    """Options beside `--through duplex`, or a set of streams, that a session cannot follow."""
    if not (eval_set.streams or request.through):
        return []
    names = (*_OF_PROMPTS, *(_OF_REPLIES if eval_set.streams else ()))
    what = f"--set {eval_set.name}" if eval_set.streams else f"--through {request.through}"
    return without_use(request, names, f"{what} listens to a live session")


def without_use(request: Any, names: Sequence[str], what: str) -> list[str]:
    """Which of the options of these names were given, and --use-vllm, though `what` leaves them nothing to do."""
    given = [*given_options(request, names), *(["--use-vllm"] if request.engine.use_vllm else [])]
    return [f"{what}, which has no use for {', '.join(given)}"] if given else []


def given_options(request: Any, names: Sequence[str]) -> list[str]:
    """Those of these options that do not have their defaults, as flags."""
    defaults = {item.name: item.default for item in fields(request) if item.default is not MISSING}
    return ["--sample" if name == "greedy" else f"--{name.replace('_', '-')}"
            for name in names if getattr(request, name) != defaults[name]]  # fmt: skip


def session_prompt() -> dict[str, Any]:
    """What the settings of an evaluation hold in place of a prompt."""
    from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM

    return {"name": "a live session", "system": SPOKEN_SYSTEM}


def bounded_session(policy: Any, config: RolloutConfig, *, greedy: bool) -> DuplexSession:
    """A session of the model, which draws as `config` says; a turn has as many chunks as `max_completion_length` has
    room for, at one id of text and four codes each.

    Raises:
        EvalInputError: such a turn does not fit the context.
    """
    from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SECONDS
    from covo_rl.duplex.session import GREEDY, DuplexSession, SessionError
    from covo_rl.engines.draws import Drawing

    how = GREEDY if greedy else Drawing(temperature=config.temperature, top_p=config.top_p)
    length = config.max_completion_length
    try:
        seconds = CHUNK_SECONDS * (length // (1 + CHUNK_CODES))
        return DuplexSession.of(policy.family, decision=how, text=how, codes=how, max_turn_seconds=seconds)
    except SessionError as error:
        raise EvalInputError([f"--max-completion-length {length}: {error}"]) from error


def heard_wave(example: Example, clips: ClipStore) -> np.ndarray:
    """(T,) at 24 kHz: the row's clips, one after the other."""
    from covo_rl.audio import resample
    from covo_rl.speech.grid import RATE

    return np.concatenate([resample(*clips.waveform(clips.key(clip)), RATE) for clip in example.clips])


def silent_rows(examples: Sequence[Example]) -> list[str]:
    """Rows without audio cannot be asked aloud."""
    names = [example.id for example in examples if not example.clips]
    return [f"--through duplex: no audio in {count_rows(names)}"] if names else []


@dataclass
class DuplexAnswerer:
    """Asks each row in a session of its own; `session` is drawn from greedily, or as its drawing says."""

    session: DuplexSession
    clips: ClipStore

    @classmethod
    def of(cls, policy: Any, clips: ClipStore, config: RolloutConfig, *, greedy: bool) -> DuplexAnswerer:
        """In a `bounded_session`, and raises as it does."""
        return cls(bounded_session(policy, config, greedy=greedy), clips)

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        """As Answerer has it; `greedy` is the session's own."""
        groups = []
        for example in examples:
            heard = heard_wave(example, self.clips)
            rollouts = tuple(self._ask(example, heard, seed, number) for number in range(num_generations))
            groups.append(Group(Prompt(example, (), "", ()), rollouts))
        return groups

    def _ask(self, example: Example, wave_T: np.ndarray, seed: int, number: int) -> TurnRollout:
        from covo_rl.duplex.first_turn import first_turn, heard_question, tail_for
        from covo_rl.duplex.sources import seeded

        rng = seeded(seed, example.id, str(number))
        heard = heard_question(wave_T, tail_for(self.session), rng)
        self.session.seed = int(rng.integers(2**62))
        turn = first_turn(self.session, heard)
        text = turn.text.strip()
        return TurnRollout(
            (), (), turn.text, "length" if turn.ending == "limit" else "stop", answer=text or None, codes=turn.codes,
            turn=turn_record(turn.shift_time, heard.speech_end) | {
                "ending": turn.ending, "longest_pause": heard.longest_pause, "dropped_chunks": turn.dropped,
            },
        )  # fmt: skip


def turn_record(shift_time: float | None, speech_end: float) -> dict[str, Any]:
    """When an answer came, by the rule of the rewards: `outcome` early, answered or never; `delay` of those answered.

    >>> turn_record(3.36, 2.9)["outcome"], turn_record(2.88, 2.9)["outcome"], turn_record(None, 2.9)["outcome"]
    ('answered', 'early', 'never')
    """
    from covo_rl.rewards.rules.turns import response_delays

    (delay,) = response_delays(["single"], [shift_time], [speech_end])
    outcome, seconds = ("answered", delay) if isinstance(delay, float) else (delay, None)
    return {"outcome": outcome, "shift_time": shift_time, "speech_end": speech_end, "delay": seconds}
