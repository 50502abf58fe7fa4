"""G completions per prompt from one prefill: draws become rollouts with text, stop reason and parsed parts.

    groups = sample(policy, prompts, policy.features(prompts), config, seed=1)

A prompt's rollouts depend on the weights, the seed, and the prompt (row id, ids, clips) alone: not on the rest of
the batch, nor on the number of ranks. The recorded log-probs are those of softmax(logits / temperature) *before*
top-k, top-p or min-p, and equal `policy.logps(..., temperature)` (1e-5 in float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from covo_rl.prompt import parse
from covo_rl.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from torch import nn

    from covo_rl.config import RolloutConfig
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.features import Features

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def sample(
    policy: nn.Module,
    prompts: Sequence[Prompt],
    features: Features,
    config: RolloutConfig,
    *,
    seed: int,
    greedy: bool = False,
    num_generations: int | None = None,
    keep_prompts: bool = False,
) -> list[Group]:
    """One group per prompt, in order. `policy` may be wrapped (DDP, FSDP2); sharded ones must be.

    `num_generations` overrides the config's; `greedy` takes the likeliest token. `keep_prompts` lets a following
    `policy.old_logps` reuse the prompts' keys.
    """
    draws = policy(
        "sample",
        prompts,
        features,
        config,
        seed=seed,
        greedy=greedy,
        num_generations=num_generations,
        keep_prompts=keep_prompts,
    )
    family: Any = getattr(policy, "module", policy).family
    generations = num_generations or config.num_generations
    decoder = TextDecoder(family)
    lengths, stopped = draws.lengths_N.tolist(), draws.stopped_N.tolist()
    all_ids, all_logps = draws.ids_NC.tolist(), draws.logps_NC.tolist()
    rollouts = []
    for n, length in enumerate(lengths):
        ids = tuple(all_ids[n][:length])
        reason = "stop" if stopped[n] else "length"
        text = decoder(ids)
        parsed = parse(text, reason)
        rollouts.append(
            Rollout(ids, tuple(all_logps[n][:length]), text, reason, parsed.think, parsed.answer, parsed.problems)
        )
    return [Group(prompt, tuple(rollouts[p * generations : (p + 1) * generations])) for p, prompt in enumerate(prompts)]


class TextDecoder:
    """Completion ids -> text: special tokens, end and padding dropped, the four tags kept even if they are special.

    Ids beyond the tokenizer (audio codes) have no text and are dropped too.
    """

    def __init__(self, family: AudioFamily) -> None:
        self.tokenizer: Any = family.tokenizer
        tags = set(self.tokenizer.convert_tokens_to_ids(list(TAGS)))
        special = {*self.tokenizer.all_special_ids, *_added_special(self.tokenizer)}
        self.dropped = ({*special, family.audio_token_id} - tags) | {*family.eos_token_ids, family.pad_token_id}
        self.size = len(self.tokenizer)

    def __call__(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i not in self.dropped and i < self.size]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _added_special(tokenizer: Any) -> set[int]:
    """Added tokens marked special that the tokenizer does not list among its special ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i) for i, token in added.items() if getattr(token, "special", False)}
