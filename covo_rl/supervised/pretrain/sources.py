"""What a new Covo-Audio is made of: the folder of a text decoder and the folder of an encoder, checked by their files.

Nothing is loaded here: settings come from the JSON files, names and shapes from the heads of the safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, Qwen2Config, WhisperConfig

from covo_rl.data.files import RecordError, read_record
from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.resolve import meant
from covo_rl.types import shown, visible

#: the decoder's table of token embeddings, and its head
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: tokens that a chat and the end of a text are written with
TEXT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
POSITIONS_PER_SECOND = 50
#: what transformers raises for sizes or files that make no sense
BROKEN = (StrictDataclassError, SafetensorError, ValueError, TypeError, KeyError, ArithmeticError, OSError)


@dataclass
class PartSource:
    """A part of a checkpoint folder: its configuration, and every tensor under the part's own name.

    `text_rows`: rows of a decoder's tables that stand for a token; those behind are padding that nothing was taught.
    """

    folder: Path
    config: Any = None
    tokenizer: Any = None
    text_rows: int = 0
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, of which only the head has been read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or these of its rows."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_slice(self.name)[rows] if self.shape else opened.get_tensor(self.name)


def decoder_source(path: str, problems: list[str]) -> PartSource:
    """A Qwen2 causal model with its tokenizer, or the decoder of a Covo-Audio without codes; problems are added."""
    source, said = PartSource(Path(path)), len(problems)
    raw = _settings("--llm", source.folder, ("qwen2", "covo_audio"), "a Qwen2 causal model, such as Qwen2.5", problems)
    if raw is None:
        return source
    try:
        whole = None if raw["model_type"] == "qwen2" else CovoAudioConfig(**_without_type(raw))
        source.config = Qwen2Config(**_without_type(raw)) if whole is None else whole.llm_config
    except BROKEN as error:
        problems.append(f"--llm {path}: config.json describes no decoder: {visible(shown(error))}")
        return source
    if whole is not None and whole.num_audio_codes:
        problems.append(f"--llm {path}: it has {whole.num_audio_codes} codes of speech already: train it as it is")
    source.tensors = _tensors("--llm", source.folder, "" if whole is None else "llm.", problems)
    try:
        source.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        source.text_rows = len(source.tokenizer)
    except BROKEN as error:
        problems.append(f"--llm {path}: its tokenizer does not load: {visible(shown(error))}")
    if len(problems) == said:
        problems += [f"--llm {path}: {problem}" for problem in _token_problems(source)]
    return source


def _token_problems(source: PartSource) -> list[str]:
    tokens, problems = source.tokenizer.get_vocab(), []
    if lacking := [token for token in TEXT_TOKENS if token not in tokens]:
        problems.append(f"its tokenizer has no {', '.join(lacking)}, with which turns and texts end (Qwen2.5's has)")
    if (last := max(tokens.values(), default=-1)) != len(source.tokenizer) - 1:
        problems.append(f"its tokenizer has {len(source.tokenizer)} tokens and ids up to {last}: codes need the end")
    table = source.tensors.get(EMBEDDINGS)
    if table is None:
        problems.append(f"its weights have no {EMBEDDINGS}")
    elif table.shape[0] < len(source.tokenizer):
        problems.append(f"its tokenizer has {len(source.tokenizer)} tokens, its table of embeddings {table.shape[0]}")
    return problems


def encoder_source(path: str, problems: list[str]) -> PartSource:
    """The encoder of a Whisper checkpoint or of a Covo-Audio; problems are added."""
    source = PartSource(Path(path))
    raw = _settings("--encoder", source.folder, ("whisper", "covo_audio"), "a Whisper or Covo-Audio folder", problems)
    if raw is None:
        return source
    is_whisper = raw["model_type"] == "whisper"
    try:
        source.config = (
            WhisperConfig(**_without_type(raw)) if is_whisper else CovoAudioConfig(**_without_type(raw)).encoder_config
        )
        problems += [f"--encoder {path}: {problem}" for problem in _feature_problems(source, is_whisper)]
    except (*BROKEN, RecordError) as error:
        problems.append(f"--encoder {path}: config.json describes no encoder: {visible(shown(error))}")
        return source
    tensors = _tensors("--encoder", source.folder, "", problems)
    prefix = (
        "model.encoder." if is_whisper and any(name.startswith("model.encoder.") for name in tensors) else "encoder."
    )
    source.tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return source


def _feature_problems(source: PartSource, is_whisper: bool) -> list[str]:
    """What of a Whisper's features the front end of Covo-Audio does not make; its bins and length are taken over."""
    said = read_record(source.folder / "preprocessor_config.json")
    said = said or read_record(source.folder / "processor_config.json").get("feature_extractor") or {}
    if not (is_whisper and isinstance(said, Mapping)):
        return []
    config, ours = source.config, CovoAudioFeatureExtractor()
    wanted = {
        "feature_size": (config.num_mel_bins, "the mel bins of config.json"),
        "chunk_length": (config.max_source_positions / POSITIONS_PER_SECOND, "the seconds of config.json's positions"),
        "sampling_rate": (ours.feature_sampling_rate, "the rate in Hz that features are made at"),
        "n_fft": (ours.n_fft, "the samples of a window"),
        "hop_length": (ours.feature_sampling_rate // 100, "the samples of 10 ms"),
    }
    return [
        f"its features have {name} {visible(shown(said[name]))}, where {value:g} is wanted, {what}"
        for name, (value, what) in wanted.items()
        if name in said and said[name] != value
    ]


def _settings(option: str, folder: Path, kinds: tuple[str, ...], wanted: str, problems: list[str]) -> Any:
    """config.json of a folder, or None where there is a problem."""
    where = f"{option} {visible(folder)}"
    if not (folder / "config.json").is_file():
        hint = meant(folder) if not folder.is_dir() else f"; found {sorted(p.name for p in folder.iterdir())[:8]}"
        problems.append(f"{where}: no folder with a config.json{hint}; of a hub name: hf download NAME --local-dir DIR")
        return None
    try:
        raw = read_record(folder / "config.json")
    except RecordError as error:
        problems.append(f"{where}: {error}")
        return None
    if (kind := raw.get("model_type")) not in kinds:
        problems.append(f"{where}: its model_type is {visible(shown(kind))}, but {wanted} is needed")
        return None
    if raw.get("quantization_config"):
        problems.append(f"{where}: its weights are quantised; give the checkpoint that they were rounded from")
        return None
    return raw


def _without_type(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in ("model_type", "transformers_version")}


def _tensors(option: str, folder: Path, prefix: str, problems: list[str]) -> dict[str, StoredTensor]:
    """Name without `prefix` -> tensor, of those that begin with it. Only heads of files are read."""
    found = {}
    try:
        for file in _weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name.startswith(prefix):
                        part = opened.get_slice(name)
                        dtype = _DTYPES.get(part.get_dtype())
                        if dtype is None:
                            raise ValueError(f"{name} is held in {part.get_dtype()}; there are {', '.join(_DTYPES)}")
                        found[name[len(prefix) :]] = StoredTensor(file, name, tuple(part.get_shape()), dtype)
    except (*BROKEN, RecordError) as error:
        problems.append(f"{option} {visible(folder)}: its weights cannot be read: {visible(shown(error))}")
    return found


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, not those of its variants (model.fp32-00001-of-00002.safetensors)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        names = sorted(set(named.values())) if isinstance(named, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{index.name} names no files")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(
        "there is no model.safetensors and no index of it; other formats become one by save_pretrained(DIR)"
    )
