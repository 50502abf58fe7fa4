"""One training step done twice: the stock way and ours.

Stock is what TRL's GRPOTrainer does once audio is patched in: one row per rollout, the clip repeated for every row
and encoded again in every pass, `generate`, and logits (N, C, V) of the completion's positions (`logits_to_keep`).
Phases: sample (encode + prefill + decode), old (no gradient), loss (forward and backward; gradients are left on the
parameters, log-probs (N, C) are returned).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from covo_rl.bench.case import Workload, groups_of
from covo_rl.engines.own import sample
from covo_rl.policy import Policy
from covo_rl.policy.features import Features
from covo_rl.policy.head import token_logps
from covo_rl.types import Group, Prompt


def clip_tensors(policy: Policy, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the encoder takes, one after the other for every key; the mel of each unique clip is made once."""
    assert policy.clips is not None
    tensors = {key: policy.family.clip_features(*policy.clips.waveform(key)).tensors for key in dict.fromkeys(keys)}
    return {name: torch.cat([tensors[key][name] for key in keys]).to(policy.device) for name in tensors[keys[0]]}


def _learned(logps_NC: torch.Tensor, old_NC: torch.Tensor, advantages_N: torch.Tensor) -> torch.Tensor:
    """Backward of the clipped surrogate, token mean; returns the log-probs without their graph."""
    ratio = (logps_NC - old_NC).exp()
    gain = torch.minimum(ratio * advantages_N[:, None], ratio.clamp(0.8, 1.2) * advantages_N[:, None])
    (-gain.mean()).backward()
    return logps_NC.detach()


class Ours:
    """Each clip once, each prompt once; old log-probs from the sampling step's prompt keys."""

    def __init__(self, case: Workload) -> None:
        self.case, self.policy = case, case.policy
        self._features: Features | None = None

    def encode(self) -> Features:
        self.policy.store.clear()
        self._features = self.policy.features(self.case.prompts)
        return self._features

    def sample(self, length: int, seed: int) -> list[Group]:
        features = self._features or self.encode()
        config = replace(self.case.config, max_completion_length=length)
        return sample(self.policy, self.case.prompts, features, config, seed=seed, keep_prompts=True)

    def old(self, groups: Sequence[Group]) -> torch.Tensor:
        return self.policy("old_logps", groups, self._features or self.encode()).logps_NC

    def reference(self, groups: Sequence[Group]) -> torch.Tensor:
        return self.policy("logps", groups, self._features or self.encode(), reference=True).logps_NC

    def loss(self, groups: Sequence[Group], old_NC: torch.Tensor, advantages_N: torch.Tensor) -> torch.Tensor:
        self.policy.train()
        scored = self.policy("logps", groups, self._features or self.encode())
        return _learned(scored.logps_NC, old_NC, advantages_N)


class Stock:
    """One row per rollout."""

    def __init__(self, case: Workload) -> None:
        self.case, self.policy = case, case.policy
        self.model: Any = case.policy.family.model
        self.rows = [prompt for prompt in case.prompts for _ in range(case.cell.generations)]

    def _inputs(self, rows: Sequence[Prompt], completions: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Ids, mask and the clip once per row, as a processor makes them of repeated audio."""
        ids = torch.tensor([prompt.input_ids for prompt in rows], device=self.policy.device)
        ids = ids if completions is None else torch.cat((ids, completions), 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._audio(rows)}

    def _audio(self, rows: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        return clip_tensors(self.policy, [prompt.clip_keys[0] for prompt in rows])

    @torch.no_grad()
    def encode(self) -> Any:
        return self.model.get_audio_features(**self._audio(self.rows))

    @torch.no_grad()
    def sample(self, length: int, seed: int) -> list[Group]:
        self.model.eval()
        torch.manual_seed(seed)
        out = self.model.generate(
            **self._inputs(self.rows), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        ids_NC = out[:, len(self.rows[0].input_ids) :]
        return groups_of(self.case.prompts, ids_NC.unflatten(0, (-1, self.case.cell.generations)).tolist())

    def _logps(self, groups: Sequence[Group]) -> torch.Tensor:
        logits, completions = self._logits(groups)
        picked = logits.gather(-1, completions[..., None])[..., 0]
        # TRL's selective_log_softmax: row by row, to save memory
        return picked - torch.stack([row.logsumexp(-1) for row in logits])

    def _logits(self, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head makes of the positions that predict the completions (N, C, V), and their ids (N, C)."""
        completions = torch.tensor([r.completion_ids for g in groups for r in g.rollouts], device=self.policy.device)
        inputs = self._inputs([g.prompt for g in groups for _ in g.rollouts], completions)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=completions.shape[1] + 1).logits
        return logits[:, :-1], completions

    @torch.no_grad()
    def old(self, groups: Sequence[Group]) -> torch.Tensor:
        self.model.eval()
        return self._logps(groups)

    def loss(self, groups: Sequence[Group], old_NC: torch.Tensor, advantages_N: torch.Tensor) -> torch.Tensor:
        self.model.train()
        return _learned(self._logps(groups), old_NC, advantages_N)


class StockChunked(Stock):
    """One row per rollout, but the head in chunks, as TRL 1.16 does for models whose base returns hidden states."""

    def _logps(self, groups: Sequence[Group]) -> torch.Tensor:
        head = self.policy.family.lm_head
        head.forward = lambda hidden: hidden  # pyright: ignore  # hands out its input
        try:
            hidden, completions = self._logits(groups)
        finally:
            del head.forward
        logps, _ = token_logps(hidden.flatten(0, 1), completions.flatten(), head)
        return logps.view(completions.shape)


Variant = Ours | Stock
VARIANTS: dict[str, type[Variant]] = {"stock": Stock, "stock_chunked": StockChunked, "ours": Ours}
