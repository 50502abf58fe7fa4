"""Text and clips to model inputs, and output ids back to text and audio codes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from covo_rl.models.covo_audio.codes import Supervise, make_labels, split_codes
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.models.slots import expand_placeholders

AUDIO_TOKEN = "<|cAUDIO|>"
AUDIO_BOS_TOKEN = "<|begofcAUDIO|>"
AUDIO_EOS_TOKEN = "<|endofcAUDIO|>"

# ChatML with audio parts; one placeholder per clip, expanded by the processor. No default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '" + AUDIO_BOS_TOKEN + AUDIO_TOKEN + AUDIO_EOS_TOKEN + "' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('content part of type ' + part['type'] + '; this model takes audio and text') }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class CovoAudioProcessor(ProcessorMixin):
    """Feature extractor, tokenizer and chat template of Covo-Audio.

    Without a feature extractor it has the published one (30 s segments). `first_code_id` is the id of audio code 0
    (default: the size of the tokenizer) and `num_audio_codes` their number.
    """

    def __init__(
        self,
        feature_extractor: CovoAudioFeatureExtractor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        audio_token: str = AUDIO_TOKEN,
        first_code_id: int | None = None,
        num_audio_codes: int = 16384,
    ) -> None:
        if chat_template is None or "audio" not in chat_template:
            # A text-only template that came with the tokenizer would drop the clips without a word.
            chat_template = CHAT_TEMPLATE
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or self.audio_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {audio_token}; Covo-Audio needs it as the placeholder of audio features"
            )
        self.first_code_id = len(tokenizer) if first_code_id is None else first_code_id
        self.num_audio_codes = num_audio_codes
        super().__init__(feature_extractor or CovoAudioFeatureExtractor(), tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> CovoAudioProcessor:  # pyright: ignore
        """Load a saved processor, or build it from tokenizer and `config.json` as the published folder has them."""
        from transformers import AutoTokenizer
        from transformers.utils.hub import cached_file

        names = ("processor_config.json", "preprocessor_config.json")
        options = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
        missing = {"_raise_exceptions_for_missing_entries": False}
        if any(cached_file(pretrained_model_name_or_path, name, **options, **missing) for name in names):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        from covo_rl.models.covo_audio.configuration import CovoAudioConfig

        config = CovoAudioConfig.from_pretrained(pretrained_model_name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options)
        return cls.from_model_config(config, tokenizer)

    @classmethod
    def from_model_config(cls, config: Any, tokenizer: Any, chat_template: str | None = None) -> CovoAudioProcessor:
        """The processor of a CovoAudioConfig; raises ValueError where tokenizer and config name different ids."""
        processor = cls(
            CovoAudioFeatureExtractor.from_model_config(config),
            tokenizer,
            chat_template=chat_template or tokenizer.chat_template,
            first_code_id=config.audio_token_index,
            num_audio_codes=config.num_audio_codes,
        )
        if processor.audio_token_id != config.audio_placeholder_token_id:
            raise ValueError(
                f"{processor.audio_token} has id {processor.audio_token_id} in the tokenizer but "
                f"audio_placeholder_token_id is {config.audio_placeholder_token_id} in the model's config"
            )
        return processor

    def __call__(  # pyright: ignore
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with one placeholder per clip, and the clips in order -> model inputs.

        `audio`: one clip, a flat list over all rows, or one list per row; a clip is an array (see `mono_float`) or
        the path of a file. `sampling_rate` in Hz of the arrays, one or one per clip. Returns `input_ids` and
        `attention_mask` (N, T), and with audio `input_features` (K, M, F) of the unique clips' segments,
        `input_features_mask` (K, rows), `segment_clips` (K,) and `clip_order` (clips,).
        Raises ValueError that names the row or the clip.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' exists")
        if text is None and audio is None:
            raise ValueError("give text, audio or both")
        text_options = {
            "padding": padding,
            "padding_side": "left",
            "return_tensors": "pt",
            **kwargs.pop("text_kwargs", {}),
        }
        sampling_rate = kwargs.pop("audio_kwargs", {}).get("sampling_rate", sampling_rate)
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        per_row, clips = _flat(audio)
        slots, fields = self._audio_fields(clips, sampling_rate)
        if texts is None:
            return BatchFeature(fields)
        texts = self.expand(texts, slots, per_row)
        if len(texts) > 1 and self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token to batch several rows")
        encoded = self.tokenizer(texts, **text_options, **kwargs)
        return BatchFeature({**encoded, **fields})

    def _audio_fields(
        self, clips: Sequence[Any], sampling_rate: int | Sequence[int] | None
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Slots of every clip, and the fields of the unique ones."""
        if not clips:
            return [], {}
        waves, rates, names = self._decoded(clips, sampling_rate)
        unique: dict[str, int] = {}
        order, parts = [], []
        for wave, rate, name in zip(waves, rates, names, strict=True):
            key = _content_key(wave, rate)
            if key not in unique:
                unique[key] = len(unique)
                parts.append(self.feature_extractor.clip(wave, rate, name))
            order.append(unique[key])
        sizes = [int(mask.sum()) for _, mask in parts]
        owners = [torch.full((len(features),), i) for i, (features, _) in enumerate(parts)]
        fields = {
            "input_features": torch.cat([features for features, _ in parts]),
            "input_features_mask": torch.cat([mask for _, mask in parts]),
            "segment_clips": torch.cat(owners),
            "clip_order": torch.tensor(order),
        }
        return [sizes[i] for i in order], fields

    def _decoded(
        self, clips: Sequence[Any], sampling_rate: int | Sequence[int] | None
    ) -> tuple[list[Any], list[int], list[str]]:
        """Arrays as they are, files decoded at their own rate."""
        is_file = [isinstance(clip, (str, os.PathLike)) for clip in clips]
        rates: list[int] = [0] * len(clips)
        if not all(is_file):
            rates = self.feature_extractor.rates(sampling_rate, len(clips))
        waves, names = list(clips), []
        for i, clip in enumerate(clips):
            names.append(str(clip) if is_file[i] else f"clip {i}")
            if is_file[i]:
                from covo_rl.audio import decode
                from covo_rl.types import Clip

                waves[i], rates[i] = decode(Clip(path=os.fspath(clip)))
        return waves, rates, names

    def expand(self, texts: Sequence[str], slots: Sequence[int], per_row: Sequence[int] | None = None) -> list[str]:
        """Replace the i-th placeholder of the batch by `slots[i]` of them; see `expand_placeholders`."""
        return expand_placeholders(texts, slots, self.audio_token, per_row)

    def apply_chat_template(self, conversation: Any, chat_template: Any = None, **kwargs: Any) -> Any:
        """As in transformers; with `tokenize=True` the audio parts are decoded here, at the file's own rate.

        A part is `{"type": "audio", "path": file}` or `{"type": "audio", "audio": array, "sampling_rate": Hz}`.
        """
        options = {"add_generation_prompt": kwargs.pop("add_generation_prompt", False)}
        tokenize = kwargs.pop("tokenize", False)
        return_dict = kwargs.pop("return_dict", True)
        template: Any = chat_template or self.chat_template
        if not tokenize:
            return super().apply_chat_template(conversation, template, tokenize=False, **options, **kwargs)
        batched = isinstance(conversation[0], (list, tuple))
        rows = list(conversation) if batched else [conversation]
        text = super().apply_chat_template(rows, template, tokenize=False, **options)
        clips, rates = _clips_of(rows, kwargs.pop("sampling_rate", None))
        processor_kwargs = kwargs.pop("processor_kwargs", None) or {}
        kwargs.pop("return_tensors", None)
        out = self(text=text, audio=clips or None, sampling_rate=rates or None, **{**kwargs, **processor_kwargs})
        return out if return_dict else out["input_ids"]

    def split(self, ids: Iterable[int]) -> tuple[list[int], list[int]]:
        """Generated ids -> text ids and audio codes; ValueError for an id beyond the last code."""
        return split_codes(ids, self.first_code_id, self.num_audio_codes)

    def decode_text(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text among generated ids; audio codes are left out."""
        return self.tokenizer.decode(self.split(ids)[0], skip_special_tokens=skip_special_tokens)

    def labels(
        self,
        input_ids: torch.Tensor,
        prompt_lengths: Iterable[int],
        *,
        supervise: Supervise = "all",
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Labels (N, T) for all response ids, for text, or for codes only; see `codes.make_labels`."""
        return make_labels(
            input_ids, prompt_lengths, self.first_code_id, supervise=supervise, attention_mask=attention_mask
        )

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.feature_extractor.model_input_names,
            "segment_clips",
            "clip_order",
        ]


