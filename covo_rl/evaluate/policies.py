"""A model (and adapter) from disk as the engine's Answerer. The only module here that loads torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from covo_rl.config import AdapterConfig, PromptConfig, RolloutConfig
from covo_rl.data.files import file_sha256
from covo_rl.evaluate.engine import PolicyAnswerer
from covo_rl.evaluate.runner import Ranks
from covo_rl.evaluate.sets import PromptStyle


def process_ranks() -> Ranks:
    """This process among those that accelerate or torchrun started; a single one otherwise."""
    from covo_rl.train.launch import launched_processes, process_state

    if launched_processes() == 1:
        return Ranks()
    state = process_state()
    return Ranks(state.process_index, state.num_processes, state.wait_for_everyone)


def weights_sha256(path: str) -> str | None:
    """One hash over the weight files of a local folder; None for a hub name, whose revision is not known here."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        return None
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def load_answerer(
    model: str, adapter: str | None, *, dtype: str, prompt_config: PromptConfig, rollout_config: RolloutConfig,
    style: PromptStyle | None = None, device: str | None = None, feature_memory_mb: int = 512,
    trust_remote_code: bool = False,
) -> PolicyAnswerer:  # fmt: skip
    """Load a checkpoint folder, hub name or `builtin:tiny`, with a PEFT adapter on it if given, ready to answer."""
    import torch
    from accelerate import PartialState

    from covo_rl.audio import ClipStore
    from covo_rl.models import load_family
    from covo_rl.policy import Policy
    from covo_rl.policy.trainable import make_trainable
    from covo_rl.resolve import resolve_model

    family = load_family(resolve_model(model), dtype=dtype, trust_remote_code=trust_remote_code)
    peft_model: Any = make_trainable(family, AdapterConfig(lora=True, adapter=adapter)).peft_model if adapter else None
    backbone: Any = family.model
    backbone.to(torch.device(device) if device else PartialState().device)
    backbone.requires_grad_(False)  # nothing trains, so that the features of a clip are kept
    clips = ClipStore()
    policy = Policy(family, peft_model=peft_model, clips=clips, feature_memory_mb=feature_memory_mb)
    policy.eval()
    return PolicyAnswerer(policy, clips, prompt_config, rollout_config, style)
