"""Do training rows give held-out rows away?

| kind     | serious | meaning                                                                               |
|----------|---------|---------------------------------------------------------------------------------------|
| row      | yes     | same sound, same question, same choices, same answer (or, without audio, same text)   |
| audio    | yes     | same sound, whatever is asked                                                         |
| near     | no      | almost surely the same recording after lossy coding or resampling (only if asked for) |
| question | no      | same question and choices about other sound: normal where questions are templates     |

Sounds are compared by `audio_fingerprint`, texts normalised (`rows.normalized`), choices in any order. There is at
most one finding of each kind per held-out row; it names the first training row and counts the others.

Near copies have candidates by spectrum and proof by waveform. A clip is brought to 8 kHz; its outline is the log
energy in 16 time segments x 16 bands, unit length, and outlines that agree make a candidate. It is confirmed when the
waveforms themselves correlate over 0.98 at some lag of up to 0.1 s (codecs add delay), so that two takes of the same
kind of sound are not confused: their phases and noise differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from covo_rl.audio import ClipStore, resample
from covo_rl.data.check import Facts, facts_by_row, text_key
from covo_rl.data.rows import normalized
from covo_rl.types import Clip, Example

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
        return f"held-out row {self.held_out_id} {_MEANING[self.kind]} training row {self.train_id}{more}"


def overlap(train: Sequence[Example], held_out: Sequence[Example], *, near: bool = False) -> list[Overlap]:
    """What held-out rows share with training rows, in the order of the held-out rows.

    A clip that cannot be decoded is left out here: `row_problems` reports it. `near` also looks for the same
    recording after lossy coding or resampling, which decodes and compares spectra.
    """
    train_facts, held_out_facts = facts_by_row(train), facts_by_row(held_out)
    by_sound: dict[str, list[int]] = defaultdict(list)
    by_text: dict[Hashable, list[int]] = defaultdict(list)
    for index, (example, clips) in enumerate(zip(train, train_facts, strict=True)):
        by_text[text_key(example)].append(index)
        for facts in clips:
            by_sound[facts.fingerprint].append(index)
    by_sound.pop("", None)  # clips with errors
    near_copies = _near_copies(_clips(train, train_facts), _clips(held_out, held_out_facts)) if near else {}
    result: list[Overlap] = []
    for place, (example, clips) in enumerate(zip(held_out, held_out_facts, strict=True)):
        text = by_text.get(text_key(example), [])
        same = [i for i in text if _same_sound_and_answer(train[i], train_facts[i], example, clips)]
        sound = list(dict.fromkeys(i for facts in clips for i in by_sound.get(facts.fingerprint, ())))
        groups: list[tuple[Kind, list[int]]] = [
            ("row", same),
            ("audio", [] if same else sound),
            ("near", [] if sound else sorted(near_copies.get(place, ()))),
            ("question", [] if same or sound else text),
        ]
        result += [Overlap(kind, example.id, train[rows[0]].id, len(rows)) for kind, rows in groups if rows]
    return result


def _same_sound_and_answer(one: Example, facts: Sequence[Facts], other: Example, other_facts: Sequence[Facts]) -> bool:
    sounds, other_sounds = ([clip.fingerprint for clip in clips] for clips in (facts, other_facts))
    same_answer = normalized(one.answer or "") == normalized(other.answer or "")
    return same_answer and sounds == other_sounds and "" not in sounds


def _clips(examples: Sequence[Example], facts: Sequence[Sequence[Facts]]) -> list[tuple[int, Clip, float]]:
    """(position of the row, clip, seconds) of every clip that can be decoded."""
    rows = enumerate(zip(examples, facts, strict=True))
    pairs = [(i, clip, fact) for i, (row, of_row) in rows for clip, fact in zip(row.clips, of_row, strict=True)]
    return [(i, clip, fact.seconds) for i, clip, fact in pairs if fact.error is None]


def _near_copies(
    train: Sequence[tuple[int, Clip, float]], held_out: Sequence[tuple[int, Clip, float]]
) -> dict[int, set[int]]:
    """Position of a held-out row -> positions of training rows with the same recording."""
    if not train or not held_out:
        return {}
    store = ClipStore(memory_mb=512)

    def waveform(clip: Clip) -> np.ndarray:
        return resample(*store.waveform(store.key(clip)), RATE)

    outlines = np.stack([_outline(waveform(clip)) for _, clip, _ in train])
    lengths = np.array([seconds for _, _, seconds in train])
    copies: dict[int, set[int]] = defaultdict(set)
    for place, clip, seconds in held_out:
        sound = waveform(clip)
        candidates = (outlines @ _outline(sound) > OUTLINE) & (np.abs(lengths - seconds) < 2 * MAX_LAG)
        for index in np.flatnonzero(candidates):
            row, other, _ = train[int(index)]
            if _correlation(waveform(other), sound) > WAVEFORM:
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
