"""Options of the training of a decoder, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.config import option
from covo_rl.speech.training import read_options

LIMITS = {
    "[1, inf)": "clips flow_frames vocoder_batch save_steps",
    "[16, 1000000]": "sequence_frames vocoder_frames",
    "[0, 1000000000]": "seed",
    "[0, inf)": "flow_steps vocoder_steps warmup_steps weight_decay pitch_weight workers cache_mb",
    "(0, inf)": "flow_learning_rate vocoder_learning_rate max_grad_norm pitch_gain",
}


@dataclass
class DecoderTraining:
    """`data`: rows of speech with audio and, better, speaker; nothing for `clips` utterances of built-in digits.

    Rows that have codes have those of `tokenizer`; the others are encoded first. `start`: a decoder's folder to go on
    from, for example to train its flow after its vocoder: a part with 0 steps stays as it is.

    A sequence of the flow is of one speaker, `sequence_frames` long, now and then a third shorter or longer;
    `flow_frames` are in a batch. `pitch_gain` is how much larger than the mel the normalised F0 is, beside the same
    noise, and `pitch_weight` what its error counts.
    """

    output: str = "runs/speech_decoder"
    data: str | None = None
    audio_dir: str | None = None
    clips: int = 1000
    tokenizer: str = "builtin:speech_tokenizer"
    start: str | None = None
    shape: str = option("tiny", "the size of it", choices=["tiny", "published"])
    latent: str = option("mel_pitch", "what a latent frame holds", choices=["mel", "mel_pitch"])
    vocoder: str = option("harmonic", "what makes the wave", choices=["harmonic", "bigvgan", "griffin_lim"])
    discriminators: bool = False
    seed: int = 0
    flow_steps: int = 3000
    flow_frames: int = 1024
    sequence_frames: int = 384
    flow_learning_rate: float = 1.5e-3
    pitch_weight: float = 6.0
    pitch_gain: float = 2.0
    vocoder_steps: int = 300
    vocoder_batch: int = 8
    vocoder_frames: int = 64
    vocoder_learning_rate: float = 2e-3
    warmup_steps: int = 30
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dtype: str = option("float32", "what the flow computes in", choices=["float32", "bfloat16"])
    workers: int = 0
    cache_mb: float = 2048
    save_steps: int = 1000
    resume: bool = False
    overwrite: bool = False

    @property
    def steps(self) -> int:
        """Updates in all: the vocoder's, then the flow's."""
        return self.vocoder_steps + self.flow_steps


def read_decoder_training(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> DecoderTraining:
    """The options of a decoder's training, as `read_options` reads them."""
    return read_options(DecoderTraining, "decoder", LIMITS, path, overrides, _rules)


def _rules(config: DecoderTraining) -> list[tuple[bool, str]]:
    trains_vocoder = config.vocoder_steps > 0
    return [
        (config.steps > 0, "flow_steps and vocoder_steps are both 0: there is nothing to train"),
        (config.vocoder != "harmonic" or config.latent == "mel_pitch", "vocoder harmonic needs latent mel_pitch"),
        (config.vocoder != "griffin_lim" or not trains_vocoder,
         "vocoder griffin_lim has no weights to train: set vocoder_steps 0"),
        (not config.discriminators or trains_vocoder, "discriminators need vocoder_steps"),
        (config.flow_frames >= config.sequence_frames * 4 // 3,
         f"flow_frames {config.flow_frames} holds no sequence of {config.sequence_frames * 4 // 3}, the longest"),
    ]  # fmt: skip
