"""Point 6: what is sampled is what is scored, greedy is `generate`, and the audio is heard."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines.health import self_check
from covo_rl.engines.own import sample
from covo_rl.export.questions import stock_inputs
from covo_rl.run.conformance.outcome import Figure, Gap
from covo_rl.run.conformance.subject import Subject

#: ids of a completion
LENGTH = 12
HEARD = 1e-3
#: special ids that are looked at; some tokenizers have thousands
MOST_SPECIAL = 256


@torch.no_grad()
def sampling(subject: Subject) -> Iterator[Figure | Gap]:
    """Sampling = scoring; greedy = `generate`; removing and swapping the audio change log-probs."""
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH)
    check = self_check(subject.policy, subject.prompts, config)
    yield Figure("sampling against scoring, difference", check.sampling_vs_scoring, subject.exact,
                 "the decode step sees other keys, positions or ids than the packed pass")  # fmt: skip
    for name, change in (("without", check.without_audio), ("with swapped", check.swapped_audio)):
        yield Figure(f"log-probs {name} audio, change", change or 0.0, HEARD, "the audio embeddings are not used",
                     least=True)  # fmt: skip
    yield Figure("special ids that its own forward embeds otherwise", len(strange := strange_ids(subject)), 0,
                 f"a completion may hold {strange[:3]}: list them as unsampled_ids")  # fmt: skip
    differing, first = greedy_differences(subject)
    if subject.dtype == torch.float32:
        yield Figure(f"greedy ids of {LENGTH} that `generate` writes otherwise", differing, 0,
                     "`generate` masks or penalises ids that sampling does not: unsampled_ids")  # fmt: skip
    else:
        yield Figure("first greedy ids that `generate` writes otherwise", first, 0,
                     "`generate` masks or penalises ids that sampling does not: unsampled_ids")  # fmt: skip
        yield Gap("greedy ids after the first", f"{subject.dtype} rounds, so two kernels may part at a near tie")


def strange_ids(subject: Subject) -> list[int]:
    """Special ids that can be drawn, and are not to the decoder what they are in the model's own step of `generate`."""
    family, device = subject.family, subject.policy.device
    never = {*family.unsampled_ids, *subject.plain_ids.tolist()}
    some = sorted({*subject.special_ids} - never)[:MOST_SPECIAL]
    ids_N1 = torch.tensor([[i] for i in some if 0 <= i < family.embedded_ids], device=device)
    before_N1, ones_N1 = torch.full_like(ids_N1, int(subject.plain_ids[0])), torch.ones_like(ids_N1)
    model: Any = family.model
    memory = model(input_ids=before_N1, attention_mask=ones_N1, use_cache=True).past_key_values
    step = {"attention_mask": ones_N1.expand(-1, 2), "position_ids": ones_N1}
    own: list[torch.Tensor] = []
    hook = family.decoder.register_forward_hook(lambda module, args, output: own.append(output.last_hidden_state))
    try:
        model(input_ids=ids_N1, past_key_values=copy.deepcopy(memory), **step)
    finally:
        hook.remove()
    embeds_N1D = family.embed_tokens(family.embeddable(ids_N1))
    step |= family.decoder_inputs(ids_N1, embeds_N1D)
    ours = family.decoder(inputs_embeds=embeds_N1D, past_key_values=memory, **step).last_hidden_state
    apart_N = (own[0] - ours).flatten(1).abs().amax(1) > subject.exact
    return ids_N1[apart_N, 0].tolist()


def greedy_differences(subject: Subject) -> tuple[int, int]:
    """Over all prompts: greedy ids that differ from those of the model's own `generate`; of the first ids alone."""
    from transformers import GenerationConfig

    policy, family = subject.policy, subject.family
    config = RolloutConfig(num_generations=1, max_completion_length=LENGTH)
    groups = sample(policy, subject.prompts, policy.features(subject.prompts), config, seed=0, greedy=True)
    how = GenerationConfig(
        do_sample=False, max_new_tokens=LENGTH, eos_token_id=list(family.eos_token_ids),
        pad_token_id=family.pad_token_id, suppress_tokens=list(family.unsampled_ids) or None,
    )  # fmt: skip
    model: Any = family.model
    differing = first = 0
    for prompt, group in zip(subject.prompts, groups, strict=True):
        inputs = subject.placed(stock_inputs(prompt, family, subject.clips))
        ours = list(group.rollouts[0].completion_ids)
        theirs = model.generate(**inputs, generation_config=how)[0, len(prompt.input_ids) :].tolist()
        differing += sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
        first += ours[0] != theirs[0]
    return differing, first
