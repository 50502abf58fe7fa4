"""Each clip is encoded once: audio embeddings by content, in memory within a budget, then on disk.

With a frozen encoder and adapter the embeddings serve sampling, every scoring pass, every inner iteration and later
epochs. Where one of them trains, they are made anew inside every pass that needs gradients, still once per clip.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily, ClipFeatures

MIB = 2**20


class FeatureStore:
    """Audio embeddings (S, D) by content key.

    `memory_mb` bounds the embeddings kept in memory (CPU, the encoder's dtype); older ones move to safetensors files
    in a folder of their own that vanishes with the store. `rows_per_call` bounds one encoder call: by default 64, but
    one clip where embeddings are stored on a CPU. There a resumed run repeats every bit; which clips share a call
    depends on what is stored already, and matrix products of another height differ in the last bit. `encoded_rows`
    counts encoder rows (segments) and `encoded_clips` clips computed so far.
    """

    def __init__(
        self,
        family: AudioFamily,
        clips: ClipStore | None,
        memory_mb: float = 512,
        *,
        frozen: bool = True,
        rows_per_call: int | None = None,
    ) -> None:
        self.family, self.clips, self.frozen = family, clips, frozen
        self._rows_per_call = rows_per_call
        self.encoded_rows = 0
        self.encoded_clips = 0
        self._budget = int(memory_mb * MIB)
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._mel: OrderedDict[str, ClipFeatures] = OrderedDict()
        self._mel_bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._on_disk: dict[str, Path] = {}

    @property
    def rows_per_call(self) -> int:
        if self._rows_per_call is not None:
            return self._rows_per_call
        return 1 if self.frozen and self.family.model.device.type == "cpu" else 64

    def clip_features(self, key: str) -> ClipFeatures:
        """What the processor makes of the clip (CPU), cached within the same budget."""
        if key in self._mel:
            self._mel.move_to_end(key)
            return self._mel[key]
        if self.clips is None:
            raise ValueError(f"clip {key} is needed, but the policy was built without a ClipStore: Policy(..., clips=)")
        features = self.family.clip_features(*self.clips.waveform(key))
        self._mel[key] = features
        self._mel_bytes += _size(features.tensors.values())
        while self._mel_bytes > self._budget and len(self._mel) > 1:
            _, old = self._mel.popitem(last=False)
            self._mel_bytes -= _size(old.tensors.values())
        return features

    def clear(self) -> None:
        """Forget every embedding, in memory and on disk."""
        self._kept.clear()
        self._on_disk.clear()
        self._mel.clear()
        self._bytes = self._mel_bytes = 0
        self._folder = None

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Unique keys whose embeddings are neither in memory nor on disk, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._kept and key not in self._on_disk]

    def embeddings(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Embeddings (S, D) of the unique keys. Only those not yet known are encoded; gradients flow if not frozen."""
        unique = list(dict.fromkeys(keys))
        if not self.frozen:
            return self.encode(unique)
        with torch.no_grad():
            fresh = self.encode(self.missing(unique))
        result = {key: fresh[key] if key in fresh else self._load(key) for key in unique}
        for key, value in fresh.items():
            self._keep(key, value)
        self._shrink()
        return result

    def encode(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Run the encoder on these clips, whatever is stored."""
        result: dict[str, torch.Tensor] = {}
        for part in self._calls(keys):
            clips = [self.clip_features(key) for key in part]
            self.encoded_rows += sum(_rows(clip) for clip in clips)
            self.encoded_clips += len(clips)
            result.update(zip(part, self.family.encode(clips), strict=True))
        if self.frozen:
            for key in keys:  # the mel has served its purpose
                if (mel := self._mel.pop(key, None)) is not None:
                    self._mel_bytes -= _size(mel.tensors.values())
        return result

    def calls(self, keys: Sequence[str]) -> int:
        """How many encoder calls these unique clips take."""
        return sum(1 for _ in self._calls(list(dict.fromkeys(keys))))

    def _calls(self, keys: Sequence[str]) -> Iterable[list[str]]:
        part: list[str] = []
        rows, limit = 0, self.rows_per_call
        for key in keys:
            count = _rows(self.clip_features(key))
            if part and rows + count > limit:
                yield part
                part, rows = [], 0
            part.append(key)
            rows += count
        if part:
            yield part

    def _keep(self, key: str, value: torch.Tensor) -> None:
        kept = value.detach().to("cpu", copy=True)
        self._kept[key] = kept
        self._bytes += _size([kept])

    def _shrink(self) -> None:
        while self._bytes > self._budget and self._kept:
            key, value = self._kept.popitem(last=False)
            self._bytes -= _size([value])
            if key not in self._on_disk:
                self._spill(key, value)

    def _spill(self, key: str, value: torch.Tensor) -> None:
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="covo_rl_features_")
        path = Path(self._folder.name) / f"{len(self._on_disk)}.safetensors"
        save_file({"embedding": value.contiguous()}, path)
        self._on_disk[key] = path

    def _load(self, key: str) -> torch.Tensor:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        from safetensors.torch import load_file

        value = load_file(self._on_disk[key])["embedding"]
        self._kept[key] = value
        self._bytes += _size([value])
        return value


class Features:
    """Embeddings of the clips of some prompts, ready or made when first needed.

    `get` is called inside `Policy.forward`, so that a sharded or trainable encoder runs where hooks fire.
    """

    def __init__(self, keys: Sequence[str], compute: Callable[[Sequence[str]], dict[str, torch.Tensor]]) -> None:
        self.keys = tuple(dict.fromkeys(keys))
        self._compute = compute
        self._ready: dict[str, torch.Tensor] | None = None

    def get(self, *, fresh: bool = False) -> dict[str, torch.Tensor]:
        """key -> (S, D). `fresh` makes them anew with gradients; otherwise they are made once and kept."""
        if fresh:
            return self._compute(self.keys)
        if self._ready is None:
            self._ready = self._compute(self.keys)
        return self._ready


def _rows(clip: ClipFeatures) -> int:
    return next(iter(clip.tensors.values())).shape[0]


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
