"""The trainable model: what trains (modes), how it is scored (grouped log-probs) and sampled (shared prefill)."""

from __future__ import annotations

from covo_rl.policy.features import Features, FeatureStore
from covo_rl.policy.packing import unique_prompts
from covo_rl.policy.policy import Policy
from covo_rl.policy.records import LogProbs

__all__ = ["FeatureStore", "Features", "LogProbs", "Policy", "unique_prompts"]
