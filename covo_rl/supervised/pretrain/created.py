"""Is a model that was just made what it was made of? Loaded as anybody would load it, and compared with its sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from covo_rl.models import load_family
from covo_rl.models.weights import check_finite
from covo_rl.supervised.pretrain.sources import EMBEDDINGS, HEAD, PartSource
from covo_rl.types import UserError

#: how far logits and features may lie apart, of the largest number among them; half precision rounds once more
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
TOKENS = 24


class VerificationError(UserError, RuntimeError):
    """The created folder does not compute what the LLM and the encoder compute."""


@torch.no_grad()
def verify_created(
    folder: Path, llm: PartSource, encoder: PartSource, dtype: torch.dtype, name: str = ""
) -> dict[str, float]:
    """The largest gaps of text logits and of the encoder's output, of the largest number each, and the adapter's size.

    The sources are computed first and let go, so that one model is held at a time. `name` of the folder in messages.

    Raises:
        VerificationError: a gap is too large; rows of text were changed; tensors hold NaN; the adapter gives nothing.
    """
    ids, mel = _inputs(llm, encoder)
    logits, states = _decoder_logits(llm, dtype, ids), _encoder_states(encoder, dtype, mel)
    family = load_family(str(folder), dtype="auto")
    model = family.model
    check_finite(model.named_parameters(), str(folder))
    ours = model(input_ids=ids, use_cache=False).logits[..., : llm.text_rows]
    encoded = model.encoder(mel.to(dtype)).last_hidden_state
    gaps = {"logits": _gap(ours, logits), "encoder": _gap(encoded, states)}
    limit = LIMITS[dtype]
    problems = [
        f"{part} lie {gap:.2g} apart, the limit is {limit:.2g}" for part, gap in gaps.items() if not gap <= limit
    ]
    tied = llm.config.tie_word_embeddings
    for table, there in ((EMBEDDINGS, EMBEDDINGS), (HEAD, EMBEDDINGS if tied else HEAD)):
        wanted = llm.tensors[there].read(slice(llm.text_rows)).to(dtype)
        if not torch.equal(model.llm.get_parameter(table)[: llm.text_rows], wanted):
            problems.append(f"text rows of {table} were changed")
    rows = model.audio_adapter(encoded).float()
    size, spread = float(rows.square().mean().sqrt()), float(rows.std(1).mean())
    if not spread > 0:
        problems.append("the adapter gives the same for every frame")
    if problems:
        raise VerificationError(f"{name or folder} is not what it was made of: {'; '.join(problems)}")
    return {"logits_gap": gaps["logits"], "encoder_gap": gaps["encoder"], "adapter_rms": size}


def _inputs(llm: PartSource, encoder: PartSource) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (1, 24) spread over the text tokens, and log-mel (1, M, frames) like a Whisper's: mostly -1 to 1."""
    ids = torch.linspace(0, llm.text_rows - 1, TOKENS).long()[None]
    shape = (1, encoder.config.num_mel_bins, 2 * encoder.config.max_source_positions)
    return ids, torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def _decoder_logits(llm: PartSource, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    state = {name: tensor.read().to(dtype) for name, tensor in llm.tensors.items()}
    model: Any = _loaded(Qwen2ForCausalLM, llm.config, state, dtype)
    return model(input_ids=ids, use_cache=False).logits[..., : llm.text_rows]


def _encoder_states(encoder: PartSource, dtype: torch.dtype, mel: torch.Tensor) -> torch.Tensor:
    state = {name: tensor.read().to(dtype) for name, tensor in encoder.tensors.items()}
    return _loaded(WhisperEncoder, encoder.config, state, dtype)(mel.to(dtype)).last_hidden_state


def _loaded(model_class: Any, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise VerificationError(f"the source lacks {sorted(report['missing_keys'])[:5]}")
    return model.eval()


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max().clamp(min=1e-9))
