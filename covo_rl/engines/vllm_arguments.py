"""The engine arguments of vLLM that a run asks for: of an engine in this process, and of the command of a server.

Nothing here imports vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from covo_rl.engines.base import EngineError
from covo_rl.resolve import option_map

if TYPE_CHECKING:
    from covo_rl.config import Options

#: ranks that vLLM 0.31 makes room for
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: positions of one pass, where neither the rows nor vllm_options ask for more
BATCHED_TOKENS = 8192


def engine_arguments(
    options: Options,
    family: Any,
    *,
    path: str,
    dtype: str,
    max_model_len: int,
    lora_rank: int | None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Name -> value; `vllm_options` come last. `lora_rank` None serves full weights.

    A prompt's keys are shared in whole blocks alone, hence small blocks. On a CPU a seeded request must not be
    prefilled in two parts (its generator cannot be set back), and nothing there is worth compiling. `hf_overrides` of
    the options are added to ours.

    Raises:
        EngineError: vLLM has no room for this rank.
    """
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max(BATCHED_TOKENS, max_model_len),
        "enable_prefix_caching": True,
        "block_size": 32 if cpu else 16,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "trust_remote_code": options.model.trust_remote_code,
    }
    overrides: dict[str, Any] = {"head_dtype": "float32"}  # as ours: in 16 bits rounded logits are another policy
    if family.vllm_architecture:
        overrides["architectures"] = [family.vllm_architecture]
    if cpu:
        arguments |= {"enable_chunked_prefill": False, "enforce_eager": True}
    if lora_rank is not None:
        room = next((rank for rank in LORA_RANKS if rank >= lora_rank), None)
        if room is None:
            raise EngineError(f"lora_r {lora_rank}: vLLM has room for {LORA_RANKS[-1]} at most")
        arguments |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 2}
    more = option_map(options.engine.vllm_options, "vllm_options")
    return arguments | more | {"hf_overrides": overrides | more.get("hf_overrides", {})}
