"""Points 4, 5 and 9: the packed pass is the model's own forward, the text decoder's own class, and does not leak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from covo_rl.run.conformance.outcome import Figure, Gap
from covo_rl.run.conformance.subject import Subject, largest_difference
from covo_rl.types import Group

WINDOW = 16
#: text models without a CausalLM class of their own: the type whose class computes the same on text
SAME_ON_TEXT = {"qwen2_5_omni_text": "qwen2", "qwen3_omni_moe_text": "qwen3_moe", "phi4_multimodal": "phi3"}


# -- 4. packed = plain rows --------------------------------------------------------------------------------------------


def packed(subject: Subject) -> Iterator[Figure | Gap]:
    """Log-probs and gradients against the model's own forward, one row per rollout."""
    gap, gradient = subject.compare(subject.groups)
    yield Figure("log-probs, difference", gap, subject.exact,
                 "the decoder takes more than embeddings and positions, or the head is more than a Linear")  # fmt: skip
    yield Figure("gradients, relative difference", gradient, subject.exact_gradient,
                 "a part of the decoder is outside autograd in one of the passes")  # fmt: skip
    with subject.short_windows(WINDOW) as layers:
        if layers:
            gap, gradient = subject.compare(subject.groups[:2])
            yield Figure(f"log-probs with windows of {WINDOW}, difference", gap, subject.exact,
                         "a sliding window is not given to the grouped attention")  # fmt: skip
            yield Figure(f"gradients with windows of {WINDOW}, relative difference", gradient, subject.exact_gradient,
                         "a sliding window is not given to the grouped attention")  # fmt: skip


# -- 5. text -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def text(subject: Subject) -> Iterator[Figure | Gap]:
    """Text-only log-probs equal those of the text decoder's own CausalLM class, with the same weights."""
    group = next(group for group in subject.groups if not group.prompt.clip_keys)
    plain, why = causal_model(subject)
    if plain is None:
        yield Gap("the text model's own class", why)
        return
    theirs = []
    for rollout in group.rollouts:
        ids = torch.tensor([[*group.prompt.input_ids, *rollout.completion_ids]], device=subject.policy.device)
        logits_CV = plain(input_ids=ids, use_cache=False).logits[0, len(group.prompt.input_ids) - 1 : -1].float()
        table_CV = subject.drawable(logits_CV).log_softmax(-1)
        theirs.append(table_CV.gather(1, ids[0, len(group.prompt.input_ids) :, None])[:, 0])
    ours = subject.packed_logps([group], reference=True)
    yield Figure(f"log-probs of {type(plain).__name__}, difference", largest_difference(ours, theirs), subject.exact,
                 "the head scales or caps its logits there (logits_scaling, final_logit_softcapping)")  # fmt: skip


def causal_model(subject: Subject) -> tuple[Any, str]:
    """The CausalLM class of the text configuration over the same weights; or None and why there is none."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = subject.family.model.config.get_text_config()
    if kind := SAME_ON_TEXT.get(config.model_type):
        values = {
            name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")
        }
        config = AutoConfig.for_model(kind, **values)
    try:
        with init_empty_weights(include_buffers=False):
            plain: Any = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        return None, " ".join(str(error).split())[:160]
    family = subject.family
    head = family.model.get_output_embeddings()
    weights = {f"model.{name}": value for name, value in _base_weights(family.decoder)}
    weights |= {f"lm_head.{name}": value for name, value in _base_weights(head)}
    wanted = set(plain.state_dict())
    if lacking := sorted(wanted - weights.keys()):
        return None, f"{type(plain).__name__} has {len(lacking)} other tensors, {lacking[0]} for example"
    plain.requires_grad_(False)  # assigned tensors take over what it says, and they are the policy's own
    plain.load_state_dict({name: weights[name] for name in wanted}, assign=True, strict=False)
    return plain.to(subject.policy.device).eval(), ""


def _base_weights(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module without its adapters, under the names that it has without them."""
    for name, value in module.state_dict(keep_vars=True).items():
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), value


# -- 9. no leak --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def leaks(subject: Subject) -> Iterator[Figure | Gap]:
    """Other ids in one completion move no log-prob of another, of the same prompt or of the next."""
    first, other = subject.group(subject.prompts[0], (9, 8), seed=11), subject.group(subject.prompts[1], (7,), seed=12)
    changed = subject.group(subject.prompts[0], (9,), seed=13).rollouts[0]
    before = subject.packed_logps([first, other])
    after = subject.packed_logps([Group(first.prompt, (changed, first.rollouts[1])), replace(other)])
    moved = largest_difference(before[1:], after[1:])
    # tokens that share an expert share a product, whose last bit depends on how many they are
    limit = subject.exact if has_experts(subject.family.decoder) else 0.0
    yield Figure("another completion's log-probs, difference", moved, limit,
                 "the decoder keeps state across positions (Mamba, convolutions): packable = False")  # fmt: skip
    yield Figure("its own log-probs, difference", largest_difference(before[:1], after[:1]), 1e-4,
                 "the completion is not seen at all", least=True)  # fmt: skip


def has_experts(decoder: Any) -> bool:
    """Whether a router sends positions to experts."""
    return any(name.rsplit(".", 1)[-1] == "experts" for name, _ in decoder.named_modules())
