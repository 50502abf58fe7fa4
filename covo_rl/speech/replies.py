"""Codes of spoken replies -> words and sound, as rewards take them.

Every model is loaded once in a process. Replies are heard in batches of like lengths; what one raises, or has no time
for, is an error of its replies and of no others, as a judge's is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.rewards.call import seconds_left
from covo_rl.rewards.judge import local_device
from covo_rl.rewards.replies import AnswerError
from covo_rl.rewards.specs import RewardError, load_reward
from covo_rl.speech import SHIPPED_TOKENIZER
from covo_rl.speech.grid import CODE_SAMPLES, RATE
from covo_rl.speech.listeners import Heard, SpeechListener, listener_from_spec
from covo_rl.speech.recognisers import RECOGNISERS
from covo_rl.types import Clip, shown

FEWEST = 3  # codes of a reply that can be speech: 0.12 s
BATCH = 8  # replies that are synthesised and heard at once
#: what hears: waves, each (T,) float32, and their rate in Hz -> one result each
Ears = Callable[[list[np.ndarray], int], Sequence[Any]]


def score_silence(
    codes_NL: Sequence[Sequence[int]], speak: Sequence[Any] | None, log_missing: Callable[[int, str], None] | None
) -> dict[int, float | None]:
    """Scores of replies that nobody needs to hear: 0 with fewer than FEWEST codes, None where the row asks for none."""
    scores: dict[int, float | None] = {i: 0.0 for i, codes in enumerate(codes_NL) if len(codes) < FEWEST}
    for i, asked in enumerate(speak or ()):
        if asked is False:
            scores[i] = None
            if log_missing:
                log_missing(i, "the row asks for no speech (`speak` is false)")
    return scores


def hear_words(
    codes_NL: Sequence[Sequence[int]], recogniser: str | Ears, tokenizer: str, decoder: str, speaker: str | None = None
) -> list[Any]:
    """The words of each reply: `codes` reads the codes, `wave` hears the sound of them, whoever else `ears_at` names is
    given the sound."""
    if not codes_NL:
        return []
    if recogniser == "codes":
        read = tokenizer_at(tokenizer).transcribe
        return map_batches(lambda batch: list(map(read, batch)), codes_NL, "recogniser codes")
    ears = _ears_of(tokenizer_at(tokenizer)) if recogniser == "wave" else ears_at(recogniser, "text")
    return hear_sound(codes_NL, ears, voice_at(decoder, speaker, tokenizer), f"recogniser {recogniser}")


def hear_sound(codes_NL: Sequence[Sequence[int]], ears: Ears, voice: Any, who: str) -> list[Any]:
    """What `ears` make of the sound of each reply in a `voice`; `who` they are in an error."""
    if isinstance(ears, EngineEars):  # which starts a program, say: once
        waves = map_batches(lambda batch: speak_replies(batch, voice), codes_NL, who)
        heard = iter(ears([wave for wave in waves if not isinstance(wave, AnswerError)], RATE))
        return [wave if isinstance(wave, AnswerError) else next(heard) for wave in waves]
    return map_batches(lambda batch: ears(speak_replies(batch, voice), RATE), codes_NL, who)


def map_batches(
    function: Callable[[list[Sequence[int]]], Sequence[Any]], codes_NL: Sequence[Sequence[int]], who: str
) -> list[Any]:
    """Results of `function`, an AnswerError where it gave none, called with at most BATCH replies of like lengths."""
    order = sorted(range(len(codes_NL)), key=lambda i: len(codes_NL[i]))
    results: list[Any] = [AnswerError(f"{who}: no time left in this step")] * len(order)
    longest = 0.0
    for start in range(0, len(order), BATCH):
        places, begun = order[start : start + BATCH], time.monotonic()
        if seconds_left() <= longest:
            break
        try:
            answers = list(function([codes_NL[i] for i in places]))
            if len(answers) != len(places):
                raise ValueError(f"{len(answers)} results for {len(places)} replies")
        except Exception as error:  # of a model or a function of the user's: lost, and said, not the other batches
            answers = [AnswerError(f"{who}: {type(error).__name__}: {shown(error)}")] * len(places)
        for i, answer in zip(places, answers, strict=True):
            results[i] = answer
        longest = max(longest, time.monotonic() - begun)
    return results


def speak_replies(codes_BL: Sequence[Sequence[int]], voice: Any) -> list[np.ndarray]:
    """The sound of each reply, (960 L,) float32 at 24 kHz, less what the voice's prompt overruns; equal codes are
    equal sounds."""
    waves_B1T = voice.decoder.synthesise([list(codes) for codes in codes_BL], **voice.options).float().cpu().numpy()
    lost = max(map(len, codes_BL)) * CODE_SAMPLES - waves_B1T.shape[-1]
    return [wave_1T[0, : len(codes) * CODE_SAMPLES - lost] for wave_1T, codes in zip(waves_B1T, codes_BL, strict=True)]


@cache
def tokenizer_at(folder: str) -> Any:
    """The speech tokenizer of a folder or of `builtin:NAME`."""
    from covo_rl.speech.tokenizer import SpeechTokenizer

    return SpeechTokenizer.from_pretrained(folder, local_device())


@cache
def voice_at(decoder: str, speaker: str | None = None, tokenizer: str = SHIPPED_TOKENIZER) -> Any:
    """As `open_voice`: a decoder, with the voice of a speaker's folder or recording if one is named."""
    from covo_rl.speech.voices import open_voice

    return open_voice(decoder, speaker, tokenizer=tokenizer, device=local_device())


