"""What a loaded model is asked with, made into rows and a sampling configuration, or refused with what to write."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from covo_rl.config import ConfigError, RolloutConfig, value_problems
from covo_rl.evaluate.runner import Request
from covo_rl.resolve import typed_values, unknown_names
from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    #: a path, the bytes of an audio file, (waveform, rate in Hz), or a mapping as datasets and transformers have it
    Sound = str | os.PathLike[str] | bytes | tuple[np.ndarray, int] | Mapping[str, Any] | Clip

_SAMPLING = ("top_p", "top_k", "min_p")


def decoding_of(
    greedy: bool | None, temperature: float | None, num_generations: int, max_completion_length: int,
    sampling: Mapping[str, Any],
) -> tuple[RolloutConfig, bool]:  # fmt: skip
    """The sampling configuration, and whether the likeliest token is taken instead.

    Raises:
        ConfigError: values and contradictions, all at once.
    """
    greedy = temperature is None if greedy is None else greedy
    problems = unknown_names([n for n in sampling if n not in _SAMPLING], _SAMPLING, "generate")
    known = {name: value for name, value in sampling.items() if name in _SAMPLING}
    config = RolloutConfig(
        num_generations=num_generations, max_completion_length=max_completion_length,
        temperature=1.0 if temperature is None else temperature, **known,
    )  # fmt: skip
    problems += value_problems(config)
    named = [*(["temperature"] if temperature is not None else []), *known]
    if greedy and named:
        problems.append(f"greedy takes the likeliest token, and {', '.join(named)} would have no effect: leave one out")
    if greedy and num_generations != 1:
        problems.append(f"num_generations {num_generations}: greedy replies are equal; name a temperature")
    if problems:
        raise ConfigError(problems)
    return config, greedy


def rows_of(question: str | Sequence[str], audio: Any = None, choices: Sequence[Any] = ()) -> list[Example]:
    """One row a question.

    Raises:
        ConfigError: lists of different lengths, or something that is no question, sound or option.
    """
    if isinstance(question, str):
        return [_row(1, question, audio, choices)]
    if not isinstance(question, Sequence):
        raise ConfigError([f"generate: question is a {type(question).__name__}: give a text, or a list of texts"])
    count = len(question)
    sounds = audio if isinstance(audio, list) else [audio] * count
    options = list(choices) if choices and not isinstance(choices[0], str) else [choices] * count
    problems = [
        f"generate: {len(values)} {what} for {count} questions: give one entry for each"
        for what, values in (("sounds", sounds), ("lists of choices", options)) if len(values) != count
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return [_row(number, *parts) for number, parts in enumerate(zip(question, sounds, options, strict=True), 1)]


def _row(number: int, question: Any, audio: Any, choices: Any) -> Example:
    if not isinstance(question, str) or not question.strip():
        raise ConfigError([f"generate: question {number} is {question!r:.60}: give a text"])
    if isinstance(choices, str) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError([f"generate: the choices of question {number} are {choices!r:.60}: give a list of texts"])
    sounds = audio if isinstance(audio, list) else [] if audio is None else [audio]
    return Example(str(number), tuple(map(_clip, sounds)), question, tuple(choices))


def _clip(sound: Any) -> Clip:
    """The clip of a path, bytes, (waveform, rate), or a mapping as datasets and transformers have it."""
    if isinstance(sound, Clip):
        return sound
    if isinstance(sound, bytes | bytearray):
        return Clip(data=bytes(sound))
    if isinstance(sound, str | os.PathLike):
        return Clip(path=os.fspath(sound))
    if isinstance(sound, Mapping):
        if sound.get("array") is not None:
            sound = (sound["array"], sound.get("sampling_rate"))
        elif isinstance(sound.get("bytes"), bytes):
            return Clip(data=sound["bytes"])
        elif isinstance(sound.get("path"), str):
            return Clip(path=sound["path"])
    if isinstance(sound, tuple) and len(sound) == 2 and isinstance(sound[1], int | np.integer):
        return Clip(array=np.asarray(sound[0], dtype=np.float32), sampling_rate=int(sound[1]))
    raise ConfigError([f"generate: audio is {sound!r:.60}: give a path, bytes, or (waveform, rate in Hz)"])


def evaluation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `covo-rl eval` by keyword, within the limits that the command has; no plots unless asked for.

    Raises:
        ConfigError: unknown ones, with the nearest, and values that the command would refuse.
    """
    hints = {name: hint for name, hint in get_type_hints(Request).items() if name not in _OF_THE_MODEL}
    problems: list[str] = []
    values = typed_values(hints, options, problems, "evaluate")
    for name, hint in get_type_hints(Request, include_extras=True).items():
        info, value = hint.__metadata__[0], values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = (-math.inf if info.min is None else info.min), (math.inf if info.max is None else info.max)
            if not low <= value <= high:
                problems.append(f"evaluate: {name} {value}: must be in [{low}, {high}]")
    if problems:
        raise ConfigError(problems)
    return {"plots": False, **values}


#: of a Request: what the model is, and what `Model.evaluate` has arguments for
_OF_THE_MODEL = ("set_", "data", "audio_dir", "model", "adapter", "predictions", "output", "dtype", "load_in_4bit",
                 "device", "instruction", "choice_style", "trust_remote_code")  # fmt: skip
