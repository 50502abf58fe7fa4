"""Text and clips to model inputs, and output ids back to text and audio codes.

Audio codes are ids of the vocabulary from `first_code_id` on; labels choose which of them a loss supervises.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from covo_rl.audio import content_key, decode
from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.models.slots import expand_placeholders
from covo_rl.models.text import padded_ids, shielded_messages
from covo_rl.types import Clip, Supervise

AUDIO_TOKEN = "<|cAUDIO|>"
AUDIO_BOS_TOKEN = "<|begofcAUDIO|>"
AUDIO_EOS_TOKEN = "<|endofcAUDIO|>"
IGNORE = -100
#: a reply's blocks: so many text ids, then so many codes (published)
TEXT_BLOCK, CODE_BLOCK = 5, 15

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
        self, feature_extractor: CovoAudioFeatureExtractor | None = None, tokenizer: Any = None,
        chat_template: str | None = None, audio_token: str = AUDIO_TOKEN, first_code_id: int | None = None,
        num_audio_codes: int = 16384,
    ) -> None:  # fmt: skip
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
        config = CovoAudioConfig.from_pretrained(pretrained_model_name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options)
        return cls.from_model_config(config, tokenizer)

    @classmethod
    def from_model_config(cls, config: CovoAudioConfig, tokenizer: Any) -> CovoAudioProcessor:
        """The processor of a CovoAudioConfig; raises ValueError where tokenizer and config name different ids."""
        processor = cls(
            CovoAudioFeatureExtractor.from_model_config(config), tokenizer, chat_template=tokenizer.chat_template,
            first_code_id=config.audio_token_index, num_audio_codes=config.num_audio_codes,
        )  # fmt: skip
        if processor.audio_token_id != config.audio_placeholder_token_id:
            raise ValueError(
                f"{processor.audio_token} has id {processor.audio_token_id} in the tokenizer but "
                f"audio_placeholder_token_id is {config.audio_placeholder_token_id} in the model's config"
            )
        return processor

    def __call__(  # pyright: ignore
        self, text: str | Sequence[str] | None = None, audio: Any = None, *,
        sampling_rate: int | Sequence[int] | None = None, return_tensors: str = "pt", padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
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
        text_options = {"padding": padding, "padding_side": "left", "return_tensors": "pt"}
        text_options |= kwargs.pop("text_kwargs", {})
        sampling_rate = kwargs.pop("audio_kwargs", {}).get("sampling_rate", sampling_rate)
        per_row, clips = _flat(audio)
        slots, fields = self._audio_fields(clips, sampling_rate) if clips else ([], {})
        if text is None:
            return BatchFeature(fields)
        texts = [text] if isinstance(text, str) else list(text)
        texts = expand_placeholders(texts, slots, self.audio_token, per_row)
        if len(texts) > 1 and self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token to batch several rows")
        return BatchFeature({**padded_ids(self.tokenizer, texts, **text_options, **kwargs), **fields})

    def _audio_fields(
        self, clips: Sequence[Any], sampling_rate: int | Sequence[int] | None
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Slots of every clip, and the fields of the unique ones. Files are decoded at their own rate."""
        is_file = [isinstance(clip, (str, os.PathLike)) for clip in clips]
        rates = [0] * len(clips) if all(is_file) else self.feature_extractor.rates(sampling_rate, len(clips))
        unique: dict[str, tuple[Any, int, str]] = {}
        keys = []
        for i, (wave, rate) in enumerate(zip(clips, rates, strict=True)):
            name = os.fspath(wave) if is_file[i] else f"clip {i}"
            if is_file[i]:
                wave, rate = decode(Clip(path=name))
            samples = wave.detach().cpu().numpy() if isinstance(wave, torch.Tensor) else np.asarray(wave)
            keys.append(content_key(Clip(array=samples, sampling_rate=rate)))
            unique.setdefault(keys[-1], (wave, rate, name))
        waves, rates, names = zip(*unique.values(), strict=True)
        fields = dict(self.feature_extractor(waves, sampling_rate=rates, names=names))
        order = torch.tensor([list(unique).index(key) for key in keys])
        slots = fields["input_features_mask"].sum(1)
        sizes = slots.new_zeros(len(unique)).index_add(0, fields["segment_clips"], slots)
        return sizes[order].tolist(), {**fields, "clip_order": order}

    def apply_chat_template(self, conversation: Any, chat_template: Any = None, **kwargs: Any) -> Any:
        """As in transformers; with `tokenize=True` the audio parts are decoded here, at the file's own rate, and
        special tokens that a message spells stay text.

        A part is `{"type": "audio", "path": file}` or `{"type": "audio", "audio": array, "sampling_rate": Hz}`.
        """
        template: Any = chat_template or self.chat_template
        return_dict = kwargs.pop("return_dict", True)
        if not kwargs.pop("tokenize", False):
            return super().apply_chat_template(conversation, template, tokenize=False, **kwargs)
        rows = list(conversation) if isinstance(conversation[0], (list, tuple)) else [conversation]
        prompt = kwargs.pop("add_generation_prompt", False)
        shielded = [shielded_messages(row, self.tokenizer) for row in rows]
        text = super().apply_chat_template(shielded, template, tokenize=False, add_generation_prompt=prompt)
        clips, rates = conversation_clips(rows, kwargs.pop("sampling_rate", None))
        options = {**kwargs, **(kwargs.pop("processor_kwargs", None) or {}), "return_tensors": "pt"}
        out = self(text=text, audio=clips or None, sampling_rate=rates or None, **options)
        return out if return_dict else out["input_ids"]

    def split(self, ids: Iterable[int]) -> tuple[list[int], list[int]]:
        """Generated ids -> text ids and audio codes; ValueError for an id beyond the last code."""
        return split_codes(ids, self.first_code_id, self.num_audio_codes)

    @property
    def model_input_names(self) -> list[str]:
        names = self.tokenizer.model_input_names + self.feature_extractor.model_input_names
        return [*names, "segment_clips", "clip_order"]


