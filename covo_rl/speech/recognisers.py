"""Speech recognisers of this machine: sounds -> text and, where the model tells them, the times of its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from covo_rl.audio import resample
from covo_rl.rewards.judge import local_device

RATE = 16_000  # Hz, of both


class WhisperRecogniser:
    """A Whisper checkpoint of transformers, greedy. No words where its generation_config names no alignment heads."""

    def __init__(self, path: str) -> None:
        from transformers import pipeline

        self.pipe: Any = pipeline("automatic-speech-recognition", model=path, device=local_device())
        self.settings: Any = self.pipe.model.generation_config

    def __call__(self, sounds: Sequence[tuple[np.ndarray, int]], language: str = "") -> list[dict[str, Any]]:
        """{"text", "words"?} of each (wave, rate in Hz); `language` is told to a model that knows several."""
        aligned = getattr(self.settings, "alignment_heads", None) is not None
        told = bool(language) and getattr(self.settings, "is_multilingual", False)
        inputs = [{"raw": resample(wave, rate, RATE), "sampling_rate": RATE} for wave, rate in sounds]
        answers = self.pipe(
            inputs, return_timestamps="word" if aligned else True,
            generate_kwargs={"do_sample": False, **({"language": language, "task": "transcribe"} if told else {})},
        )  # fmt: skip
        return [
            {"text": answer["text"].strip(), **({"words": _words(answer)} if aligned else {})} for answer in answers
        ]


def _words(answer: dict[str, Any]) -> list[dict[str, Any]]:
    spans = [(chunk["text"].strip(), *chunk["timestamp"]) for chunk in answer.get("chunks", ())]
    return [{"text": text, "start": start, "end": end} for text, start, end in spans]


class ParaformerRecogniser:
    """A Paraformer, by the package funasr. Words are its units (Chinese characters), where it gives each a time."""

    def __init__(self, path: str) -> None:
        try:
            from funasr import AutoModel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("funasr:PATH needs the package funasr: pip install funasr") from error
        self.model: Any = AutoModel(model=path, device=local_device(), disable_update=True, disable_pbar=True)

    def __call__(self, sounds: Sequence[tuple[np.ndarray, int]], language: str = "") -> list[dict[str, Any]]:
        """{"text", "words"?} of each (wave, rate in Hz); the language is the model's own."""
        results = [self.model.generate(input=resample(wave, rate, RATE), fs=RATE)[0] for wave, rate in sounds]
        return [_timed(str(result["text"]), result.get("timestamp")) for result in results]


def _timed(text: str, times: Sequence[Sequence[float]] | None) -> dict[str, Any]:
    """`times` are [start, end] of each unit in milliseconds."""
    units = text.split()
    if not times or len(times) != len(units):
        return {"text": text}
    spans = zip(units, times, strict=True)
    return {"text": text, "words": [{"text": unit, "start": a / 1000, "end": b / 1000} for unit, (a, b) in spans]}


#: kind of a spec -> what loads it from a folder or hub name
RECOGNISERS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "transformers": WhisperRecogniser, "funasr": ParaformerRecogniser,
}  # fmt: skip
