"""token2wav: audio codes (25 Hz) to latents (100 Hz) by flow matching, and latents to a 24 kHz wave by a vocoder."""

from covo_rl.models.covo_audio.token2wav.configuration import Token2WavConfig
from covo_rl.models.covo_audio.token2wav.decoder import Token2Wav
from covo_rl.models.covo_audio.token2wav.inputs import CodesError

__all__ = ["CodesError", "Token2Wav", "Token2WavConfig"]
