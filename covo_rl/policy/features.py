"""The audio side of a policy: each clip is encoded once, and its embeddings fill the slots of the packed row.

With a frozen encoder and adapter the embeddings serve sampling, every scoring pass, every inner iteration and later
epochs: by content, in memory within a budget, then on disk. Where one of them trains, they are made anew inside every
pass that needs gradients, still once per clip.
"""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from covo_rl.policy.packing import Packed
from covo_rl.policy.sharding import is_sharded, most
from covo_rl.types import visible

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily, ClipFeatures

_Clip = TypeVar("_Clip")
MIB = 2**20
#: names the features of a silent clip that only keeps ranks in step
DUMMY = ""


def encoder_calls(
    family: AudioFamily, clips: Iterable[_Clip], rows: Callable[[_Clip], int], *, alone: bool = False
) -> Iterator[list[_Clip]]:
    """The clips of each call of the encoder: up to 64 `rows`, but clip by clip on a CPU, where the family's rows depend
    on those beside them, and where `alone` says so.

    Ranks that share out the weights meet inside every call, so that what is counted must be what is called.
    """
    alone = alone or family.model.device.type == "cpu" or not family.rows_independent
    limit = 1 if alone else 64
    part: list[_Clip] = []
    held = 0
    for clip in clips:
        count = rows(clip)
        if part and held + count > limit:
            yield part
            part, held = [], 0
        part.append(clip)
        held += count
    if part:
        yield part


def silent_embeddings(family: AudioFamily, calls: int) -> torch.Tensor:
    """Embeddings (S, D) of so many calls with a second of silence, which only keep ranks in step."""
    silent = family.clip_features(np.zeros(16000, dtype=np.float32), 16000)
    return torch.cat([family.encode([silent])[0] for _ in range(calls)])