@cache
def ears_at(spec: str | Ears, wants: str = "text") -> Ears:
    """What hears waves: a function, MODULE:FUNCTION or ./FILE.py:FUNCTION (of a class, with its arguments, an object),
    the folder of a transformers checkpoint that classifies audio, which gives {label: probability}, or an engine
    (listeners.py) whose text or score is wanted.

    Raises:
        RewardError: it is none of these, or does not load.
    """
    if not isinstance(spec, str):
        return spec
    if Path(spec).expanduser().is_dir():
        return AudioClassifier(Path(spec).expanduser())
    if spec.startswith(("command:", *(f"{kind}:" for kind in RECOGNISERS))):
        return EngineEars(listener_from_spec(spec, wants, keep=False), wants)
    if ":" not in spec:
        raise RewardError(
            f"{spec!r} hears nothing: it is no folder (an audio-classification checkpoint of transformers), no engine "
            "(command:PROGRAM), and no module:function or ./file.py:function, called with a list of waves and their "
            "rate in Hz"
        )
    return load_reward(spec).function


def _ears_of(tokenizer: Any) -> Ears:
    """A tokenizer's own: waves become codes again, which are read."""
    return lambda waves, _: [tokenizer.transcribe(codes) for codes in tokenizer.encode(waves)]


class EngineEars:
    """An engine (listeners.py) as ears: the text or the score of each wave, or an AnswerError."""

    def __init__(self, listener: SpeechListener, wants: str) -> None:
        self.listener, self.wants = listener, wants

    def __call__(self, waves: list[np.ndarray], rate: int) -> list[Any]:
        sounds = [Heard(str(i), Clip(array=wave, sampling_rate=rate)) for i, wave in enumerate(waves)]
        answers = self.listener.hear(sounds)
        return [answer if isinstance(answer, AnswerError) else answer[self.wants] for answer in answers]


class AudioClassifier:
    """A transformers checkpoint that classifies audio: waves -> {label: probability} of each.

    Raises:
        RewardError: its labels have no names, or it gives no distribution over them.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        self.extractor: Any = AutoFeatureExtractor.from_pretrained(folder)
        self.model: Any = AutoModelForAudioClassification.from_pretrained(folder).to(local_device()).eval()
        config = self.model.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        if config.problem_type not in (None, "single_label_classification"):
            raise RewardError(f"{folder}: a model for {config.problem_type} gives no distribution over its labels")
        if any(label.startswith("LABEL_") for label in self.labels):
            raise RewardError(f"{folder}: its labels are {', '.join(self.labels)}; write their names into config.json")

    def __call__(self, waves: list[np.ndarray], rate: int) -> list[Mapping[str, float]]:
        import torch

        from covo_rl.audio import resample

        waves = [resample(wave, rate, self.extractor.sampling_rate) for wave in waves]
        # without a mask what is padded would be heard, and a reply's score would hang on the others of its batch
        pieces = [waves] if self.extractor.return_attention_mask else [[wave] for wave in waves]
        rows: list[list[float]] = []
        for piece in pieces:
            inputs = self.extractor(
                piece, sampling_rate=self.extractor.sampling_rate, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                logits_BK = self.model(**inputs.to(self.model.device)).logits
            rows += logits_BK.float().softmax(-1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]
