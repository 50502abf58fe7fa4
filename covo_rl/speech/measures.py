"""Is it speech? Measures of codes and of waves: words, tones, pitch, intelligibility.

A probe is a ridge regression on the labels, so it reads what lies linearly in the features and learns nothing deep.
A probe of mel spectra that is trained on recordings alone judges synthesised speech independently of the tokenizer,
whose own head reads its own codes too kindly.

STOI (Taal et al., IEEE TASLP 19, 2011) needs pystoi, PESQ (ITU-T P.862.2) the package pesq.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from covo_rl.audio import resample
from covo_rl.speech.grid import FRAME_SAMPLES, RATE, pad_to_codes
from covo_rl.speech.pitch import track_f0
from covo_rl.types import UserError

Word = tuple[str, float, float]
#: Hz of what PESQ hears
PESQ_RATE = 16_000


class MissingMeasure(UserError, ImportError):
    """A measure whose package is not installed."""


def package(name: str, measure: str, install: str = "pip install 'covo-rl[speech]'") -> Any:
    """The module that a measure needs; raises MissingMeasure where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingMeasure(f"{measure} need the package {name}: {install}") from error


def code_use(codes: Iterable[Sequence[int]], size: int) -> float:
    """Share of the codebook's `size` codes that occur at all."""
    return len({int(code) for clip in codes for code in clip}) / size


def corpus_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Errors of all clips per word of all references.

    Raises:
        MissingMeasure: jiwer is not installed.
    """
    return float(package("jiwer", "word error rates").wer(list(references), list(hypotheses)))


def word_features(frames_ZE: np.ndarray, words: Sequence[Word], rate: float, parts: int = 6) -> np.ndarray:
    """(words, parts * E): each word's frames, cut into equal parts, the mean of each. `rate`: frames a second."""
    rows = []
    for _, start, end in words:
        edges = np.linspace(start * rate, end * rate, parts + 1)
        # a part holds the frames that it touches, at least the one it lies in
        first = np.clip(edges[:-1].astype(int), 0, len(frames_ZE) - 1)
        last = np.clip(np.ceil(edges[1:]).astype(int), first + 1, len(frames_ZE))
        rows.append(np.concatenate([frames_ZE[a:b].mean(axis=0) for a, b in zip(first, last, strict=True)]))
    return np.array(rows)


def mel_features(wave_T: np.ndarray, words: Sequence[Word]) -> np.ndarray:
    """(words, 384): `word_features` of the log-mel of a 24 kHz wave, which no tokenizer or decoder has touched."""
    import torch

    from covo_rl.models.covo_audio.token2wav.mel import log_mel

    mel_ZE = log_mel(torch.from_numpy(np.asarray(wave_T, dtype=np.float32))[None])[0].numpy()
    return word_features(mel_ZE, words, RATE / FRAME_SAMPLES)


class LinearProbe:
    """Labels read linearly from features: ridge regression on one column a label, over standardised features."""

    def __init__(self, features_NE: np.ndarray, labels: Sequence[str], ridge: float = 30.0) -> None:
        self.labels = sorted(set(labels))
        self.mean_E, self.scale_E = features_NE.mean(axis=0), features_NE.std(axis=0) + 1e-6
        targets = np.array(self.labels) == np.array(labels)[:, None]
        inputs = self._standardise(features_NE)
        self.weight = np.linalg.solve(inputs.T @ inputs + ridge * np.eye(inputs.shape[1]), inputs.T @ targets)

    def _standardise(self, features_NE: np.ndarray) -> np.ndarray:
        return np.hstack([(features_NE - self.mean_E) / self.scale_E, np.ones((len(features_NE), 1))])

    def name(self, features_NE: np.ndarray) -> list[str]:
        """The most likely label of every row."""
        return [self.labels[i] for i in (self._standardise(features_NE) @ self.weight).argmax(axis=1)]

    def accuracy(self, features_NE: np.ndarray, labels: Sequence[str]) -> float:
        """Share of rows that it names rightly."""
        return float(np.mean([a == b for a, b in zip(self.name(features_NE), labels, strict=True)]))


@dataclass(frozen=True)
class PitchErrors:
    """`semitones`: median distance; `contour`: each clip's mean set right. `correlation`: within a clip, on average.
    `voicing`: share of frames that agree on it."""

    semitones: float
    correlation: float
    voicing: float
    contour: float


