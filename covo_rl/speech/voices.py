"""A decoder by name, with the voice of a speaker's folder, of a recording, or nobody's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from covo_rl.audio import decode, resample
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.voice import PROMPT_FILES, Voice
from covo_rl.speech import SHIPPED_DECODER, SHIPPED_TOKENIZER
from covo_rl.speech.grid import RATE
from covo_rl.types import Clip


def open_voice(
    decoder: str | os.PathLike[str] | Token2Wav | Voice = SHIPPED_DECODER,
    speaker: str | os.PathLike[str] | None = None, *, tokenizer: str | os.PathLike[str] = SHIPPED_TOKENIZER,
    device: Any = "cpu", **options: Any,
) -> Voice:  # fmt: skip
    """`decoder` is a folder, `builtin:speech_decoder`, or loaded already; `options` are those of `synthesise`.

    `speaker`: a folder with the files of a prompt (prompt_token.npy ...), or a recording, whose codes are those of
    `tokenizer`; without one the prompt that lies beside the decoder, else nobody's voice. A Voice stays as it is.

    Raises:
        WeightsError: no decoder, or a damaged one.
        CodesError, AudioError: the speaker does not fit, or cannot be read.
    """
    if isinstance(decoder, Voice):
        return decoder
    if not isinstance(decoder, Token2Wav):
        folder = Path(resolve_model(os.fspath(decoder)))
        decoder = Token2Wav.from_pretrained(folder, device=device)
        if speaker is None and any((folder / name).is_file() for name in PROMPT_FILES.values()):
            speaker = folder
    if speaker is None:
        return Voice(decoder, options)
    if os.path.isdir(speaker):
        return Voice.from_folder(decoder, os.fspath(speaker), **options)
    from covo_rl.speech.latents import voice_of
    from covo_rl.speech.tokenizer import SpeechTokenizer

    wave_T = resample(*decode(Clip(path=os.fspath(speaker))), RATE)
    encoder = SpeechTokenizer.from_pretrained(resolve_model(os.fspath(tokenizer)), device)
    return Voice(decoder, {**voice_of(wave_T, encoder, decoder), **options})
