"""From a waveform to the log-mel segments of the Covo-Audio encoder, one clip at a time.

24 kHz mono -> whole 10 ms frames, zero-padded to 20 ms -> segments of `segment_frames` -> each segment on its own to
16 kHz, zero-padded to full length, log-mel after OpenAI's Whisper recipe. A clip's features depend on that clip
alone, so a batch cannot change them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from covo_rl.models.covo_audio.mel import mel_filters
from covo_rl.models.covo_audio.resampling import resample

FRAMES_PER_SECOND = 100
MAX_CHANNELS = 8  # an axis this short is taken for channels when the orientation has to be found


@lru_cache(maxsize=8)
def _window(n_fft: int) -> torch.Tensor:
    return torch.hann_window(n_fft)


def mono_float(waveform: Any, name: str = "clip") -> torch.Tensor:
    """Any array of samples as mono float32 `(samples,)`.

    Takes `(samples,)`, `(samples, channels)` or `(channels, samples)`; integer PCM is scaled to [-1, 1); exactly two
    channels are averaged. Raises ValueError that begins with `name` for no samples, more than two channels, complex
    or non-numeric data, NaN or infinite samples.
    """
    samples = (
        waveform.detach().cpu() if isinstance(waveform, torch.Tensor) else torch.from_numpy(_array(waveform, name))
    )
    if samples.is_complex():
        raise ValueError(f"{name}: complex samples; expected a real waveform")
    if samples.numel() == 0:
        raise ValueError(f"{name}: no samples (shape {tuple(samples.shape)})")
    samples = _scaled(samples)
    if samples.ndim == 2:
        samples = _averaged(samples, name)
    if samples.ndim != 1:
        raise ValueError(f"{name}: shape {tuple(samples.shape)}; expected (samples,) or (samples, 2)")
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples)).sum())
        raise ValueError(f"{name}: {bad} of {samples.numel()} samples are NaN or infinite")
    return samples


def _array(waveform: Any, name: str) -> np.ndarray:
    array = np.asarray(waveform)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: array of dtype {array.dtype}; expected real samples, float or integer PCM")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ValueError(f"{name}: {array.dtype} samples have no usual zero level; convert them to float first")
    if array.dtype == np.float16 or array.dtype.itemsize > 8 or array.dtype.kind == "b":
        array = array.astype(np.float32)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _scaled(samples: torch.Tensor) -> torch.Tensor:
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    if not samples.is_floating_point():
        return (samples.double() / -torch.iinfo(samples.dtype).min).float()
    return samples.float()


def _averaged(samples: torch.Tensor, name: str) -> torch.Tensor:
    rows, columns = samples.shape
    if rows <= MAX_CHANNELS < columns:
        samples = samples.T
    channels = samples.shape[1]
    if channels > 2:
        raise ValueError(
            f"{name}: {channels} channels (shape {rows} x {columns}); the model takes mono, or stereo which is "
            "averaged. Mix or choose the channels yourself"
        )
    return samples.mean(1)


class CovoAudioFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to log-mel segments and the mask of the adapter rows that fill audio slots.

    `feature_size` mel bins; `sampling_rate` of the waveform path and `feature_sampling_rate` of the mel, Hz;
    `segment_frames` mel frames per segment, 10 ms each; `slot_frames` mel frames per audio slot.
    """

    model_input_names = ["input_features", "input_features_mask"]  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 24000,
        feature_sampling_rate: int = 16000,
        segment_frames: int = 3000,
        slot_frames: int = 16,
        n_fft: int = 400,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.feature_sampling_rate = feature_sampling_rate
        self.segment_frames = segment_frames
        self.slot_frames = slot_frames
        self.n_fft = n_fft

    @classmethod
    def from_model_config(cls, config: Any) -> CovoAudioFeatureExtractor:
        """The extractor that belongs to a CovoAudioConfig."""
        return cls(
            feature_size=config.encoder_config.num_mel_bins,
            sampling_rate=config.sampling_rate,
            feature_sampling_rate=config.feature_sampling_rate,
            segment_frames=config.segment_frames,
            slot_frames=config.slot_frames,
        )

    @property
    def frame_samples(self) -> int:
        """Samples of 10 ms at `sampling_rate`."""
        return self.sampling_rate // FRAMES_PER_SECOND

    @property
    def segment_slots(self) -> int:
        """Adapter rows of a full segment (published: 188)."""
        return math.ceil(self.segment_frames / self.slot_frames)

    def frame_counts(self, samples: int) -> list[int]:
        """Mel frames of each segment of a clip of `samples` at `sampling_rate`, after crop and pad."""
        frames = samples // self.frame_samples
        frames += frames % 2
        full, rest = divmod(frames, self.segment_frames)
        return [self.segment_frames] * full + ([rest] if rest else [])

    def slot_counts(self, samples: int) -> list[int]:
        """Adapter rows that each segment contributes; their sum is the clip's number of audio slots.

        A full segment is counted as `segment_frames / slot_frames` slots (187.5) but yields a whole number of rows
        (188), so rows can exceed the clip's `ceil(frames / slot_frames)`: the first ones are kept.
        """
        frames = self.frame_counts(samples)
        left = math.ceil(sum(frames) / self.slot_frames)
        counts = []
        for segment in frames:
            counts.append(min(math.ceil(segment / self.slot_frames), left))
            left -= counts[-1]
        return counts

    def waveform(self, waveform: Any, rate: int, name: str = "clip") -> torch.Tensor:
        """Checked mono float32 at `sampling_rate`, cropped to 10 ms and padded to 20 ms.

        Raises ValueError that begins with `name` for unusable samples (see `mono_float`) or less than 10 ms.
        """
        samples = resample(mono_float(waveform, name), rate, self.sampling_rate)
        frames = samples.shape[0] // self.frame_samples
        if frames == 0:
            milliseconds = 1000 * samples.shape[0] / self.sampling_rate
            raise ValueError(f"{name}: {milliseconds:.2f} ms of audio; a clip needs at least 10 ms")
        samples = samples[: frames * self.frame_samples]
        return F.pad(samples, (0, (frames % 2) * self.frame_samples))

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """One segment `(samples,)` at `sampling_rate` -> log-mel (M, segment_frames) float32."""
        rate, hop = self.feature_sampling_rate, self.feature_sampling_rate // FRAMES_PER_SECOND
        signal = resample(samples, self.sampling_rate, rate, kernel_dtype=torch.float64)[: self.segment_frames * hop]
        # Frames that see only the zero padding all equal log10(1e-10); they are filled in, not computed.
        frames = min(self.segment_frames, math.ceil((signal.shape[0] + self.n_fft) / hop))
        signal = F.pad(signal, (0, frames * hop - signal.shape[0]))
        spectrum = torch.stft(signal, self.n_fft, hop, window=_window(self.n_fft), return_complex=True)
        power = spectrum[:, :-1].abs() ** 2
        logs = (mel_filters(self.n_fft, self.feature_size, rate) @ power).clamp(min=1e-10).log10()
        logs = F.pad(logs, (0, self.segment_frames - frames), value=-10.0)
        return (torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0

    def clip(self, waveform: Any, rate: int, name: str = "clip") -> tuple[torch.Tensor, torch.Tensor]:
        """One clip -> segments (K, M, F) float32 and the mask (K, segment_slots) of the rows that fill slots.

        Raises ValueError that begins with `name` for audio that cannot be used.
        """
        samples = self.waveform(waveform, rate, name)
        size = self.segment_frames * self.frame_samples
        features = torch.stack([self.log_mel(segment) for segment in samples.split(size)])
        counts = torch.tensor(self.slot_counts(samples.shape[0]))
        return features, torch.arange(self.segment_slots)[None, :] < counts[:, None]

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str | None = None,
        names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Clips -> `input_features` (K, M, F), `input_features_mask` (K, rows), `segment_clips` (K,).

        `raw_speech` is one waveform or a list; `sampling_rate` in Hz, one or one per clip. Padding options of other
        extractors are accepted and change nothing: segments have one length.
        """
        clips = list(raw_speech) if isinstance(raw_speech, (list, tuple)) else [raw_speech]
        if clips and isinstance(clips[0], (int, float)):
            clips = [np.asarray(raw_speech)]
        rates = self.rates(sampling_rate, len(clips))
        names = names or [f"clip {i}" for i in range(len(clips))]
        parts = [self.clip(wave, rate, name) for wave, rate, name in zip(clips, rates, names, strict=True)]
        data = {
            "input_features": torch.cat([features for features, _ in parts]),
            "input_features_mask": torch.cat([mask for _, mask in parts]),
            "segment_clips": torch.cat([torch.full((len(f),), i) for i, (f, _) in enumerate(parts)]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def rates(self, sampling_rate: int | Sequence[int] | None, count: int) -> list[int]:
        """One rate in Hz per clip; raises ValueError when it is missing or their number is wrong."""
        if sampling_rate is None:
            raise ValueError(
                f"pass sampling_rate in Hz: arrays do not say at which rate they were recorded ({count} given)"
            )
        rates = list(sampling_rate) if isinstance(sampling_rate, Sequence) else [int(sampling_rate)] * count
        if len(rates) != count:
            raise ValueError(f"{len(rates)} sampling rates for {count} clips; give one for all or one each")
        return rates
