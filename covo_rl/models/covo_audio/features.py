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
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, mel_to_hertz
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from covo_rl.models.waveform import mono_float, sinc_resample

FRAMES_PER_SECOND = 100


@lru_cache(maxsize=8)
def mel_filters(n_fft: int, mel_bins: int, rate: int) -> torch.Tensor:
    """Whisper's filters (mel_bins, n_fft // 2 + 1) float32 from 0 Hz to half of `rate` (Hz), in Slaney's form.

    The triangles are stored in float32 before their areas are normalised, as librosa does it for the published
    features. Filters rounded once differ in the last bit, which a random decoder magnifies to 3e-4 in a logit.
    """
    triangles = mel_filter_bank(n_fft // 2 + 1, mel_bins, 0.0, rate / 2, rate, mel_scale="slaney")
    edges: Any = mel_to_hertz(np.linspace(0.0, hertz_to_mel(rate / 2, "slaney"), mel_bins + 2), "slaney")
    filters = triangles.T.astype(np.float32, order="C")
    filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters)


class CovoAudioFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to log-mel segments and the mask of the adapter rows that fill audio slots.

    `feature_size` mel bins; `sampling_rate` of the waveform path and `feature_sampling_rate` of the mel, Hz;
    `segment_frames` mel frames per segment, 10 ms each; `slot_frames` mel frames per audio slot.
    """

    model_input_names = ["input_features", "input_features_mask"]  # noqa: RUF012 (transformers' form)

    def __init__(
        self, feature_size: int = 128, sampling_rate: int = 24000, feature_sampling_rate: int = 16000,
        segment_frames: int = 3000, slot_frames: int = 16, n_fft: int = 400, padding_value: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.feature_sampling_rate, self.segment_frames = feature_sampling_rate, segment_frames
        self.slot_frames, self.n_fft = slot_frames, n_fft

    @classmethod
    def from_model_config(cls, config: Any) -> CovoAudioFeatureExtractor:
        """The extractor that belongs to a CovoAudioConfig."""
        names = ("sampling_rate", "feature_sampling_rate", "segment_frames", "slot_frames")
        sizes = {name: getattr(config, name) for name in names}
        return cls(feature_size=config.encoder_config.num_mel_bins, **sizes)

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
        left, counts = math.ceil(sum(frames) / self.slot_frames), []
        for segment in frames:
            counts.append(min(math.ceil(segment / self.slot_frames), left))
            left -= counts[-1]
        return counts

    def waveform(self, waveform: Any, rate: int, name: str = "clip") -> torch.Tensor:
        """Checked mono float32 at `sampling_rate`, cropped to 10 ms and padded to 20 ms.

        Raises ValueError that begins with `name` for unusable samples (see `mono_float`) or less than 10 ms.
        """
        samples = sinc_resample(mono_float(waveform, name), rate, self.sampling_rate)
        frames = samples.shape[0] // self.frame_samples
        if frames == 0:
            milliseconds = 1000 * samples.shape[0] / self.sampling_rate
            raise ValueError(f"{name}: {milliseconds:.2f} ms of audio; a clip needs at least 10 ms")
        samples = samples[: frames * self.frame_samples]
        return F.pad(samples, (0, (frames % 2) * self.frame_samples))

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """One segment `(samples,)` at `sampling_rate` -> log-mel (M, segment_frames) float32."""
        rate, hop = self.feature_sampling_rate, self.feature_sampling_rate // FRAMES_PER_SECOND
        signal = sinc_resample(samples, self.sampling_rate, rate, kernel_dtype=torch.float64)
        signal = signal[: self.segment_frames * hop]
        # Frames that see only the zero padding all equal log10(1e-10); they are filled in, not computed.
        frames = min(self.segment_frames, math.ceil((signal.shape[0] + self.n_fft) / hop))
        signal = F.pad(signal, (0, frames * hop - signal.shape[0]))
        spectrum = torch.stft(signal, self.n_fft, hop, window=torch.hann_window(self.n_fft), return_complex=True)
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
        self, raw_speech: Any, sampling_rate: int | Sequence[int] | None = None, return_tensors: str | None = None,
        names: Sequence[str] | None = None, **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
        """Clips -> `input_features` (K, M, F), `input_features_mask` (K, rows), `segment_clips` (K,).

        `raw_speech` is one waveform or a list; `sampling_rate` in Hz, one or one per clip; `names` go into errors.
        Padding options of other extractors are accepted and change nothing: segments have one length.
        """
        clips = list(raw_speech) if isinstance(raw_speech, (list, tuple)) else [raw_speech]
        if clips and isinstance(clips[0], (int, float)):
            clips = [raw_speech]
        rates = self.rates(sampling_rate, len(clips))
        names = names or [f"clip {i}" for i in range(len(clips))]
        parts = [self.clip(wave, rate, name) for wave, rate, name in zip(clips, rates, names, strict=True)]
        owners = [torch.full((len(mask),), i) for i, (_, mask) in enumerate(parts)]
        features, mask, segment_clips = map(torch.cat, (*zip(*parts, strict=True), owners))
        data = {"input_features": features, "input_features_mask": mask, "segment_clips": segment_clips}
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
