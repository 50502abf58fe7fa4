"""Who hears speech, by one string: its words, a score of it, where somebody speaks.

    transformers:PATH   a Whisper checkpoint on this machine, with times of words where it can tell them
    funasr:PATH         a Paraformer, through the package funasr
    command:PROGRAM     a program of yours, a line each: {"id", "path", "language"} -> {"id", "text", "words"?}
    file:RESULTS.jsonl  what was heard before, the same lines

An answer is kept on disk by engine, version and the content of the sound, so that equal sounds are heard once. What
fails is an error of its own input, and counted: nothing is guessed in its place.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.audio import AudioError, content_key, decode
from covo_rl.data.files import file_sha256, json_lines, weights_sha256
from covo_rl.resolve import cache_folder, meant
from covo_rl.rewards.program import Program, clip_paths, reply_text
from covo_rl.rewards.replies import AnswerError, ReplyCache
from covo_rl.rewards.specs import RewardError
from covo_rl.types import Clip, shown

BATCH = 8  # sounds that a model of this process hears at once
MOST_SHOWN = 20  # lines of a file that are named
MOST_SECONDS = 7 * 86_400.0  # nothing that is listened to is longer
FORMS = {
    "text": "transformers:PATH (Whisper), funasr:PATH (Paraformer), command:PROGRAM or file:RESULTS.jsonl",
    "other": "command:PROGRAM or file:RESULTS.jsonl",
}


@dataclass(frozen=True)
class Heard:
    """A sound to be listened to, or a `text` where the engine reads. `language`: en, zh ..., or not known."""

    id: str
    clip: Clip | None = None
    language: str = ""
    text: str = ""

    @property
    def key(self) -> str:
        """What an answer hangs on: content, never a path. Raises AudioError: the clip cannot be read."""
        return json.dumps([self.clip and content_key(self.clip), self.language, self.text])


# -- answers ---------------------------------------------------------------------------------------------------------


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r:.80}, not a finite number")
    return float(value)


def _span(item: Any, what: str) -> dict[str, Any]:
    """`start` and `end` in seconds; the end may be null, where an engine does not know it."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{what} is {item!r:.80}, not an object with start and end")
    start = _number(item.get("start"), f"start of {what}")
    end = None if item.get("end") is None else _number(item["end"], f"end of {what}")
    if not 0 <= start <= (start if end is None else end) <= MOST_SECONDS:
        raise ValueError(f"{what} lasts from {start:g} to {end} s")
    return {"start": start, "end": end}


def _read_words(answer: Mapping[str, Any]) -> dict[str, Any]:
    """{"text"} and, where they are told, {"words": [{"text", "start", "end"}]}."""
    text, words = reply_text(answer), answer.get("words")
    if words is None:
        return {"text": text}
    if not isinstance(words, list):
        raise ValueError(f"words is {words!r:.80}, not a list")
    spans = [_span(word, f"word {place}") for place, word in enumerate(words)]
    return {
        "text": text,
        "words": [{"text": reply_text(word), **span} for word, span in zip(words, spans, strict=True)],
    }


def _read_score(answer: Mapping[str, Any]) -> dict[str, Any]:
    """{"score": number}, or {"score": {label: number}}."""
    score = answer.get("score")
    if isinstance(score, Mapping) and score:
        return {"score": {str(label): _number(value, f"score of {label}") for label, value in score.items()}}
    return {"score": _number(score, "score")}


def _read_segments(answer: Mapping[str, Any]) -> dict[str, Any]:
    """{"segments": [{"start", "end"}]} in seconds, in order; none is an empty list."""
    segments = answer.get("segments")
    if not isinstance(segments, list):
        raise ValueError(f"segments is {segments!r:.80}, not a list")
    return {"segments": [_span(item, f"segment {place}") for place, item in enumerate(segments)]}


def _read_vector(answer: Mapping[str, Any]) -> dict[str, Any]:
    """{"vector": [number, ...]}."""
    vector = answer.get("vector")
    if not isinstance(vector, list) or not vector:
        raise ValueError(f"vector is {vector!r:.80}, not a list of numbers")
    return {"vector": [_number(value, "a value of vector") for value in vector]}


#: what is wanted -> how an answer is read; ValueError where it is none
ANSWERS = {"text": _read_words, "score": _read_score, "segments": _read_segments, "vector": _read_vector}