def _flat(audio: Any) -> tuple[list[int] | None, list[Any]]:
    """Clips per row (None where the list is flat or a single clip) and the flat list of clips."""
    if audio is None:
        return None, []
    if isinstance(audio, (str, os.PathLike, np.ndarray, torch.Tensor)):
        return None, [audio]
    items = list(audio)
    if items and isinstance(items[0], (int, float)):
        return None, [np.asarray(items, dtype=np.float32)]
    nested = [item is None or (isinstance(item, (list, tuple)) and not _is_samples(item)) for item in items]
    if not any(nested):
        return None, items
    rows = [list(item or []) if flag else [item] for item, flag in zip(items, nested, strict=True)]
    return [len(row) for row in rows], [clip for row in rows for clip in row]


def _is_samples(item: Sequence[Any]) -> bool:
    return len(item) > 0 and isinstance(item[0], (int, float))


def _content_key(wave: Any, rate: int) -> str:
    array = wave.detach().cpu().numpy() if isinstance(wave, torch.Tensor) else np.asarray(wave)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    return f"{digest.hexdigest()}:{array.dtype}:{array.shape}:{rate}"


def _clips_of(rows: Sequence[Any], default_rate: int | None) -> tuple[list[Any], list[int]]:
    """Audio parts of conversations in order, with their rates (0 for files, which carry their own)."""
    clips, rates = [], []
    for row, messages in enumerate(rows):
        for message in messages:
            content = message["content"] if not isinstance(message["content"], str) else []
            for part in content:
                if part.get("type") != "audio":
                    continue
                clips.append(_part_clip(part, row))
                rates.append(_part_rate(part, default_rate, row))
    return clips, rates


def _part_clip(part: Mapping[str, Any], row: int) -> Any:
    for name in ("path", "audio", "url"):
        if part.get(name) is not None:
            return part[name]
    raise ValueError(f"row {row}: an audio part has none of path, audio (got {sorted(part)})")


def _part_rate(part: Mapping[str, Any], default_rate: int | None, row: int) -> int:
    rate = part.get("sampling_rate", default_rate)
    if rate is None and not isinstance(_part_clip(part, row), (str, os.PathLike)):
        raise ValueError(f"row {row}: an audio part holds an array without sampling_rate in Hz")
    return int(rate or 0)