def pitch_errors(truth: Sequence[np.ndarray], heard: Sequence[np.ndarray]) -> PitchErrors:
    """Compare F0 tracks in Hz, 0 where unvoiced, clip by clip and frame by frame.

    Distance and correlation (of log F0) take the frames that are voiced in both; a clip with fewer than 10 of them
    correlates by 0, so that a decoder that whispers gains nothing.

    Raises:
        ValueError: two tracks differ in length.
    """
    distances, shapes, correlations, agreed = [np.zeros(0)], [np.zeros(0)], [], [np.zeros(0)]
    for true_Z, heard_Z in zip(truth, heard, strict=True):
        if len(true_Z) != len(heard_Z):
            raise ValueError(f"tracks of {len(true_Z)} and {len(heard_Z)} frames: both must be of the same clip")
        both = (true_Z > 0) & (heard_Z > 0)
        a, b = np.log2(true_Z[both]), np.log2(heard_Z[both])
        distances.append(12 * np.abs(a - b))
        shapes.append(12 * np.abs(a - b - (a - b).mean()) if len(a) else a)
        varies = len(a) >= 10 and a.std() > 0 and b.std() > 0
        correlations.append(float(np.corrcoef(a, b)[0, 1]) if varies else 0.0)
        agreed.append((true_Z > 0) == (heard_Z > 0))
    median, contour = (
        float(np.median(d)) if len(d) else float("inf") for d in map(np.concatenate, (distances, shapes))
    )
    return PitchErrors(median, float(np.mean(correlations)), float(np.mean(np.concatenate(agreed))), contour)


def stoi(clean_T: np.ndarray, heard_T: np.ndarray, rate: int = RATE) -> float:
    """Short-time objective intelligibility, about 0 to 1, of a wave beside the one that it should be.

    Raises:
        MissingMeasure: pystoi is not installed.
        ValueError: the waves differ in length.
    """
    measure = package("pystoi", "STOI").stoi
    _same_length(clean_T, heard_T)
    return float(measure(clean_T, heard_T, rate))


def pesq(clean_T: np.ndarray, heard_T: np.ndarray, rate: int = RATE) -> float:
    """Perceived quality, 1 to 4.6, wide band, of a wave beside the one that it should be.

    Raises:
        MissingMeasure: pesq is not installed.
        ValueError: the waves differ in length.
    """
    measure = package("pesq", "PESQ", "pip install pesq, which compiles C").pesq
    _same_length(clean_T, heard_T)
    clean, heard = (resample(wave, rate, PESQ_RATE) for wave in (clean_T, heard_T))
    return float(measure(PESQ_RATE, clean, heard, "wb"))


def _same_length(clean_T: np.ndarray, heard_T: np.ndarray) -> None:
    if len(clean_T) != len(heard_T):
        raise ValueError(f"waves of {len(clean_T)} and {len(heard_T)} samples: both must be of the same clip")


def measure_tokenizer(tokenizer: Any, rows: Sequence[Any]) -> dict[str, float]:
    """What codes of rows tell by the tokenizer's own heads. F0 is the row's own where that is known, else tracked.

    `wer`; `code_use`; `pitch_semitones`: median distance of the contour on voiced frames; `voicing`: share of frames.
    """
    waves = [row.wave() for row in rows]
    codes = tokenizer.encode(waves)
    texts = [tokenizer.pieces.normal(row.text) for row in rows]
    distances, agreed = [], []
    for row, wave_T, row_codes in zip(rows, waves, codes, strict=True):
        f0_Z = row.source.get("f0_Z")
        f0_Z = track_f0(pad_to_codes(wave_T), RATE) if f0_Z is None else np.asarray(f0_Z)
        probability_Z, octaves_Z = (part.cpu().numpy() for part in tokenizer.contour(row_codes))
        voiced_Z = f0_Z > 0
        agreed.append(voiced_Z == (probability_Z > 0.5))
        if voiced_Z.any():
            true = np.log2(f0_Z[voiced_Z])
            distances.append(12 * np.abs(octaves_Z[voiced_Z] - (true - true.mean())))
    return {
        "wer": corpus_error_rate(texts, [tokenizer.transcribe(row_codes) for row_codes in codes]),
        "code_use": code_use([row_codes.tolist() for row_codes in codes], len(tokenizer.codebook)),
        "pitch_semitones": float(np.median(np.concatenate(distances))) if distances else float("inf"),
        "voicing": float(np.mean(np.concatenate(agreed))),
    }
