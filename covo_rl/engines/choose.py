"""Which engine the options ask for. Nothing of vLLM is imported unless they ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from covo_rl.engines.base import RolloutEngine
from covo_rl.engines.own import OwnEngine

if TYPE_CHECKING:
    from covo_rl.config import Options
    from covo_rl.policy.policy import Policy
    from covo_rl.policy.trainable import Trainable
    from covo_rl.types import Prompt


def rollout_engine(
    options: Options,
    policy: Policy,
    trainable: Trainable | None,
    *,
    max_model_len: int,
    probe_prompt: Prompt,
    rank: int = 0,
    world: int = 1,
) -> RolloutEngine:
    """The engine of `options.engine`, started and checked, at version 0 of the policy. A collective of all ranks.

    `trainable` is what an engine of other memory is sent at every `sync`; None sends nothing: it holds the base that
    options.model names. `max_model_len`: positions of the longest prompt and completion, if the options name no other
    number; `probe_prompt` has a clip.

    Raises:
        EngineError, EngineLost: it cannot start, nothing answers, or it does not run the policy.
    """
    if not options.engine.use_vllm:
        return OwnEngine(policy)
    max_model_len = options.engine.vllm_max_model_length or max_model_len
    if options.engine.vllm_mode == "server":
        from covo_rl.engines.vllm_server import VLLMServer as Engine
    else:
        from covo_rl.engines.vllm_local import VLLMColocate as Engine
    return Engine(
        policy, trainable, options, max_model_len=max_model_len, probe_prompt=probe_prompt, rank=rank, world=world
    )
