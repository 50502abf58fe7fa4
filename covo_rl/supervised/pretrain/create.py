"""A Covo-Audio from a text decoder and an encoder: what pre-training starts from.

    tokenizer + 3 audio tokens (+ 3 reserved) | text rows as they are, new rows | codes | encoder as it is | new adapter

A row of a new token or code is the mean of the text rows plus N(0, 0.02), in the embeddings and in the head: at first
every code is as likely as a text token of no meaning, and no two are alike. Files are written shard by shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, WhisperConfig

from covo_rl.data.files import write_json
from covo_rl.data.noise import quiet, quiet_bars
from covo_rl.data.terminal import say
from covo_rl.export import ExportError
from covo_rl.export.exporting import check_target, staging
from covo_rl.export.merged import write_shards
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration, CovoAudioProcessor
from covo_rl.models.covo_audio.processing import AUDIO_BOS_TOKEN, AUDIO_EOS_TOKEN, AUDIO_TOKEN
from covo_rl.policy.entries import Entry
from covo_rl.supervised.pretrain.sources import (
    BROKEN,
    EMBEDDINGS,
    HEAD,
    TEXT_TOKENS,
    PartSource,
    StoredTensor,
    decoder_source,
    encoder_source,
)
from covo_rl.types import UserError, shown, visible

AUDIO_TOKENS = (AUDIO_BOS_TOKEN, AUDIO_TOKEN, AUDIO_EOS_TOKEN)
#: where the published tokenizer has three more tokens, so that codes begin at its place
RESERVED_TOKENS = tuple(f"<|reserved_cAUDIO_{i}|>" for i in range(3))
CODE_DEVIATION = 0.02
#: rows of a table that are read at once
ROWS = 8192
#: of an encoder's settings those that the encoder reads
ENCODER_FIELDS = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions",
    "activation_function", "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "init_std",
    "scale_embedding",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CreateError(UserError, ValueError):
    """Every reason why no model can be made of what was given, at once."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n  - ".join(["no model is made:", *problems]))


@dataclass(frozen=True)
class Creation:
    """`llm`, `encoder`: folders or builtin:NAME. `codes`: output codes of speech. `dtype` auto is that of the LLM."""

    llm: str
    encoder: str
    output: str
    codes: int = 16384
    adapter_downsample: int = 8
    adapter_hidden: int = 2048
    seed: int = 0
    dtype: str = "auto"


def create_model(options: Creation) -> dict[str, Any]:
    """Write the model to `options.output` and hold it to its sources; returns what `created.json` says.

    Raises:
        CreateError: what was given does not fit together, all of it at once; nothing is written.
        ExportError: the disk has no room.
        VerificationError: the folder that was written is not what it was made of; it is removed.
    """
    from covo_rl.supervised.pretrain.created import verify_created

    quiet()
    quiet_bars()
    llm, encoder, config = _checked(options)
    dtype = DTYPES.get(options.dtype) or llm.tensors[EMBEDDINGS].dtype
    config.dtype = config.llm_config.dtype = config.encoder_config.dtype = dtype
    entries = _entries(options, llm, encoder, config, dtype)
    size = sum(entry.nbytes for entry in entries) / 1e6
    say(f"writing {len(entries)} tensors, {size:,.1f} MB of {str(dtype).removeprefix('torch.')}")
    with staging(Path(options.output), replace=False) as stage:
        write_shards(entries, stage)
        config.architectures = [CovoAudioForConditionalGeneration.__name__]
        config.save_pretrained(str(stage))
        ends = {"eos_token_id": [config.turn_end_token_id, config.text_end_token_id]}
        GenerationConfig(**ends, pad_token_id=config.text_end_token_id).save_pretrained(str(stage))
        CovoAudioProcessor.from_model_config(config, llm.tokenizer).save_pretrained(str(stage))
        say("written; comparing it with what it was made of")
        verified = verify_created(stage, llm, encoder, dtype, options.output)
        record = {
            "llm": options.llm, "encoder": options.encoder, "seed": options.seed, "text_tokens": llm.text_rows,
            "added_tokens": config.audio_token_index - llm.text_rows, "codes": config.num_audio_codes,
            "first_code": config.audio_token_index, "parameters": sum(math.prod(entry.shape) for entry in entries),
            "dtype": str(dtype).removeprefix("torch."), **verified,
        }  # fmt: skip
        write_json(stage / "created.json", record)
    return record