# -- engines ---------------------------------------------------------------------------------------------------------


class SpeechListener:
    """An engine under its spec. `version` is what it rests on; `counts`: asked, kept (from the cache), failed."""

    def __init__(self, spec: str, wants: str, version: str, cache: Path | None) -> None:
        self.name, self.version, self.read = spec, version, ANSWERS[wants]
        self.kept = ReplyCache(cache, f"{spec} {version} {wants}")
        self.counts, self.faults = Counter[str](asked=0, kept=0, failed=0), Counter[str]()

    def hear(self, sounds: Sequence[Heard]) -> list[Any]:
        """An answer (see ANSWERS) of each, or an AnswerError.

        Raises:
            ValueError: two sounds have one id.
        """
        if twice := [name for name, count in Counter(sound.id for sound in sounds).items() if count > 1]:
            raise ValueError(f"two sounds have the id {twice[0]!r}; {len(twice)} such ids")
        keys: list[str | AnswerError] = []
        for sound in sounds:
            try:
                keys.append(sound.key)
            except AudioError as error:
                keys.append(AnswerError(str(error)))
        found: dict[str, Any] = {}
        new: dict[str, Heard] = {}
        for key, sound in zip(keys, sounds, strict=True):
            if isinstance(key, str) and key not in found and key not in new:
                if (kept := self._remembered(key)) is not None:
                    found[key] = kept
                else:
                    new[key] = sound
        self.counts.update(asked=len(sounds), kept=len(found))
        found |= zip(new, self.answers(new), strict=True)
        results = [key if isinstance(key, AnswerError) else found[key] for key in keys]
        self.counts["failed"] += sum(isinstance(result, AnswerError) for result in results)
        return results

    def _remembered(self, key: str) -> Any:
        text = self.kept.get(key)
        try:
            return None if text is None else self.read(json.loads(text))
        except ValueError:  # of an earlier version
            return None

    def keep(self, key: str, answer: Any) -> None:
        """Remember an answer; None takes it back."""
        self.kept.drop(key) if answer is None else self.kept.put(key, json.dumps(answer, ensure_ascii=True))

    def answers(self, sounds: Mapping[str, Heard]) -> list[Any]:
        """Of key -> sound, each another; calls `keep` as soon as one is there."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """For a report, which is the same after an interruption: how much was kept is no part of it."""
        counts = {name: count for name, count in self.counts.items() if name != "kept"}
        faults = {"faults": dict(self.faults)} if self.faults else {}
        return {"engine": self.name, "version": self.version, **counts, **faults}


class FileListener(SpeechListener):
    """Finished results, by the id of a row. Raises RewardError as `finished_results` does."""

    def __init__(self, path: Path, wants: str) -> None:
        self.lines = finished_results(path, ANSWERS[wants])
        super().__init__(f"file:{path}", wants, file_sha256(path), None)

    def hear(self, sounds: Sequence[Heard]) -> list[Any]:
        """By id; what the sound is plays no part."""
        lost = {sound.id: AnswerError(f"{self.name} has no line for {sound.id}") for sound in sounds}
        results = [self.lines.get(sound.id, lost[sound.id]) for sound in sounds]
        self.counts.update(asked=len(sounds), failed=sum(isinstance(result, AnswerError) for result in results))
        return results


def finished_results(path: Path, read: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """id -> what `read` makes of its line of JSON; it raises ValueError where the line is no result.

    Raises:
        RewardError: there is no such file, a line is no result, or an id has two: all lines named.
    """
    if not path.is_file():
        raise RewardError(f"file:{path}: no such file (looked in {Path.cwd()}){meant(path)}")
    results: dict[str, Any] = {}
    problems = []
    for number, row, problem in json_lines(path):
        try:
            if row is None:
                raise ValueError(problem)
            if not isinstance(name := row.get("id"), str) or name in results:
                raise ValueError(f"id {name!r:.80} {'is there twice' if isinstance(name, str) else 'is not text'}")
            results[name] = read(row)
        except ValueError as error:
            problems.append(f"file:{path}, line {number}: {error}")
    if not results and not problems:
        problems.append(f"file:{path}: no results in it; a line is one, with its id")
    if problems:
        more = f"\n... and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise RewardError("\n".join(problems[:MOST_SHOWN]) + more)
    return results


class CommandListener(SpeechListener):
    """A program (rewards/program.py)."""

    def __init__(self, command: str, wants: str, cache: Path | None, **limits: Any) -> None:
        self.program = Program(command, **limits)
        super().__init__(f"command:{command}", wants, self.program.version, cache)
        self.faults = self.program.faults

    def answers(self, sounds: Mapping[str, Heard]) -> list[Any]:
        results: dict[str, Any] = {}
        keys, lines = {}, []
        with clip_paths() as path:
            for key, sound in sounds.items():
                try:
                    place = {} if sound.clip is None else {"path": path(sound.clip)}
                except AudioError as error:
                    results[key] = AnswerError(str(error))
                    continue
                keys[sound.id] = key
                text = {"text": sound.text} if sound.text else {}
                lines.append({"id": sound.id, **place, "language": sound.language, **text})
            found = self.program.ask(lines, self.read, lambda name, answer: self.keep(keys[name], answer))
        results |= zip(keys.values(), found, strict=True)
        return [results[key] for key in sounds]


class LocalListener(SpeechListener):
    """A model in this process: `load` gives what hears (waves, rate in Hz, language) -> answers, when it is needed."""

    def __init__(self, spec: str, wants: str, cache: Path | None, load: Callable[[str], Callable[..., Any]]) -> None:
        path = spec.partition(":")[2]
        super().__init__(spec, wants, weights_sha256(path) or "of the hub", cache)
        self.load, self.ears, self.path = load, None, path

    def answers(self, sounds: Mapping[str, Heard]) -> list[Any]:
        results: dict[str, Any] = {}
        for language in dict.fromkeys(sound.language for sound in sounds.values()):
            keys = [key for key, sound in sounds.items() if sound.language == language]
            for start in range(0, len(keys), BATCH):
                batch = keys[start : start + BATCH]
                results |= zip(batch, self._batch([sounds[key] for key in batch], language), strict=True)
                for key in batch:
                    if not isinstance(results[key], AnswerError):
                        self.keep(key, results[key])
        return [results[key] for key in sounds]

    def _batch(self, sounds: Sequence[Heard], language: str) -> list[Any]:
        heard: dict[int, tuple[np.ndarray, int]] = {}
        results: dict[int, Any] = {}
        for place, sound in enumerate(sounds):
            try:
                if sound.clip is None:
                    raise AudioError(f"{sound.id}: no sound to listen to")
                heard[place] = decode(sound.clip)
            except AudioError as error:
                results[place] = AnswerError(str(error))
        try:
            self.ears = self.ears or self.load(self.path)
            answers = self.ears(list(heard.values()), language) if heard else []
            results |= {place: self._usable(answer) for place, answer in zip(heard, answers, strict=True)}
        except Exception as error:  # out of memory, say: these are lost, and said, not the batches before
            self.faults[type(error).__name__] += 1
            lost = AnswerError(f"{self.name}: {type(error).__name__}: {shown(error)}")
            results |= dict.fromkeys(heard, lost)
        return [results[place] for place in range(len(sounds))]

    def _usable(self, answer: Mapping[str, Any]) -> Any:
        try:
            return self.read(answer)
        except ValueError as error:
            self.faults["an unusable answer"] += 1
            return AnswerError(f"{self.name} answered: {error}")


def listener_from_spec(spec: str, wants: str = "text", *, keep: bool = True) -> SpeechListener:
    """The engine of a spec; `wants` is one of ANSWERS, `keep`: its answers, on disk.

    Raises:
        RewardError: it is none of the forms, which are listed, or there is no such program or file.
    """
    from covo_rl.speech.recognisers import RECOGNISERS

    kind, _, rest = spec.partition(":")
    cache = cache_folder() / "listeners" if keep else None
    if kind == "file" and rest:
        return FileListener(Path(rest), wants)
    if kind == "command" and rest:
        return CommandListener(rest, wants, cache)
    if kind in RECOGNISERS and rest and wants == "text":
        return LocalListener(spec, wants, cache, RECOGNISERS[kind])
    raise RewardError(f"{spec!r} names no engine: write {FORMS.get(wants, FORMS['other'])}")
