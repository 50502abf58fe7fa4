"""Tiny text decoders of transformers behind the family interface: windows, shared keys, capped heads, convolutions.

Random weights, large enough that a change of what is seen changes log-probs clearly.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

from covo_rl.models.base import AudioFamily
from covo_rl.types import Example, Group, Prompt, Rollout

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EOS = 2
#: of the groups to score: positions of the prompts, ids of each one's completions
PROMPTS, LENGTHS = (11, 5), (9, 1, 4)


class Capped(nn.Module):
    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


class TextFamily(AudioFamily):
    """A CausalLM that hears nothing. Its audio id lies outside the table."""

    model_type = "text"
    parts = {"llm": "model.", "lm_head": "lm_head."}  # noqa: RUF012
    audio_token_id = 5000
    pad_token_id = 0
    eos_token_ids = (EOS,)

    def clip_features(self, waveform, sampling_rate):
        raise NotImplementedError

    def encode(self, clips):
        return [] if not clips else NotImplemented

    @property
    def lm_head(self):
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return Capped(self.model.lm_head, cap) if cap else self.model.lm_head


class PlainFamily(TextFamily):
    packable = False


class GemmaFamily(TextFamily):
    """With the second embedding of every id; the last ten ids are never drawn."""

    unsampled_ids = tuple(range(80, 90))

    def decoder_inputs(self, ids_L, embeds_LD):
        ids = self.embeddable(ids_L)  # Gemma 4's takes the embeddings too
        both = (ids, embeds_LD) if self.model.config.model_type == "gemma4_text" else (ids,)
        return {"per_layer_inputs": self.decoder.get_per_layer_inputs(*both)}


def _gemma(kind: str, window: int, **options: Any):
    config = {
        **SIZES, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": window, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16, **options,
    }  # fmt: skip
    if kind != "Gemma3":
        config |= {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8}
        del config["query_pre_attn_scalar"]
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}TextConfig"
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, name)(**config))


def _layers(model: str, window: int):
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    more = {"use_sliding_window": True, **kinds} if model == "Qwen2" else {}
    config = getattr(transformers, f"{model}Config")(**SIZES, sliding_window=window, **more)
    return getattr(transformers, f"{model}ForCausalLM")(config)


def _lfm2(window: int):
    kinds = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SIZES, **kinds))


#: name -> (class, window -> CausalLM). Gemma 4: full layers have wider heads; the last two layers share keys.
MAKES = {
    "mistral": (TextFamily, partial(_layers, "Mistral")),
    "qwen2": (TextFamily, partial(_layers, "Qwen2")),
    "llama": (TextFamily, partial(_layers, "Llama")),
    "gemma3": (TextFamily, partial(_gemma, "Gemma3")),
    "gemma3n": (
        GemmaFamily,
        partial(_gemma, "Gemma3n", laurel_rank=4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    ),
    "gemma4": (GemmaFamily, partial(_gemma, "Gemma4", global_head_dim=32, attention_bias=True)),
    "lfm2": (PlainFamily, _lfm2),
}


def text_family(name: str, window: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    kind, make = MAKES[name]
    torch.manual_seed(seed)
    model = make(window).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0 if "embed" not in parameter_name else 3.0)
            elif "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype)
    return kind(model, SimpleNamespace(tokenizer=None))


def own_forward(family: Any) -> Any:
    """The model as transformers runs it, with weights of its own: ids (N, T) -> logits (N, T, V) float32."""
    twin = copy.deepcopy(family.model).requires_grad_(False).eval()
    twin.config._attn_implementation = "eager"
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"

    def logits_NTV(ids_NT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = twin(ids_NT, use_cache=False).logits.float()
        out[..., list(family.unsampled_ids)] = -torch.inf
        return out

    return logits_NTV


def text_prompt(length: int, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(3, 80, (length,), generator=generator).tolist())
    return Prompt(Example(f"text-{seed}", (), "?"), (), "", ids)


def text_groups():
    """Random ids: for scoring it does not matter who wrote them."""
    generator = torch.Generator().manual_seed(5)
    groups = []
    for n, length in enumerate(PROMPTS):
        draws = [tuple(torch.randint(3, 80, (count,), generator=generator).tolist()) for count in LENGTHS]
        groups.append(
            Group(text_prompt(length, n), tuple(Rollout(ids, (0.0,) * len(ids), "", "length") for ids in draws))
        )
    return groups


def expected_logps(own, groups):
    """(N, C): every completion after its prompt, right-padded, by `own_forward`."""
    rows = []
    for group in groups:
        prompt = group.prompt.input_ids
        ids = [torch.tensor((*prompt, *rollout.completion_ids)) for rollout in group.rollouts]
        tables = own(nn.utils.rnn.pad_sequence(ids, batch_first=True)).log_softmax(-1)
        for table_TV, row_T in zip(tables, ids, strict=True):
            places = range(len(prompt), len(row_T))
            rows.append(table_TV[[place - 1 for place in places], row_T[len(prompt) :]])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
