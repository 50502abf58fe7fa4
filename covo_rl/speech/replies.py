"""Codes of spoken replies -> words and sound, as rewards take them.

Every model is loaded once in a process. Replies are heard in batches of like lengths; what one raises, or has no time
for, is an error of its replies and of no others, as a judge's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.models.builtin import resolve_model
from covo_rl.rewards.call import seconds_left
from covo_rl.rewards.judge import local_device
from covo_rl.rewards.specs import RewardError, load_reward
from covo_rl.speech.grid import CODE_FRAMES, CODE_SAMPLES, RATE
from covo_rl.types import UserError, shown

TOKENIZER, DECODER = "builtin:speech_tokenizer", "builtin:speech_decoder"
FEWEST = 3  # codes of a reply that can be speech: 0.12 s
BATCH = 8  # replies that are synthesised and heard at once
#: what hears: waves, each (T,) float32, and their rate in Hz -> one result each
Ears = Callable[[list[np.ndarray], int], Sequence[Any]]


class ReplyError(UserError, RuntimeError):
    """A reply was not heard; the message says why."""


def unheard(
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


def heard(
    codes_NL: Sequence[Sequence[int]], recogniser: str | Ears, tokenizer: str, decoder: str
) -> list[Any | ReplyError]:
    """The words of each reply: `codes` reads the codes, `wave` hears the sound of them, MODULE:FUNCTION or a function
    is given the sound."""
    if recogniser == "codes":
        read = tokenizer_at(tokenizer).transcribe
        return in_batches(lambda batch: list(map(read, batch)), codes_NL, "recogniser codes")
    ears = _retold(tokenizer) if recogniser == "wave" else ears_at(recogniser)
    return in_batches(lambda batch: ears(reply_waves(batch, decoder), RATE), codes_NL, f"recogniser {recogniser}")


def in_batches(
    function: Callable[[list[Sequence[int]]], Sequence[Any]], codes_NL: Sequence[Sequence[int]], who: str
) -> list[Any | ReplyError]:
    """Results of `function`, one a reply, called with at most BATCH replies of like lengths."""
    order = sorted(range(len(codes_NL)), key=lambda i: len(codes_NL[i]))
    results: list[Any | ReplyError] = [ReplyError(f"{who}: no time left in this step")] * len(order)
    longest = 0.0
    for start in range(0, len(order), BATCH):
        places, left = order[start : start + BATCH], seconds_left()
        if left <= longest:
            break
        try:
            answers = list(function([codes_NL[i] for i in places]))
            if len(answers) != len(places):
                raise ValueError(f"{len(answers)} results for {len(places)} replies")
        except Exception as error:  # of a model or a function of the user's: lost, and said, not the other batches
            answers = [ReplyError(f"{who}: {type(error).__name__}: {shown(error)}")] * len(places)
        for i, answer in zip(places, answers, strict=True):
            results[i] = answer
        longest = max(longest, left - seconds_left()) if left < float("inf") else 0.0
    return results


def reply_waves(codes_BL: Sequence[Sequence[int]], decoder: str) -> list[np.ndarray]:
    """The sound of each reply, (960 L,) float32 at 24 kHz; the same codes are always the same sound."""
    import torch

    model = decoder_at(decoder)
    rows = [torch.tensor(codes, dtype=torch.int64) for codes in codes_BL]
    frames = CODE_FRAMES * max(map(len, rows))
    noise_ZE = torch.randn(frames, model.config.flow.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        waves_B1T = model.synthesise(rows, noise=noise_ZE.expand(len(rows), -1, -1))
    return [
        wave[0, : CODE_SAMPLES * len(codes)].float().cpu().numpy()
        for wave, codes in zip(waves_B1T, rows, strict=True)
    ]


@cache
def tokenizer_at(folder: str) -> Any:
    """The speech tokenizer of a folder or of `builtin:NAME`."""
    from covo_rl.speech.tokenizer import SpeechTokenizer

    return SpeechTokenizer.from_pretrained(resolve_model(folder)).to(local_device()).eval()


@cache
def decoder_at(folder: str) -> Any:
    """The decoder of a folder or of `builtin:NAME`."""
    from covo_rl.models.covo_audio.token2wav import Token2Wav

    return Token2Wav.from_pretrained(resolve_model(folder)).to(local_device()).eval()


@cache
def ears_at(spec: str | Ears) -> Ears:
    """What hears waves: a function, MODULE:FUNCTION or ./FILE.py:FUNCTION (of a class, with its arguments, an object),
    or the folder of a transformers checkpoint that classifies audio, which gives {label: probability}.

    Raises:
        RewardError: it is none of these, or does not load.
    """
    if not isinstance(spec, str):
        return spec
    if Path(spec).expanduser().is_dir():
        return AudioClassifier(Path(spec).expanduser())
    if ":" not in spec:
        raise RewardError(
            f"{spec!r} hears nothing: it is no folder (an audio-classification checkpoint of transformers), and no "
            "module:function or ./file.py:function, called with a list of waves and their rate in Hz"
        )
    return load_reward(spec).function


def _retold(folder: str) -> Ears:
    """The tokenizer's own ears: waves become codes again, which are read."""
    tokenizer = tokenizer_at(folder)
    return lambda waves, _: [tokenizer.transcribe(codes) for codes in tokenizer.encode(waves)]


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
