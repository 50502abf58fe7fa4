"""The shared part of the families of transformers: a further one states its names, and how a clip becomes features.

A clip is encoded on its own, whatever else is in the batch: beside a longer clip an encoder without masks would give it
other embeddings (logits move by up to 2), and so would the padding of its front end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np
import torch

from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.waveform import mono_float, sinc_resample, whole_rate
from covo_rl.models.weights import load_whole
from covo_rl.types import UserError


class MissingClassError(UserError, ImportError):
    """The installed transformers lacks a class that the family needs."""


class RemoteCodeError(UserError, ValueError):
    """A checkpoint ships code that nobody has allowed to run."""


def parts_at(
    encoder: str = "model.audio_tower.", adapter: str = "model.multi_modal_projector.",
    llm: str = "model.language_model.",
) -> dict[str, str]:  # fmt: skip
    """`parts` of a model with an adapter; the usual layout by default."""
    return {"encoder": encoder, "audio_adapter": adapter, "llm": llm, "lm_head": "lm_head."}


class TransformersFamily(AudioFamily):
    """A family by names: `model_type`, `model_class`, `parts`, `audio_token`, `extract` and `slots`.

    `model_class` (and `processor_class`, where the stock processor needs no image library) name a class of
    transformers, looked up when a model is loaded, or are one.
    """

    model_class: ClassVar[Any]
    processor_class: ClassVar[Any] = None
    #: of a processor that is not the stock one: what reads the feature extractor's and the tokenizer's files.
    extractor_class: ClassVar[Any] = "AutoFeatureExtractor"
    tokenizer_class: ClassVar[Any] = "AutoTokenizer"
    parts: ClassVar[Mapping[str, str]] = parts_at()
    #: layouts of other releases of transformers; the one whose prefixes are all there is taken.
    other_parts: ClassVar[tuple[Mapping[str, str], ...]] = ()
    #: modules that see, let go after loading, whatever a release calls them; exports carry their tensors over.
    unheard: ClassVar[tuple[str, ...]] = ()
    #: the text that stands for a clip in a rendered prompt.
    audio_token: ClassVar[str]
    #: what the model's own forward calls the mask of `windows`.
    mask_field: ClassVar[str] = "input_features_mask"
    #: the template takes one text per message: the audio token stands in it for a clip.
    text_content: ClassVar[bool] = False
    #: how messages call the model; the class's name where it says nothing.
    title: ClassVar[str] = ""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        names = {name for name, _ in model.named_modules()}
        for parts in (self.parts, *self.other_parts):
            if all(prefix.rstrip(".") in names for prefix in parts.values()):
                self.parts = parts  # pyright: ignore[reportAttributeAccessIssue]
                break
        self._slots: dict[int, int] = {}
        for holder, _, name in (path.rpartition(".") for path in self.unheard if path in names):
            delattr(model.get_submodule(holder), name)

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "auto", attn_implementation: str | None = None, trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:  # fmt: skip
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        remote = _remote_options(cls, path, trust_remote_code)
        model = load_whole(
            named_class(cls.model_class, cls), path, adapter_folder=cls.adapter_folder, dtype=dtype, **remote, **kwargs
        )
        return cls(model, cls.load_processor(path, **remote))

    @classmethod
    def load_processor(cls, path: str, **options: Any) -> Any:
        """Feature extractor, tokenizer and template of a folder or hub name."""
        if cls.processor_class is None:
            readers = named_class(cls.extractor_class, cls), named_class(cls.tokenizer_class, cls)
            return AudioProcessor.from_pretrained(path, cls.audio_token, *readers, **options)
        return named_class(cls.processor_class, cls).from_pretrained(path, **options)

    # -- what it hears -------------------------------------------------------------------------------------------

    @abstractmethod
    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        """Mono float32 at `sampling_rate` -> tensors of this one clip, the first axis its rows."""

    @abstractmethod
    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Positions that the clip of these tensors fills."""

    @property
    def sampling_rate(self) -> int:
        """Hz of what `extract` takes."""
        return self.processor.feature_extractor.sampling_rate

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        """What `extract` made, on the encoder's device and in its dtype -> embeddings (S, D)."""
        return self.model.get_audio_features(**tensors).pooler_output

    def windows(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        """The extractor's windows (30 s of Whisper) as rows, the last one padded: features and mask of the frames."""
        extractor = self.processor.feature_extractor
        rows = [samples_T[i : i + extractor.n_samples] for i in range(0, len(samples_T), extractor.n_samples)]
        options = {"return_attention_mask": True, "padding": "max_length", "return_tensors": "pt"}
        out = extractor(rows, sampling_rate=self.sampling_rate, **options)
        return {"input_features": out["input_features"], self.mask_field: out["attention_mask"]}

    def clip_features(self, waveform: np.ndarray, sampling_rate: int) -> ClipFeatures:
        """Raises ValueError for a clip that cannot be read, is too long, or too short for one slot."""
        samples = mono_float(waveform)
        seconds = self._seconds(len(samples), sampling_rate)
        tensors = self.extract(sinc_resample(samples, sampling_rate, self.sampling_rate).numpy())
        return ClipFeatures(tensors, self._checked(self.slots(tensors), seconds))

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int:
        """As many as `clip_features` says; they depend on the length alone, so of each length it is asked once."""
        length = len(mono_float(waveform))
        seconds = self._seconds(length, sampling_rate)
        count = -(-length * self.sampling_rate // int(sampling_rate))
        if count not in self._slots:
            self._slots[count] = self.slot_count(count)
        return self._checked(self._slots[count], seconds)

    def slot_count(self, samples: int) -> int:
        """Slots of a clip of so many samples at `sampling_rate`; a family that needs no features for it says how."""
        return self.slots(self.extract(np.zeros(samples, np.float32)))

    @property
    def _name(self) -> str:
        return self.title or type(self).__name__

    def _seconds(self, samples: int, sampling_rate: int) -> float:
        seconds, limit = samples / whole_rate(sampling_rate), self.max_clip_seconds
        if limit is not None and seconds > limit:
            raise ValueError(
                f"a clip of {seconds:.2f} s: {self._name} takes {limit:g} s and would cut the rest without a word; "
                "crop or chunk it first (--long_audio)"
            )
        return seconds

    def _checked(self, slots: int, seconds: float) -> int:
        if slots < 1:
            raise ValueError(f"a clip of {1000 * seconds:.1f} ms is too short for one audio slot of {self._name}")
        return slots

    def encode(self, clips: Sequence[ClipFeatures]) -> list[torch.Tensor]:
        if not clips:
            return []
        # matrix products of another height differ in the last bit, and a CPU gains nothing by them
        together = self.rows_independent and self.embed_tokens.weight.device.type != "cpu"
        calls = [list(clips)] if together else [[clip] for clip in clips]
        return [rows for call in calls for rows in self.encode_call(call)]

    def encode_call(self, clips: Sequence[ClipFeatures]) -> Sequence[torch.Tensor]:
        """`encode` by one call of the encoder, which only `rows_independent` makes right for several clips."""
        encoder = self.model.get_submodule(self.parts["encoder"].rstrip("."))
        weight = next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())
        fields = {name: torch.cat([clip.tensors[name] for clip in clips]) for name in clips[0].tensors}
        for name, value in fields.items():
            fields[name] = value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        slots = [clip.slots for clip in clips]
        rows = self.audio_embeddings(fields, sum(slots))
        if len(rows) != sum(slots):
            raise ValueError(f"{type(self).__name__}: {len(rows)} embeddings for {sum(slots)} audio slots")
        return rows.split(slots)

    # -- text and ids --------------------------------------------------------------------------------------------

    def template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows = super().template_messages(messages)
        for row in rows if self.text_content else ():
            if not isinstance(row["content"], str):
                token = self.processor.audio_token
                row["content"] = "".join(token if p["type"] == "audio" else p["text"] for p in row["content"])
        return rows

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ends = self.model.generation_config.eos_token_id
        ids = ends if isinstance(ends, (list, tuple)) else [ends, self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


class WindowedFamily(TransformersFamily):
    """Whisper's windows of 30 s as rows, whose frames alone say how many slots they fill."""

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        return self.windows(samples_T)

    def slot_count(self, samples: int) -> int:
        extractor = self.processor.feature_extractor
        window, hop = extractor.n_samples, extractor.hop_length
        counts = torch.tensor([min(window, samples - start) for start in range(0, samples, window)])
        mask = torch.arange(window // hop)[None, :] < -(-counts[:, None] // hop)
        return self.slots({self.mask_field: mask})


def _remote_options(family: type[TransformersFamily], path: str, trusted: bool) -> dict[str, bool]:
    """For an Auto class, which may find a model's code in its checkpoint; the classes of transformers need none.

    Raises:
        RemoteCodeError: the checkpoint ships code, and may not run it.
    """
    from transformers import PreTrainedConfig

    if not str(family.model_class).startswith("Auto"):
        return {}
    if not trusted and "auto_map" in PreTrainedConfig.get_config_dict(path)[0]:
        raise RemoteCodeError(
            f"model {path}: its code ships with the checkpoint; --trust-remote-code runs it on this machine (in the "
            "options of a run: --trust_remote_code true)"
        )
    return {"trust_remote_code": trusted}


def named_class(value: Any, family: type) -> Any:
    """A class of transformers by its name, of another module by "module:Name", or the class itself.

    Raises:
        MissingClassError: the installed transformers has none of this name.
    """
    import transformers

    if not isinstance(value, str):
        return value
    module, _, name = value.rpartition(":")
    if module:
        return getattr(import_module(module), name)
    if not hasattr(transformers, value):
        raise MissingClassError(
            f"{family.__name__} needs {value}, which transformers {transformers.__version__} does not have: "
            "pip install -U transformers"
        )
    return getattr(transformers, value)


def conv_positions(frames: Any) -> Any:
    """Mel frames (a number or a tensor) -> positions after Whisper's convolution of stride 2."""
    return (frames - 1) // 2 + 1


def paired_positions(frames: Any) -> Any:
    """The same, after the mean of two positions that Qwen's and NVIDIA's encoders end with."""
    return (conv_positions(frames) - 2) // 2 + 1
