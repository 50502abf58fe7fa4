"""What would spoil a run, found before it starts: rows that cannot be used, and rows that give held-out rows away.

| overlap  | serious | meaning                                                                               |
|----------|---------|---------------------------------------------------------------------------------------|
| row      | yes     | same sound, same question, same choices, same answer (or, without audio, same text)   |
| audio    | yes     | same sound, whatever is asked                                                         |
| near     | no      | almost surely the same recording after lossy coding or resampling (only if asked for) |
| question | no      | same question and choices about other sound: normal where questions are templates     |

Sounds are compared by `audio_fingerprint`, texts normalised (`rows.normalized`), choices in any order. There is at most
one finding of each kind per held-out row; it names the first training row and counts the others.

Near copies have candidates by spectrum and proof by waveform. A clip is brought to 8 kHz; its outline is the log
energy in 16 time segments x 16 bands, unit length, and outlines that agree make a candidate. It is confirmed when the
waveforms themselves correlate over 0.98 at some lag of up to 0.1 s (codecs add delay), so that two takes of the same
kind of sound are not confused: their phases and noise differ.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from covo_rl.audio import AudioError, ClipStore, audio_fingerprint, decode, resample
from covo_rl.data.read import Problem, printable, some
from covo_rl.data.rows import normalized
from covo_rl.types import TAG_TOKENS, Clip, Example, visible

#: Decoding, hashing and numpy release the interpreter lock; more threads than this only hold more clips in memory.
_THREADS = min(8, os.cpu_count() or 1)
Kind = Literal["row", "audio", "near", "question"]
_MEANING = {
    "row": "asks the same about the same sound as",
    "audio": "has the same sound as",
    "near": "has almost the same sound as",
    "question": "asks the same, about another sound, as",
}
RATE = 8_000
SEGMENTS = BANDS = 16
#: Cosine of outlines, and correlation of waveforms.
OUTLINE, WAVEFORM = 0.9, 0.98
MAX_LAG = 0.1
_WINDOW = 256
#: A clip whose samples swing by less is silent; one with so large a share at full scale is clipped.
SILENT, FULL_SCALE, CLIPPED = 1e-4, 0.999, 1e-3
#: Levels are mixed from so many decibels on.
LEVELS = 20


@dataclass(frozen=True)
class Facts:
    """Of a clip: length, rate in Hz, half its range and root mean square about its mean, share of samples at full
    scale and fingerprint as decoded, or in `error` why it cannot be used."""

    clip: Clip
    seconds: float = 0.0
    rate: int = 0
    peak: float = 0.0
    level: float = 0.0
    clipped: float = 0.0
    fingerprint: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Overlap:
    """A held-out row and the first of `count` training rows that it shares something with."""

    kind: Kind
    held_out_id: str
    train_id: str
    count: int = 1

    @property
    def serious(self) -> bool:
        """Whether an evaluation on that row would reward memory."""
        return self.kind in ("row", "audio")

    def __str__(self) -> str:
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return visible(f"held-out row {self.held_out_id} {_MEANING[self.kind]} training row {self.train_id}{more}")


def row_problems(examples: Sequence[Example], max_clip_seconds: float | None = None) -> list[Problem]:
    """Duplicate ids, answers that are not among the choices or hold a tag of the reply, and clips that are missing,
    broken or too long.

    Every clip is decoded in full: a header says nothing about what follows it.
    """
    ids = Counter(example.id for example in examples)
    problems = [Problem(name, f"{count} rows have this id") for name, count in ids.items() if count > 1]
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        answer, choices = example.answer, example.choices
        is_choice = answer is None or answer in choices or normalized(answer) in map(normalized, choices)
        if choices and not is_choice:
            what = f"its answer {printable(answer)} is not among the choices {printable(list(choices), 200)}"
            problems.append(Problem(example.id, what))
        for text in dict.fromkeys((*choices, answer or "")):
            if tags := [tag for tag in TAG_TOKENS if tag in text]:
                what = f"{printable(text)} holds {', '.join(tags)}: no reply could name it inside <answer>; reword it"
                problems.append(Problem(example.id, what))
        for facts in clips:
            what = facts.error
            if max_clip_seconds is not None and facts.seconds > max_clip_seconds:
                what = f"{facts.clip.name}: {facts.seconds:.2f} s long, at most {max_clip_seconds:g} s can be taken"
                what += ": shorten it, or train with --long_audio crop or chunk"
            if what is not None:
                problems.append(Problem(example.id, what))
    return problems


def duplicate_rows(examples: Sequence[Example]) -> list[Problem]:
    """Rows that ask the same question with the same choices about the same sound as an earlier row."""
    first: dict[Hashable, Example] = {}
    problems = []
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        if any(facts.error is not None for facts in clips):
            continue
        earlier = first.setdefault((_text_key(example), *(facts.fingerprint for facts in clips)), example)
        if earlier is example:
            continue
        what = f"asks the same about the same sound as row {earlier.id}"
        if normalized(example.answer or "") != normalized(earlier.answer or ""):
            what += f", and answers {printable(example.answer)} where that answers {printable(earlier.answer)}"
        problems.append(Problem(example.id, what))
    return problems


def clip_notes(examples: Sequence[Example]) -> list[str]:
    """What a listener would remark on: silent and clipped clips, mixed rates and levels, one sound in several files.

    One line for each kind; none of them keeps a row from being used.
    """
    clips = {facts.clip.path or facts.fingerprint: facts for row in facts_by_row(examples) for facts in row}
    heard = [facts for facts in clips.values() if facts.error is None]
    loud = [facts for facts in heard if facts.peak >= SILENT]
    files: dict[str, list[str]] = defaultdict(list)
    for facts in loud:
        files[facts.fingerprint].append(facts.clip.name)
    copies = [f"{name} ({names[0]})" for names in files.values() for name in names[1:]]
    rates = Counter(facts.rate for facts in heard).most_common()
    low, high = (20 * np.log10(end([facts.level for facts in loud], default=1.0)) for end in (min, max))
    kinds = {
        f"silent, no sample over {SILENT:g}": [facts.clip.name for facts in heard if facts.peak < SILENT],
        f"clipped, over {CLIPPED:.1%} of the samples at full scale":
            [facts.clip.name for facts in loud if facts.clipped > CLIPPED],
        "the sound of another file": copies,
    }  # fmt: skip
    notes = [f"{len(group)} of {len(heard)} clips: {what}: {some(group)}" for what, group in kinds.items() if group]
    if len(rates) > 1:
        notes.append("mixed sampling rates: " + ", ".join(f"{rate} Hz ({count})" for rate, count in rates))
    if high - low > LEVELS:
        notes.append(f"mixed levels: from {low:.0f} to {high:.0f} dB of full scale (root mean square)")
    return notes


def overlap(train: Sequence[Example], held_out: Sequence[Example], *, near: bool = False) -> list[Overlap]:
    """What held-out rows share with training rows, in the order of the held-out rows.

    A clip that cannot be decoded is left out here: `row_problems` reports it. `near` also looks for the same
    recording after lossy coding or resampling, which decodes and compares spectra.
    """
    train_facts, held_out_facts = facts_by_row(train), facts_by_row(held_out)
    rows: dict[tuple[Kind, Hashable], list[int]] = defaultdict(list)
    for number, (example, clips) in enumerate(zip(train, train_facts, strict=True)):
        for key in _keys(example, clips):
            rows[key].append(number)
    near_copies = _near_copies(train_facts, held_out_facts) if near else {}
    result: list[Overlap] = []
    for place, (example, clips) in enumerate(zip(held_out, held_out_facts, strict=True)):
        shared: dict[Kind, list[int]] = {
            "row": [],
            "audio": [],
            "near": sorted(near_copies.get(place, ())),
            "question": [],
        }
        for key in _keys(example, clips):
            shared[key[0]] += rows.get(key, ())
        kinds: tuple[Kind, ...] = ("row",) if shared["row"] else ("audio",) if shared["audio"] else ("near", "question")
        for kind in kinds:
            if numbers := list(dict.fromkeys(shared[kind])):
                result.append(Overlap(kind, example.id, train[numbers[0]].id, len(numbers)))
    return result


def _text_key(example: Example) -> Hashable:
    """Question and choices as compared: normalised, in any order of the choices."""
    return normalized(example.question), tuple(sorted(map(normalized, example.choices)))


def _keys(example: Example, clips: Sequence[Facts]) -> Iterator[tuple[Kind, Hashable]]:
    """What a row shares with another one that it overlaps with."""
    text, sounds = _text_key(example), [facts.fingerprint for facts in clips if facts.error is None]
    if len(sounds) == len(clips):
        yield "row", (text, normalized(example.answer or ""), *sounds)
    for sound in sounds:
        yield "audio", sound
    yield "question", text


def facts_by_row(examples: Sequence[Example]) -> list[list[Facts]]:
    """Facts of the clips of every row, each file decoded once per process as long as it does not change."""
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = pool.map(clip_facts, [clip for example in examples for clip in example.clips])
        return [[next(facts) for _ in example.clips] for example in examples]


def sound_of(example: Example, clips: ClipStore) -> str:
    """What rows of the same sound have in common, in whatever order their clips are: the smallest of their keys.

    Of a clip that cannot be read, which `row_problems` reports, it is the name; of a row without clips the id.
    """

    def key(clip: Clip) -> str:
        try:
            return clips.key(clip)
        except AudioError:
            return clip.name

    return min(map(key, example.clips), default=example.id)


def clip_facts(clip: Clip) -> Facts:
    """Facts of one clip, a file decoded once per process as long as it does not change."""
    try:
        state = os.stat(clip.path or "")
    except (OSError, ValueError):
        return _decoded_facts.__wrapped__(clip)
    return _decoded_facts(clip, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1_000_000)
def _decoded_facts(clip: Clip, *version: int) -> Facts:
    try:
        waveform, rate = decode(clip)
    except AudioError as error:
        return Facts(clip, error=str(error))
    high, low = float(waveform.max()), float(waveform.min())
    peak, level = (high - low) / 2, float(waveform.std(dtype=np.float64))  # a constant cannot be heard
    clipped = float((np.abs(waveform) >= FULL_SCALE).mean()) if max(high, -low) >= FULL_SCALE else 0.0
    sound = audio_fingerprint(waveform, rate)
    return Facts(clip, len(waveform) / rate, rate, peak, level, clipped, sound)


def _near_copies(train: Sequence[Sequence[Facts]], held_out: Sequence[Sequence[Facts]]) -> dict[int, set[int]]:
    """Position of a held-out row -> positions of training rows with the same recording."""
    known, others = (
        [(row, facts) for row, clips in enumerate(rows) for facts in clips if facts.error is None]
        for rows in (train, held_out)
    )
    if not known or not others:
        return {}
    store = ClipStore(memory_mb=512)

    def waveform(clip: Clip) -> np.ndarray:
        return resample(*store.waveform(store.key(clip)), RATE)

    outlines = np.stack([_outline(waveform(facts.clip)) for _, facts in known])
    lengths = np.array([facts.seconds for _, facts in known])
    copies: dict[int, set[int]] = defaultdict(set)
    for place, facts in others:
        sound = waveform(facts.clip)
        candidates = (outlines @ _outline(sound) > OUTLINE) & (np.abs(lengths - facts.seconds) < 2 * MAX_LAG)
        for row, other in (known[index] for index in np.flatnonzero(candidates)):
            if _correlation(waveform(other.clip), sound) > WAVEFORM:
                copies[place].add(row)
    return copies


def _outline(waveform: np.ndarray) -> np.ndarray:
    """Unit vector (SEGMENTS * BANDS,), float32: log energies without their mean, so that level does not matter."""
    padded = np.pad(waveform, (0, max(0, _WINDOW * SEGMENTS - len(waveform))))
    frames = padded[: len(padded) // _WINDOW * _WINDOW].reshape(-1, _WINDOW) * np.hanning(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1)[:, : _WINDOW // 2])).reshape(len(frames), BANDS, -1).sum(-1)
    pooled = np.stack([part.mean(axis=0) for part in np.array_split(power, SEGMENTS)])
    values = np.log(pooled + 1e-6 * pooled.max() + 1e-20).reshape(-1)
    values -= values.mean()
    return (values / max(float(np.linalg.norm(values)), 1e-9)).astype(np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute normalised correlation over lags up to MAX_LAG."""
    size = 1 << (len(one) + len(other)).bit_length()
    product = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size)), size)
    lags = int(MAX_LAG * RATE)
    peak = max(np.abs(product[: lags + 1]).max(), np.abs(product[-lags:]).max())
    energy = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(peak) / energy if energy else 0.0
