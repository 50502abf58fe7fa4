"""The only place that decodes, downmixes, resamples and names audio: soundfile and soxr, numpy, no torch.

    clip -> decode -> (waveform float32 mono, rate) -> resample

`content_key` names the stored content of a clip (cheap, for caches), `audio_fingerprint` the decoded sound (for
comparing data sets), `ClipStore` keeps decoded clips within a memory budget. Whatever is wrong with a clip is one
`AudioError` that starts with the clip's name; nothing is replaced by silence, cut, or read in part.
"""

from covo_rl.audio.decode import AudioError, decode, decode_channels, resample, to_mono
from covo_rl.audio.lengths import resampled_length, stored_length
from covo_rl.audio.store import ClipStore, audio_fingerprint, content_key

__all__ = [
    "AudioError", "ClipStore", "audio_fingerprint", "content_key", "decode", "decode_channels", "resample",
    "resampled_length", "stored_length", "to_mono",
]  # fmt: skip
