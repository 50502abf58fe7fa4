"""Recordings as the latents of our own decoders, and the voice of a recording as a decoder's prompt.

voice = voice_of(wave, tokenizer, decoder)
decoder.synthesise(codes, **voice)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.token2wav.mel import log_mel
from covo_rl.speech.grid import CODE_FRAMES, RATE, CodeError, pad_to_codes
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.types import UserError

#: log2 F0 (147 Hz) of a clip without any voice
MIDDLE_F0 = 7.2
#: frames of a prompt that a decoder hears: longer ones are dear, and tell it no more
PROMPT_FRAMES = 120


class LatentSpaceError(UserError, ValueError):
    """Latents of a space whose encoder we do not have."""


def latents_of(wave_T: np.ndarray, latent: str) -> Tensor:
    """A 24 kHz wave -> latents (Z, E) float32, not normalised, with zeros behind it up to a whole code.

    `mel`: 64 log-mel bins; `mel_pitch`: then log2 of F0, straight lines through unvoiced frames, and voiced (1) or not.

    Raises:
        LatentSpaceError: `latent` is the published space: its encoder was not released.
    """
    if latent not in ("mel", "mel_pitch"):
        raise LatentSpaceError(f"latent {latent!r}: its encoder was not released, so recordings have no place there; "
                               "decoders of latent mel or mel_pitch can be prompted by recordings")  # fmt: skip
    padded_T = pad_to_codes(np.asarray(wave_T, dtype=np.float32))
    mel_ZE = log_mel(torch.from_numpy(padded_T)[None])[0]
    if latent == "mel":
        return mel_ZE
    f0_Z = track_f0(padded_T, RATE)
    voiced = f0_Z > 0
    line_Z = np.full(len(f0_Z), MIDDLE_F0)
    if voiced.any():
        line_Z = np.interp(np.arange(len(f0_Z)), np.flatnonzero(voiced), np.log2(f0_Z[voiced]))
    pitch_Z2 = np.stack([line_Z, voiced], axis=1).astype(np.float32)
    return torch.cat([mel_ZE, torch.from_numpy(pitch_Z2)], dim=1)


def speaker_of(normalised_ZE: Tensor) -> Tensor:
    """The speaker vector (E,) of our own decoders: twice the mean of a clip's normalised latents."""
    return 2 * normalised_ZE.mean(dim=0)


def voice_of(wave_T: np.ndarray, tokenizer: SpeechTokenizer, decoder: Token2Wav) -> dict[str, Any]:
    """`prompt_codes`, `prompt_latent` and `speaker` of a recording, for `decoder.synthesise` and its like.

    The prompt is its first 1.2 s, the speaker vector that of the whole.

    Raises:
        LatentSpaceError: the decoder's latents are the published ones.
        CodeError: the decoder was trained on codes of another tokenizer, or has another speaker vector.
    """
    decoder.check_tokenizer(tokenizer.digest())
    latents_ZE = decoder.normalise(latents_of(wave_T, decoder.config.latent).to(decoder.mean_E.device))
    if decoder.config.flow.spkr_embed_dim != latents_ZE.shape[1]:
        raise CodeError(f"the decoder's speaker vector has {decoder.config.flow.spkr_embed_dim} numbers and comes from "
                        f"an encoder of its own; the mean of latents has {latents_ZE.shape[1]}")  # fmt: skip
    (codes_L,) = tokenizer.encode([wave_T])
    frames = min(PROMPT_FRAMES, len(latents_ZE))
    return {
        "prompt_codes": codes_L[None, : frames // CODE_FRAMES],
        "prompt_latent": latents_ZE[None, :frames],
        "speaker": speaker_of(latents_ZE)[None],
    }