class FeatureStore:
    """Audio embeddings (S, D) by content key.

    `memory_mb` bounds the embeddings kept in memory (CPU, the encoder's dtype); older ones move to a nameless temporary
    file that vanishes with the process however it ends, up to `disk_mb`, or as far as the disk has room, and are
    encoded again beyond. `encoded_rows` counts encoder rows (segments) and `encoded_clips` clips computed so far.
    """

    def __init__(
        self, family: AudioFamily, clips: ClipStore | None, memory_mb: float = 512, *, frozen: bool = True,
        disk_mb: float = 8192,
    ) -> None:  # fmt: skip
        self.family, self.clips, self.frozen = family, clips, frozen
        self.encoded_rows = self.encoded_clips = 0
        self.budget, self._disk_budget = int(memory_mb * MIB), int(disk_mb * MIB)
        self._placed: dict[str, torch.Tensor] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every embedding, wherever it is."""
        self._placed = None if self._placed is None else {}
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._mel: OrderedDict[str, ClipFeatures] = OrderedDict()
        self._bytes = self._mel_bytes = 0
        self._file: Any = None
        self._on_disk: dict[str, tuple[int, torch.Tensor]] = {}  # key -> (offset, what its shape and dtype are)
        self._disk_bytes = 0

    def clip_features(self, key: str) -> ClipFeatures:
        """What the processor makes of the clip (CPU), cached within the same budget."""
        if key not in self._mel:
            self.adopt(key, self.process(key))
        self._mel.move_to_end(key)
        return self._mel[key]

    def process(self, key: str) -> ClipFeatures:
        """Decode and process the clip; nothing is stored, so any thread may."""
        if self.clips is None:
            raise ValueError(f"clip {key} is needed, but the policy was built without a ClipStore: Policy(..., clips=)")
        with torch.autocast("cpu", enabled=False):  # audio is not resampled in 16 bits
            return self.family.clip_features(*self.clips.waveform(key))

    def adopt(self, key: str, clip: ClipFeatures) -> None:
        """Keep what `process` made."""
        self._mel[key] = clip
        self._mel_bytes += clip.nbytes
        while self._mel_bytes > self.budget and len(self._mel) > 1:
            self._drop_mel(next(iter(self._mel)))

    def unprocessed(self, key: str) -> bool:
        """The encoder will have to be given this clip, and it is not ready for that."""
        return key not in self._mel and (not self.frozen or bool(self.missing([key])))

    @property
    def full(self) -> bool:
        """The budget for what the processor makes is used up; each further clip drops another."""
        return self._mel_bytes >= self.budget

    def _drop_mel(self, key: str) -> None:
        if key in self._mel:
            self._mel_bytes -= self._mel.pop(key).nbytes

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Unique keys whose embeddings are neither on the device nor in memory nor on disk, in order."""
        stored = (self._kept, self._on_disk, self._placed or {})
        return [key for key in dict.fromkeys(keys) if not any(key in some for some in stored)]

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Embeddings asked for inside stay on the device until the end: each goes there once."""
        self._placed = {}
        try:
            yield
        finally:
            self._placed = None

    def embeddings(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Embeddings (S, D) of the unique keys, where the decoder is.

        Only those not yet known are encoded; gradients flow if not frozen.
        """
        unique = list(dict.fromkeys(keys))
        if not self.frozen:
            return self.encode(unique)
        with torch.no_grad():
            fresh = self.encode(self.missing(unique))
        result = {}
        for key in unique:
            if self._placed is not None and key in self._placed:
                result[key] = self._placed[key]
                continue
            if key in fresh:
                self._keep(key, fresh[key].detach().to("cpu", copy=True))
            elif key not in self._kept:
                self._keep(key, self._from_disk(key))
            self._kept.move_to_end(key)
            value = self._kept[key]
            if key in fresh and fresh[key].device != value.device:
                value = fresh[key]  # it is there already
            result[key] = self.place(value)
            if self._placed is not None:
                self._placed[key] = result[key]
        while self._bytes > self.budget and self._kept:
            key, value = self._kept.popitem(last=False)
            self._bytes -= value.nbytes
            if key not in self._on_disk and self._disk_bytes + value.nbytes <= self._disk_budget:
                self._spill(key, value)
        return result

    def place(self, value: torch.Tensor) -> torch.Tensor:
        """`value` on the decoder's device: a copy if it comes from the host to another."""
        return value.to(self.family.embed_tokens.weight.device)

    def _spill(self, key: str, value: torch.Tensor) -> None:
        """To disk; a full one only means that clips are encoded again."""
        try:
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            self._file.seek(self._disk_bytes)
            if self._file.write(value.contiguous().flatten().view(torch.uint8).numpy()) < value.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._disk_budget = 0
            where = tempfile.gettempdir()
            warnings.warn(f"audio features are no longer kept on disk, {where}: {error}", stacklevel=2)
            return
        self._on_disk[key] = (self._disk_bytes, value.to("meta"))
        self._disk_bytes += value.nbytes

    def _from_disk(self, key: str) -> torch.Tensor:
        offset, like = self._on_disk[key]
        self._file.seek(offset)
        return torch.frombuffer(bytearray(self._file.read(like.nbytes)), dtype=like.dtype).view(like.shape)

    def _keep(self, key: str, value: torch.Tensor) -> None:
        self._kept[key] = value
        self._bytes += value.nbytes

    def encode(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Run the encoder on these clips, whatever is stored."""
        result: dict[str, torch.Tensor] = {}
        for part in self.calls(keys):
            clips = [self.clip_features(key) for key in part]
            self.encoded_rows += sum(_rows(clip) for clip in clips)
            self.encoded_clips += len(clips)
            result.update(zip(part, self.family.encode(clips), strict=True))
        if self.frozen:
            for key in keys:  # the mel has served its purpose
                self._drop_mel(key)
        return result

    def calls(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """The encoder calls for these clips: up to 64 rows each, but clip by clip on a CPU, where the family's rows
        depend on those beside them, and where embeddings are stored under `torch.use_deterministic_algorithms`.

        There a resumed run repeats every bit; which clips share a call depends on what is stored already, and matrix
        products of another height differ in the last bit.
        """
        alone = self.frozen and torch.are_deterministic_algorithms_enabled()
        return encoder_calls(self.family, keys, lambda key: _rows(self.clip_features(key)), alone=alone)


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
        self._ready = self._compute(self.keys) if self._ready is None else self._ready
        return self._ready


class Embedder:
    """Packed ids to decoder inputs. `frozen` says that no audio part trains, so embeddings are made once for all.

    `reference_family` makes the audio embeddings of reference passes where the policy's own ones train.
    """

    def __init__(
        self, root: nn.Module, family: AudioFamily, reference_family: AudioFamily, clips: ClipStore | None,
        memory_mb: float,
    ) -> None:  # fmt: skip
        prefixes = {part: family.parts[part] for part in ("encoder", "audio_adapter") if part in family.parts}
        trained = [name for name, parameter in family.model.named_parameters() if parameter.requires_grad]
        self.root, self.family = root, family
        self.frozen_parts = [part for part, path in prefixes.items() if not any(n.startswith(path) for n in trained)]
        self.frozen = len(self.frozen_parts) == len(prefixes)
        self.store = FeatureStore(family, clips, memory_mb, frozen=self.frozen)
        self.reference_store = FeatureStore(reference_family, clips, memory_mb)

    def embeddings(self, keys: Sequence[str], *, reference: bool = False) -> dict[str, torch.Tensor]:
        """key -> (S, D), and under DUMMY what keeps ranks in step. With sharded weights every rank must call it."""
        store = self.reference_store if reference and not self.frozen else self.store
        if is_sharded(self.root):
            # every encoder call gathers weights from all ranks, so all must make as many
            mine = len(list(store.calls(store.missing(keys) if store.frozen else dict.fromkeys(keys))))
            dummies = most(mine, self.family.embed_tokens.weight.device) - mine
        else:
            # DDP waits for a gradient of every parameter, also from a rank whose rows have no audio
            dummies = int(not (keys or self.frozen) and torch.is_grad_enabled() and torch.distributed.is_initialized())
        result = store.embeddings(keys)
        if dummies:
            result = {**result, DUMMY: silent_embeddings(store.family, dummies)}
        return result

    def placed(self) -> AbstractContextManager[None]:
        """Of the clips used inside, embeddings that stay the same go to the device once, and leave it at the end."""
        return (self.store if self.frozen else self.reference_store).placed()

    def embed(
        self, packed: Packed, features: Features, family: AudioFamily, *, reference: bool = False
    ) -> torch.Tensor:
        """(L, D) token embeddings with the audio slots filled, in the decoder's dtype.

        Raises KeyError for features made for other prompts, ValueError that names the row where slots and features
        do not match.
        """
        embeds_LD = family.embed_tokens(family.embeddable(packed.input_ids_L))
        if reference and not self.frozen:
            audio = self.embeddings(features.keys, reference=True)
        else:
            audio = features.get(fresh=torch.is_grad_enabled() and not self.frozen)
        if missing := [key for key in dict.fromkeys(packed.audio_keys) if key not in audio]:
            raise KeyError(
                f"features were made for {len(features.keys)} clips, without {len(missing)} of these prompts' "
                f"(first: {missing[0]}); call policy.features with the same prompts"
            )
        if packed.audio_keys:
            rows = torch.cat([audio[key].to(embeds_LD.device, embeds_LD.dtype) for key in packed.audio_keys])
            if len(rows) != len(packed.audio_positions_S):
                for prompt in packed.prompts:
                    sizes = [len(audio[key]) for key in prompt.clip_keys]
                    if sum(sizes) != sum(prompt.slots):
                        what = f"the prompt has slots {prompt.slots}, its clips have {sizes} features"
                        raise ValueError(f"row {visible(prompt.example.id)}: {what}")
                raise ValueError(f"{len(packed.audio_positions_S)} audio positions, features for {len(rows)}")
            embeds_LD = embeds_LD.index_copy(0, packed.audio_positions_S, rows)
        if DUMMY in audio:
            embeds_LD = embeds_LD + 0.0 * audio[DUMMY].sum().to(embeds_LD.dtype)
        return embeds_LD


def _rows(clip: ClipFeatures) -> int:
    return len(next(iter(clip.tensors.values())))
