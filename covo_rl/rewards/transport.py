"""A judge's address and key, and clips as it is sent them; data/transport.py has the exchange itself."""

from __future__ import annotations

import base64
import io
import os
import wave
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from covo_rl.audio import AudioError, decode, resample
from covo_rl.data.transport import MAX_SECONDS, address_problem, hidden, key_in
from covo_rl.rewards.specs import RewardError
from covo_rl.types import Clip

KEY_VARIABLES = ("COVO_RL_JUDGE_KEY", "OPENAI_API_KEY")
HINTS: dict[int, str] = dict.fromkeys((401, 403), f"; is the key in {' or '.join(KEY_VARIABLES)} the right one?")
HINTS |= {404: "; is the address right (most end in /v1), and is that the model's name at the server?"}
AUDIO_RATE = 16_000  # Hz, of clips for a judge
MAX_AUDIO = 20_000_000  # bytes of base64 in one request


def judge_key() -> str:
    """The endpoint's key from the environment, without white space around it; "" if there is none.

    Raises:
        RewardError: no header can hold it; the message does not show it.
    """
    try:
        return next(filter(None, (key_in(os.environ.get(name, ""), name) for name in KEY_VARIABLES)), "")
    except ValueError as error:
        raise RewardError(str(error)) from None


def env_limit(name: str, default: float) -> float:
    """Raises RewardError: the variable holds no number that a timer and a socket can take."""
    text = os.environ.get(name) or str(default)
    with suppress(ValueError):
        if 0 < float(text) <= MAX_SECONDS:
            return float(text)
    raise RewardError(f"{name} is {text!r}: write a number above 0 and up to {MAX_SECONDS:g}")


def check_address(url: str) -> None:
    """Raises RewardError unless it is the plain http(s) address of a host: it stands in records, so no secret may."""
    if problem := address_problem(url):
        key = f", and put the key into {KEY_VARIABLES[0]}" if "password" in problem else ""
        raise RewardError(f"judge address {hidden(url)!r}: {problem}{key}")


def audio_parts(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Clips as the `input_audio` parts of an OpenAI-style message.

    Raises:
        AudioError: a clip cannot be decoded, or they are longer than MAX_AUDIO.
    """
    sounds = [base64_wav(clip) for clip in clips]
    if (size := sum(map(len, sounds))) > MAX_AUDIO:
        names, minutes = ", ".join(clip.name for clip in clips), MAX_AUDIO * 3 / 4 / 2 / AUDIO_RATE / 60
        raise AudioError(
            f"{names}: {size / 1e6:.1f} MB as base64 of a {AUDIO_RATE} Hz wav; a judge is sent at most "
            f"{MAX_AUDIO / 1e6:g} MB (about {minutes:.0f} minutes): shorten the clips, or leave judge_audio out"
        )
    return [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}} for sound in sounds]


def base64_wav(clip: Clip) -> str:
    """The clip as a wav file, mono, 16 bits, AUDIO_RATE Hz. Raises AudioError: it cannot be decoded."""
    waveform, rate = decode(clip)
    samples = np.clip(np.rint(resample(waveform, rate, AUDIO_RATE) * 32_767), -32_768, 32_767).astype("<i2")
    with io.BytesIO() as file:
        with wave.open(file, "wb") as wav:
            wav.setparams((1, 2, AUDIO_RATE, 0, "NONE", ""))
            wav.writeframes(samples.tobytes())
        return base64.b64encode(file.getvalue()).decode()