# -- checks ------------------------------------------------------------------------------------------------------


def _checked(options: Creation) -> tuple[PartSource, PartSource, CovoAudioConfig]:
    problems: list[str] = []
    if options.codes < 0 or options.adapter_hidden < 1:
        problems.append(f"--codes {options.codes} and --adapter-hidden {options.adapter_hidden}: at least 0 and 1")
    if (factor := options.adapter_downsample) < 2 or factor & (factor - 1):
        problems.append(f"--adapter-downsample {factor}: a power of two is needed: 2, 4, 8 (published) or 16")
    if options.dtype not in ("auto", *DTYPES):
        problems.append(f"--dtype {visible(options.dtype)}: there are auto, {', '.join(DTYPES)}")
    try:
        check_target(Path(options.output), replace=False)
    except ExportError:
        problems.append(f"--output {visible(options.output)}: it exists; give a new folder")
    folders = {}
    for option, name in (("--llm", options.llm), ("--encoder", options.encoder)):
        try:
            folders[option] = resolve_model(name)
        except (UserError, FileNotFoundError) as error:
            problems.append(f"{option} {visible(name)}: {error}")
    llm, encoder = PartSource(Path()), PartSource(Path())
    if "--llm" in folders:
        llm = decoder_source(folders["--llm"], problems)
    if "--encoder" in folders:
        encoder = encoder_source(folders["--encoder"], problems)
    if problems:
        raise CreateError(problems)
    try:
        config = configuration(options, llm, encoder)
        problems += _shape_problems(llm, encoder, config)
    except BROKEN as error:
        problems.append(f"the parts do not go together: {visible(shown(error))}")
    if problems:
        raise CreateError(problems)
    return llm, encoder, config


def configuration(options: Creation, llm: PartSource, encoder: PartSource) -> CovoAudioConfig:
    """Sizes of both sources, ids of the LLM's tokenizer, to which the audio tokens are added where it has none.

    Behind Qwen2.5's 151,665 tokens that gives the published ids: 151665 to 151667, reserved ones, code 0 at 151671.
    """
    tokenizer = llm.tokenizer
    if lacking := [token for token in AUDIO_TOKENS if token not in tokenizer.get_vocab()]:
        tokenizer.add_tokens([*lacking, *RESERVED_TOKENS], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = TEXT_TOKENS[0]
    text_end, _, turn_end = tokenizer.convert_tokens_to_ids(list(TEXT_TOKENS))
    start, slot, end = tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS))
    sizes = {**llm.config.to_dict(), "vocab_size": len(tokenizer) + options.codes, "tie_word_embeddings": False}
    for name in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        sizes.pop(name, None)
    return CovoAudioConfig(
        llm_config=sizes,
        encoder_config=WhisperConfig(**{name: getattr(encoder.config, name) for name in ENCODER_FIELDS}),
        audio_token_index=len(tokenizer), adapter_downsample=options.adapter_downsample,
        adapter_hidden_dim=options.adapter_hidden, audio_placeholder_token_id=slot, audio_bos_token_id=start,
        audio_eos_token_id=end, turn_end_token_id=turn_end, text_end_token_id=text_end,
    )  # fmt: skip


def _shape_problems(llm: PartSource, encoder: PartSource, config: CovoAudioConfig) -> list[str]:
    """Tensors that the model needs and the folders lack, or have in another shape."""
    problems = []
    for option, source, prefix in (("--llm", llm, "llm."), ("--encoder", encoder, "encoder.")):
        wrong = []
        for name, shape in _target_shapes(config).items():
            part, own = name.removeprefix(prefix), source.tensors.get(name.removeprefix(prefix))
            if part == name or (part == HEAD and source.config.tie_word_embeddings):
                continue
            if own is None:
                wrong.append(f"{part} is missing")
            elif own.shape[part in (EMBEDDINGS, HEAD) :] != shape[part in (EMBEDDINGS, HEAD) :]:
                wrong.append(f"{part} is {own.shape}, config.json wants {shape}")
            elif part == HEAD and own.shape[0] < source.text_rows:
                wrong.append(f"{part} has {own.shape[0]} rows for {source.text_rows} tokens")
        if wrong:
            more = f" and {len(wrong) - 5} more" if wrong[5:] else ""
            problems.append(
                f"{option} {visible(source.folder)}: {'; '.join(wrong[:5])}{more}. Is the download complete?"
            )
    return problems


