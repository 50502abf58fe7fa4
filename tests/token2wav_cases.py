"""The published decoder, tiny and of random weights, and what it gave: shared by the tests of token2wav."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from covo_rl.models.covo_audio.token2wav import Token2Wav

FOLDER = Path(__file__).parent / "fixtures" / "token2wav"
REFERENCE = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "reference.npz").items()}
CODES = REFERENCE["target_token"]
VOICE = {
    "prompt_codes": REFERENCE["prompt_token"],
    "prompt_latent": REFERENCE["prompt_latent"],
    "speaker": REFERENCE["speaker_embed"],
}


@cache
def decoder(dtype: torch.dtype = torch.float32) -> Token2Wav:
    """Shared: a test that changes weights loads its own."""
    return Token2Wav.from_pretrained(FOLDER, dtype=dtype)


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference; shapes must agree."""
    assert first.shape == second.shape
    return float((first - second).detach().abs().max())
