"""What a loaded model is asked with, made into rows and a sampling configuration, or refused with what to write."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from covo_rl.config import COLDEST, ConfigError, EngineConfig, RolloutConfig, value_problems
from covo_rl.evaluate.engine import ENGINE_OPTIONS
from covo_rl.evaluate.runner import Request
from covo_rl.resolve import typed_values
from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    #: a path, the bytes of an audio file, (waveform, rate in Hz), or a mapping as datasets and transformers have it
    Sound = str | os.PathLike[str] | bytes | tuple[np.ndarray, int] | Mapping[str, Any] | Clip

#: what decides the next token, by type
_DECODING: dict[str, Any] = {
    "greedy": bool | None, "temperature": float | None, "num_generations": int, "max_completion_length": int,
    "top_p": float, "top_k": int, "min_p": float, "seed": int,
}  # fmt: skip
#: name of transformers -> ours
_OF_TRANSFORMERS = {"max_new_tokens": "max_completion_length", "do_sample": "greedy or temperature",
                    "num_return_sequences": "num_generations"}  # fmt: skip


def decoding_of(
    greedy: bool | None, temperature: float | None, num_generations: int, max_completion_length: int,
    sampling: Mapping[str, Any], seed: int = 0,
) -> tuple[RolloutConfig, bool]:  # fmt: skip
    """The sampling configuration, and whether the likeliest token is taken instead.

    Raises:
        ConfigError: values and contradictions, all at once.
    """
    values = {"greedy": greedy, "temperature": temperature, "num_generations": num_generations,
              "max_completion_length": max_completion_length, "seed": seed, **sampling}  # fmt: skip
    problems = [f"generate: there is no {name}; write {_OF_TRANSFORMERS[name]}"
                for name in values if name in _OF_TRANSFORMERS]  # fmt: skip
    named = {name: value for name, value in values.items() if name not in _OF_TRANSFORMERS}
    typed = typed_values(_DECODING, named, problems, "generate")
    if type(seed) is not int and "seed" in typed:
        problems.append(f"generate: seed {seed!r:.80}: expected a whole number")
    greedy, temperature = typed.pop("greedy", None), typed.pop("temperature", None)
    typed.pop("seed", None)
    greedy = temperature is None if greedy is None else greedy
    config = RolloutConfig(temperature=1.0 if temperature is None else temperature, **typed)
    problems += value_problems(config)
    if config.temperature < COLDEST:
        problems.append(f"temperature {config.temperature}: sampling needs at least {COLDEST}; greedy is without one")
    drawn = [name for name in ("temperature", "top_p", "top_k", "min_p") if named.get(name) is not None]
    if greedy and drawn:
        problems.append(f"greedy takes the likeliest token, and {', '.join(drawn)} would have no effect: leave one out")
    if greedy and config.num_generations > 1:
        problems.append(f"num_generations {config.num_generations}: greedy replies are equal; name a temperature")
    if problems:
        raise ConfigError(problems)
    return config, greedy


def rows_of(
    question: str | Sequence[str], audio: Any = None, choices: Sequence[Any] = (), *, sound_alone: bool = False
) -> list[Example]:
    """One row a question; with `sound_alone` a single one may be a sound without a text.

    Raises:
        ConfigError: lists of different lengths, or something that is no question, sound or option.
    """
    choices = () if choices is None else choices
    if not isinstance(choices, list | tuple) and not isinstance(choices, str):  # a set has no order, a generator ends
        raise ConfigError([f"generate: choices are a {type(choices).__name__}: give a list of texts"])
    if isinstance(question, str):
        return [_row(1, question, audio, choices, sound_alone and audio not in (None, []))]
    if not isinstance(question, list | tuple):
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


def _row(number: int, question: Any, audio: Any, choices: Any, wordless: bool = False) -> Example:
    if not isinstance(question, str) or not (question.strip() or wordless):
        raise ConfigError([f"generate: question {number} is {question!r:.60}: give a text"])
    listed = isinstance(choices, list | tuple) and all(isinstance(choice, str) and choice for choice in choices)
    if not listed:
        raise ConfigError([f"generate: the choices of question {number} are {choices!r:.60}: give a list of texts"])
    sounds = audio if isinstance(audio, list) else [] if audio is None else [audio]
    return Example(str(number), tuple(map(_clip, sounds)), question, tuple(choices))


def _clip(sound: Any) -> Clip:
    """The clip of a path, bytes, (waveform, rate), or a mapping as datasets and transformers have it."""
    if isinstance(sound, Clip):
        return sound
    if isinstance(sound, bytes | bytearray):
        return Clip(data=bytes(sound))
    if isinstance(sound, Mapping):
        parts = sound.get("array"), sound.get("bytes"), sound.get("path")
        if parts[0] is not None:
            return _clip((parts[0], sound.get("sampling_rate")))
        return _clip(next((part for part in parts[1:] if part is not None), None))
    if isinstance(sound, str | os.PathLike) and (path := os.fspath(sound)):
        if re.match(r"[a-z]+://", path):
            raise ConfigError([f"generate: audio {path!r:.80} is an address: fetch it, and give the file's path"])
        return Clip(path=path)
    waveform, rate = sound if isinstance(sound, tuple) and len(sound) == 2 else (None, None)
    if isinstance(rate, int | float | np.number) and math.isfinite(rate) and int(rate) == rate:
        return Clip(array=_samples(waveform), sampling_rate=int(rate))
    what = f"{sound!r:.60}" if isinstance(sound, str | int | float | None) else f"a {type(sound).__name__}"
    raise ConfigError([f"generate: audio is {what}: give a path, bytes, or (waveform, rate in Hz); a list of several"])


def _samples(waveform: Any) -> np.ndarray:
    """(samples,) or (samples, channels) in the type they have, of a list, an array or a tensor; one or two channels may
    come first, as in torchaudio."""
    if hasattr(waveform, "detach"):
        waveform = waveform.detach().cpu()
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).numpy()
    array = np.asarray(waveform)
    return array.T if array.ndim == 2 and array.shape[0] <= 2 < array.shape[1] else array


def evaluation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `covo-rl eval` by keyword, within the limits that the command has; no plots unless asked for.

    Raises:
        ConfigError: unknown ones, with the nearest, and values that the command would refuse.
    """
    hints = {name: hint for name, hint in get_type_hints(Request).items() if name not in (*_OF_THE_MODEL, "engine")}
    problems: list[str] = []
    values = typed_values(hints | ENGINE_OPTIONS, options, problems, "evaluate")
    engine = {name: values.pop(name) for name in ENGINE_OPTIONS if name in values}
    for name, hint in get_type_hints(Request, include_extras=True).items():
        value, info = values.get(name), getattr(hint, "__metadata__", [None])[0]
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = (-math.inf if info.min is None else info.min), (math.inf if info.max is None else info.max)
            if not low <= value <= high:
                problems.append(f"evaluate: {name} {value}: must be in [{low}, {high}]")
    if problems:
        raise ConfigError(problems)
    return {"plots": False, **values, **({"engine": EngineConfig(**engine)} if engine else {})}


#: of a Request: what the model is, and what `Model.evaluate` has arguments for
_OF_THE_MODEL = ("set_", "data", "audio_dir", "model", "adapter", "predictions", "output", "dtype", "load_in_4bit",
                 "device", "instruction", "choice_style", "family", "trust_remote_code",
                 "speech_mode")  # fmt: skip
