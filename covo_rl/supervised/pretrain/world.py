"""A tiny world for pre-training: speech, text, dialogues and recordings of a new voice, in the counting language.

    text.jsonl           what a text model reads, and then does not forget
    numbers.jsonl        one utterance each, of digits that follow from nothing
    counting.jsonl       documents of three utterances that count on
    dialogues.jsonl      questions, written or spoken, and answers in named voices
    recordings.jsonl     dull lines in the voice of nobody in the dialogues
    voices.jsonl         the same lines in every voice that a system message can name
    asked_words.jsonl    recordings, and what is asked about what they say; asked_voices.jsonl: about how they sound
    test_*.jsonl         numbers, counting and questions of voices that nothing is trained on

Rows are those of every task: waves beside them, exact times of words, codes of one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from covo_rl.data.files import json_line, write_atomically
from covo_rl.data.terminal import say
from covo_rl.speech.rows import write_speech_rows
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.supervised.pretrain.builder import INSTRUCTIONS
from covo_rl.synth.counting import (
    NAMES,
    Talker,
    answer_line,
    counting_lines,
    dull_line,
    new_talker,
    number_line,
    questions,
    talkers,
    text_line,
)
from covo_rl.synth.speech import DIGITS, Utterance, write_wav

BATCH = 32  # utterances that are encoded at once
#: every file draws from its own stream of random numbers
STREAMS = ("text", "numbers", "counting", "dialogues", "recordings", "test_numbers", "test_counting", "test_dialogues",
           "voices", "asked_words", "asked_voices")  # fmt: skip


@dataclass(frozen=True)
class WorldSizes:
    """Rows of each file; of counting, documents. `voices` of the training split speak, the named ones first."""

    text: int = 12_000
    numbers: int = 1400
    counting: int = 120
    dialogues: int = 300
    recordings: int = 240
    voices_lines: int = 30
    test_numbers: int = 100
    test_counting: int = 60
    test_dialogues: int = 60
    asked_words: int = 60
    asked_voices: int = 60
    voices: int = 16


def write_world(
    folder: Path, tokenizer: SpeechTokenizer, seed: int = 0, sizes: WorldSizes | None = None
) -> dict[str, Path]:
    """Render all files into `folder`: name -> JSONL. Row `i` of a file depends on (seed, file, i) only.

    Voices and lines of the tests come from the test split of voices and from streams of their own.
    """
    sizes = sizes or WorldSizes()
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in STREAMS}
    text = (
        {"id": f"text-{i}", "text": text_line(_rng(seed, "text", i), INSTRUCTIONS["asr"])} for i in range(sizes.text)
    )
    write_atomically(paths["text"], lambda file: file.writelines(map(json_line, text)))
    heard, unheard = talkers("train", seed, NAMES)[: sizes.voices], talkers("test", seed)
    nora = new_talker(seed)
    lines = {
        "numbers": _numbers("numbers", sizes.numbers, heard, seed),
        "counting": _counting("counting", sizes.counting, heard, seed),
        "voices": _same_lines(sizes.voices_lines, [*heard[: len(NAMES)], nora], seed),
        "recordings": _recordings(sizes.recordings, nora, seed),
        "test_numbers": _numbers("test_numbers", sizes.test_numbers, unheard, seed),
        "test_counting": _counting("test_counting", sizes.test_counting, unheard, seed),
    }
    for name, spoken in lines.items():
        say(f"rendering {name}")
        write_speech_rows(paths[name], encoded(folder, spoken, tokenizer))
    for name, askers in (("dialogues", heard[len(NAMES) :] or heard), ("test_dialogues", unheard)):
        say(f"rendering {name}")
        rows = _dialogues(name, getattr(sizes, name), askers, heard[: len(NAMES)], seed)
        write_speech_rows(paths[name], _with_speech(folder, rows, tokenizer))
    for name in ("asked_words", "asked_voices"):
        say(f"rendering {name}")
        write_speech_rows(paths[name], _asked(folder, name, getattr(sizes, name), heard, seed))
    return paths


def _rng(seed: int, stream: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS.index(stream), index, 18])


# -- what is said, and by whom ----------------------------------------------------------------------------------

_T = TypeVar("_T")
Line = tuple[dict[str, Any], Utterance]


def _numbers(name: str, count: int, voices: Sequence[Talker], seed: int) -> Iterator[Line]:
    for i in range(count):
        rng = _rng(seed, name, i)
        voice = voices[int(rng.integers(len(voices)))]
        yield {"id": f"{name}-{i}", "speaker": voice.name}, voice.say(number_line(rng), rng)


def _counting(name: str, count: int, voices: Sequence[Talker], seed: int) -> Iterator[Line]:
    for i in range(count):
        rng = _rng(seed, name, i)
        voice = voices[int(rng.integers(len(voices)))]
        for position, line in enumerate(counting_lines(rng)):
            row = {"id": f"{name}-{i}-{position}", "speaker": voice.name, "document": f"{name}-{i}"}
            yield row | {"position": position}, voice.say(line, rng)


def _recordings(count: int, voice: Talker, seed: int) -> Iterator[Line]:
    for i in range(count):
        rng = _rng(seed, "recordings", i)
        yield {"id": f"recordings-{i}", "speaker": voice.name}, voice.say(dull_line(rng), rng)


def _same_lines(count: int, voices: Sequence[Talker], seed: int) -> Iterator[Line]:
    for voice in voices:
        for i in range(count):
            rng = _rng(seed, "voices", i)
            yield (
                {"id": f"voices-{voice.name}-{i}", "speaker": voice.name, "position": i},
                voice.say(counting_lines(rng)[0], rng),
            )


def _dialogues(
    name: str, count: int, askers: Sequence[Talker], voices: Sequence[Talker], seed: int
) -> Iterator[tuple[dict[str, Any], Utterance | None, Utterance]]:
    """(row, what is asked aloud or None, the answer): every second question is written."""
    for i in range(count):
        rng = _rng(seed, name, i)
        asker, voice = (voices_[int(rng.integers(len(voices_)))] for voices_ in (askers, voices))
        row = {"id": f"{name}-{i}", "speaker": voice.name}
        if i % 2:
            asked, answer = answer_line(rng)
            yield row, asker.say(asked, rng), voice.say(answer, rng)
        else:
            asked, answer = questions()[int(rng.integers(len(questions())))]
            yield row | {"asked": asked}, None, voice.say(answer, rng)


def _asked(folder: Path, name: str, count: int, voices: Sequence[Talker], seed: int) -> Iterator[dict[str, Any]]:
    """Dialogues of a recording, a written question about its words or its voice, and a written answer."""
    for i in range(count):
        rng = _rng(seed, name, i)
        voice = voices[int(rng.integers(len(voices)))]
        said = voice.say(number_line(rng), rng)
        digits = [word for word, _, _ in said.words]
        words = [("What is said?", said.text), ("How many digits are said?", f"{DIGITS[len(digits)]}."),
                 ("Which digit is the last?", f"{digits[-1].strip(',.')}.")]  # fmt: skip
        voice_only = [("How does the voice move?", f"{voice.melody}."), ("Who speaks?", f"{voice.name}.")]
        asked = voice_only if name == "asked_voices" else words
        question, answer = asked[int(rng.integers(len(asked)))]
        row = {"id": f"{name}-{i}", "turns": [
            {"role": "user", "audio": f"audio/{name}-{i}.wav", "text": question},
            {"role": "assistant", "text": answer}]}  # fmt: skip
        write_wav(folder / row["turns"][0]["audio"], said.wave)
        yield row


# -- waves and codes --------------------------------------------------------------------------------------------


def encoded(folder: Path, lines: Iterable[Line], tokenizer: SpeechTokenizer) -> Iterator[dict[str, Any]]:
    """Rows of speech of what is said: the wave written to `folder/audio`, its codes in the row."""
    digest = tokenizer.digest()
    for batch in _batches(lines):
        codes = tokenizer.encode([said.wave for _, said in batch])
        for (row, said), row_codes in zip(batch, codes, strict=True):
            path = f"audio/{row['id']}.wav"
            write_wav(folder / path, said.wave)
            yield {**row, "audio": path, "text": said.text, "language": "en", "words": said.words,
                   "codes": row_codes.tolist(), "tokenizer": digest}  # fmt: skip


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _with_speech(
    folder: Path, rows: Iterable[tuple[dict[str, Any], Utterance | None, Utterance]], tokenizer: SpeechTokenizer
) -> Iterator[Mapping[str, Any]]:
    digest = tokenizer.digest()
    for batch in _batches(rows):
        codes = tokenizer.encode([answer.wave for _, _, answer in batch])
        for (row, asked, answer), row_codes in zip(batch, codes, strict=True):
            user: dict[str, Any] = {"role": "user", "text": asked.text if asked else row.pop("asked")}
            if asked:
                user["audio"] = f"audio/{row['id']}.wav"
                write_wav(folder / user["audio"], asked.wave)
            reply = {"role": "assistant", "text": answer.text, "codes": row_codes.tolist(), "tokenizer": digest}
            yield {**row, "turns": [user, reply]}