def _target_shapes(config: CovoAudioConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = CovoAudioForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# -- tensors -----------------------------------------------------------------------------------------------------


def _entries(
    options: Creation, llm: PartSource, encoder: PartSource, config: CovoAudioConfig, dtype: torch.dtype
) -> list[Entry]:
    """Every tensor of the model under its published name, made when it is written."""
    table = llm.tensors[EMBEDDINGS]
    head = table if llm.config.tie_word_embeddings else llm.tensors[HEAD]
    rows = config.llm_config.vocab_size - llm.text_rows
    makers: dict[str, Callable[[], torch.Tensor]] = {
        f"llm.{EMBEDDINGS}": partial(extended, table, llm.text_rows, rows, _generator(options.seed, 0)),
        f"llm.{HEAD}": partial(extended, head, llm.text_rows, rows, _generator(options.seed, 1)),
    }
    makers |= adapter_tensors(config, _generator(options.seed, 2), _rms(table, llm.text_rows))
    for prefix, source in (("llm.", llm), ("encoder.", encoder)):
        makers = {prefix + name: tensor.read for name, tensor in source.tensors.items()} | makers
    return [Entry(name, shape, dtype, makers[name]) for name, shape in _target_shapes(config).items()]


def _generator(seed: int, part: int) -> Callable[[], torch.Generator]:
    """Every part draws from its own stream, so that another number of codes leaves the adapter as it is."""
    return lambda: torch.Generator().manual_seed(1_000_003 * seed + part)


def _chunks(table: StoredTensor, rows: int) -> Iterator[torch.Tensor]:
    for start in range(0, rows, ROWS):
        yield table.read(slice(start, min(start + ROWS, rows))).double()


def extended(
    table: StoredTensor, text_rows: int, new_rows: int, generator: Callable[[], torch.Generator]
) -> torch.Tensor:
    """(text_rows + new_rows, D): the text rows bit for bit, then rows that are their mean plus N(0, 0.02)."""
    mean_D = sum(chunk.sum(0) for chunk in _chunks(table, text_rows)) / text_rows  # pyright: ignore
    noise = torch.randn(new_rows, table.shape[1], generator=generator())
    return torch.cat([table.read(slice(text_rows)), (mean_D + CODE_DEVIATION * noise).to(table.dtype)])


def _rms(table: StoredTensor, text_rows: int) -> float:
    """Root of the mean square of the text rows' numbers."""
    squares = sum(float(chunk.square().sum()) for chunk in _chunks(table, text_rows))
    return math.sqrt(squares / (text_rows * table.shape[1]))


def adapter_tensors(
    config: CovoAudioConfig, generator: Callable[[], torch.Generator], out: float
) -> dict[str, Callable[[], torch.Tensor]]:
    """New weights of the adapter, which keep the features' size from stage to stage; `out`: what the last one gives.

    A stage has no norm and no residual path, so what it does to the size is done three times over: the usual deviation
    of 0.02 shrinks features to a millionth, and nothing of the clip reaches the decoder. Before a ReLU the variance is
    2 / fan-in (He), which halves what it lets through, else 1 / fan-in. The encoder ends in a LayerNorm, whose numbers
    have a mean square near 1. Biases are 0.
    """
    drawn, result = generator(), {}
    for name, shape in _target_shapes(config).items():
        if not name.startswith("audio_adapter."):
            continue
        if name.endswith("bias"):
            weight = torch.zeros(shape)
        else:
            last = "linear2" in name
            size = math.sqrt((1 if last else 2) / math.prod(shape[1:]))
            is_output = (
                last and shape[0] == config.llm_config.hidden_size and name.split(".")[2] == str(_stages(config))
            )
            weight = torch.randn(shape, generator=drawn) * size * (out if is_output else 1.0)
        result[name] = weight.clone
    return result


def _stages(config: CovoAudioConfig) -> int:
    """Number of the adapter's last stage."""
    return int(math.log2(config.adapter_downsample)) - 1
