"""From a checkpoint to a policy, the one way: weights, an adapter on them or what trains, then the policy over both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from covo_rl.config import AdapterConfig, ModelConfig
from covo_rl.models import load_family, use_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.policy import Policy
from covo_rl.policy.trainable import Trainable, make_trainable

if TYPE_CHECKING:
    import torch

    from covo_rl.audio import ClipStore


def trainable_policy(
    model: ModelConfig, adapter: AdapterConfig, *, clips: ClipStore, device: torch.device, learning_rate: float,
    **options: Any,
) -> tuple[Policy, Trainable]:  # fmt: skip
    """A policy whose `adapter` or parts train, and what that is; `options` are those of Policy.

    Raises:
        ModelError, AdapterError, PatternError, QuantisationError, OSError: what does not load or fit.
    """
    family = _family(model, adapter)
    trainable = make_trainable(family, adapter, learning_rate=learning_rate)
    family.model.to(device)
    return Policy(family, peft_model=trainable.peft_model, clips=clips, **options), trainable


def answering_policy(
    model: ModelConfig, adapter: AdapterConfig, *, clips: ClipStore, device: torch.device
) -> tuple[Policy, Trainable | None]:
    """A policy that only answers, and the saved adapter on it, which `adapter` may name.

    Nothing trains, so that the features of a clip are kept. Raises as `trainable_policy`.
    """
    family = _family(model, adapter)
    saved = make_trainable(family, AdapterConfig(adapter=adapter.adapter)) if adapter.adapter else None
    backbone: Any = family.model
    backbone.to(device)
    backbone.requires_grad_(False)
    policy = Policy(family, peft_model=saved.peft_model if saved else None, clips=clips)
    policy.eval()
    return policy, saved


def _family(model: ModelConfig, adapter: AdapterConfig) -> Any:
    path = resolve_model(model.model)
    use_family(model.family, path)
    family = load_family(
        path, dtype=model.dtype, load_in_4bit=adapter.load_in_4bit,
        attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code,
    )  # fmt: skip
    family.speaks = model.speech_mode == "a2ta"
    return family
