"""What a clip looks like: its waveform as peaks, and its mel spectrogram as a small PNG."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np

SLICES, FRAMES, BINS = 200, 200, 48
#: dB below the loudest bin that are shown
RANGE = 70.0
_VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)


def peaks(waveform: np.ndarray) -> list[int]:
    """Lowest and highest sample of each of SLICES parts, in turn, of (samples,): 127 is the loudest of the clip."""
    edges = np.linspace(0, len(waveform), min(SLICES, len(waveform)) + 1).astype(int)[:-1]
    pairs = np.stack([np.minimum.reduceat(waveform, edges), np.maximum.reduceat(waveform, edges)], axis=1)
    return np.rint(127 * pairs / max(float(np.abs(waveform).max()), 1e-9)).astype(int).ravel().tolist()


def mel_picture(sound: np.ndarray, rate: int) -> dict[str, Any]:
    """`frames`, `bins` and `png` (bytes) of (samples,) at `rate` Hz: low frequencies below, bright is loud.

    At most FRAMES frames of at least 8 ms, so that a picture of a long clip is as small.
    """
    hop = max(rate // 125, -(-len(sound) // FRAMES))
    window = max(512, 2 * hop)
    padded = np.pad(sound, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(sound) : hop]
    power_FM = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32))) ** 2 @ _mel_filters(window, rate)
    decibels_MF = 10 * np.log10(np.maximum(power_FM, 1e-10)).T[::-1]
    levels_MF = np.clip((decibels_MF - decibels_MF.max()) / RANGE + 1, 0, 1)
    picture = np.rint(15 * levels_MF).astype(np.uint8)
    return {"frames": picture.shape[1], "bins": picture.shape[0], "png": png(picture)}


@lru_cache(maxsize=32)
def _mel_filters(window: int, rate: int) -> np.ndarray:
    """(window // 2 + 1, BINS), by transformers, without torch."""
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(window // 2 + 1, BINS, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")


def png(levels_HW: np.ndarray) -> bytes:
    """uint8 levels 0 to 15 as a PNG of four bits a pixel, in the colours of viridis."""
    height, width = levels_HW.shape
    even = np.pad(levels_HW, ((0, 0), (0, width % 2)))
    packed = np.pad(even[:, ::2] << 4 | even[:, 1::2], ((0, 0), (1, 0)))  # each row begins with its filter: none

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    parts = (b"IHDR", header), (b"PLTE", bytes.fromhex(_VIRIDIS)), (b"IDAT", zlib.compress(packed.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")