def _is_clip(item: Any) -> bool:
    """A path, an array or a list of samples, not a list of clips."""
    if isinstance(item, (list, tuple)):
        return len(item) > 0 and isinstance(item[0], (int, float))
    return item is not None


def _flat(audio: Any) -> tuple[list[int] | None, list[Any]]:
    """Clips per row (None where the list is flat or a single clip) and the flat list of clips."""
    if audio is None or _is_clip(audio):
        return None, [] if audio is None else [audio]
    if all(map(_is_clip, audio)):
        return None, list(audio)
    rows = [[item] if _is_clip(item) else list(item or []) for item in audio]
    return [len(row) for row in rows], [clip for row in rows for clip in row]


def conversation_clips(rows: Sequence[Any], default_rate: int | None = None) -> tuple[list[Any], list[int]]:
    """Audio parts of conversations in order, with their rates in Hz (0 for files, which carry their own).

    Raises ValueError that names the row of a part without a clip, or of an array without a rate.
    """
    clips, rates = [], []
    for row, messages in enumerate(rows):
        contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
        for part in (part for content in contents for part in content if part.get("type") == "audio"):
            clip = next((part[name] for name in ("path", "audio", "url") if part.get(name) is not None), None)
            if clip is None:
                raise ValueError(f"row {row}: an audio part has none of path, audio (got {sorted(part)})")
            rate = part.get("sampling_rate", default_rate)
            if rate is None and not isinstance(clip, (str, os.PathLike)):
                raise ValueError(f"row {row}: an audio part holds an array without sampling_rate in Hz")
            clips.append(clip)
            rates.append(int(rate or 0))
    return clips, rates


def split_codes(ids: Iterable[int], first_code_id: int, num_codes: int) -> tuple[list[int], list[int]]:
    """Generated ids -> text ids (below `first_code_id`) and audio codes `id - first_code_id`, each in order.

    Raises ValueError for an id beyond the last code.
    """
    text, codes = [], []
    for position, value in enumerate(map(int, ids)):
        if value < first_code_id:
            text.append(value)
        elif value - first_code_id < num_codes:
            codes.append(value - first_code_id)
        else:
            raise ValueError(
                f"id {value} at position {position} is audio code {value - first_code_id}, but the model has codes "
                f"0 to {num_codes - 1} (ids {first_code_id} to {first_code_id + num_codes - 1})"
            )
    return text, codes


def interleave(text_ids: Sequence[int], codes: Sequence[int], first_code_id: int) -> list[int]:
    """The ids of a spoken reply without its end: 5 text ids, 15 codes, and so on; what is left of one kind follows.

    >>> interleave([1, 2, 3, 4, 5, 6], range(17), 100)[4:8], interleave([1, 2, 3, 4, 5, 6], range(17), 100)[-4:]
    ([5, 100, 101, 102], [114, 6, 115, 116])
    """
    ids: list[int] = []
    for block in range(max(-(-len(text_ids) // TEXT_BLOCK), -(-len(codes) // CODE_BLOCK))):
        ids += text_ids[block * TEXT_BLOCK : (block + 1) * TEXT_BLOCK]
        ids += [first_code_id + code for code in codes[block * CODE_BLOCK : (block + 1) * CODE_BLOCK]]
    return ids


def make_labels(
    input_ids: torch.Tensor, prompt_lengths: Iterable[int], first_code_id: int, *,
    supervise: Supervise = "all", attention_mask: torch.Tensor | None = None, end_id: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Labels (N, T) for teacher forcing: -100 on prompt and padding, and on what is not supervised.

    `prompt_lengths[n]` counts the real (unmasked) prompt ids of row n, so left padding needs `attention_mask`.
    `supervise`: "all" response ids, "text" only, "codes" only (the published masked text loss), or "spoken": the codes
    and `end_id`, the turn's end, where the speech decides it.
    """
    if supervise not in get_args(Supervise):
        raise ValueError(f"supervise={supervise!r} does not exist; write {', '.join(get_args(Supervise))}")
    if supervise == "spoken" and end_id is None:
        raise ValueError("supervise='spoken' teaches the end of the turn too: give end_id")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    lengths = torch.tensor(list(prompt_lengths), device=input_ids.device)[:, None]
    response = (mask == 1) & (mask.cumsum(1) > lengths)
    codes = input_ids >= first_code_id
    if supervise == "spoken":
        codes = codes | (input_ids == end_id)
    if supervise != "all":
        response &= ~codes if supervise == "text" else codes
    return input_ids.masked_fill(~response, IGNORE)
