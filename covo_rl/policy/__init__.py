"""The trainable model: what trains (LoRA, parts, quantised) and how it is scored (grouped log-probs)."""

from __future__ import annotations

from covo_rl.policy.features import Features, FeatureStore
from covo_rl.policy.packing import unique_prompts
from covo_rl.policy.policy import LogProbs, Policy

__all__ = ["FeatureStore", "Features", "LogProbs", "Policy", "unique_prompts"]
