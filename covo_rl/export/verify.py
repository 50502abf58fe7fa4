"""Does an export do what the trained policy does, when someone else loads it?

A fresh process loads the folder with plain transformers and PEFT (`fresh.py`) and computes logits on stored prompts,
with audio where the data have any. They must equal those of the trained policy, and differ from those of the base
model. `update_kept` is the share of the policy's change that the export shows: with s = trained - base and
o = export - base over all logits, <s, o> / <s, s>. 1 is the whole change, 0 is none. It survives the rounding of 16-bit
weights, which the base has too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig
from covo_rl.export.questions import KEEP, Target, answer_questions, is_ours, read_answers, write_questions
from covo_rl.export.serve_check import RATE, fixed_sounds
from covo_rl.models.base import AudioFamily
from covo_rl.policy.lora import peft_products
from covo_rl.policy.products import whole_float32
from covo_rl.policy.trainable import Trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Prompt

EXACT = 1e-4
#: dtype -> largest difference of a logit, as long as no logit exceeds USUAL_LOGIT
FLAT_TOLERANCE = {"float32": EXACT, "bfloat16": 5e-2, "float16": 1e-2}
USUAL_LOGIT = 10.0
NOISE = 1e-6  # a change below this share of the largest logit is no change
UPDATE_KEPT = 0.5
NOOP = (
    "the export is a no-op: the trained policy equals the base model, so training changed nothing (no updates, a "
    "learning rate of 0, or rewards without differences, where beta has nothing to pull at either); covo-rl export "
    "--allow-noop writes it all the same"
)


@dataclass(frozen=True)
class Expected:
    """What the policy in memory, of precision `dtype`, says to prompts: logits (P, KEEP, V) float32.

    `base` holds the logits with the adapter disabled; None in full mode, where only the fresh base can tell.
    `texts`: the prompts as the chat template writes them.
    """

    prompts: Sequence[Prompt]
    dtype: str
    trained: torch.Tensor
    base: torch.Tensor | None
    texts: Sequence[str] = ()


@dataclass
class Verification:
    """What verification.json says about one export. `problems` is empty iff `ok`."""

    ok: bool
    kind: str
    max_abs_logit_diff_trained: float
    max_abs_logit_diff_base: float
    tolerance: float
    update_kept: float
    max_abs_logit: float
    dtype: str
    base_model: str
    prompts: list[str]
    problems: list[str] = field(default_factory=list)
    noop: bool = False
    fresh_process_imports_covo_rl: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    prompts_with_audio: int = 0
    #: of an adapter that was trained on a 4-bit base: how it does on the base unquantised, which is no condition
    unquantised: dict[str, float] | None = None
    #: `tolerance` is the larger of the first and the second times `max_abs_logit`
    tolerance_flat: float = 0.0
    tolerance_relative: float = 0.0


# -- what the trained policy says --------------------------------------------------------------------------------


def synthetic_prompts(family: AudioFamily, clips: ClipStore) -> list[Prompt]:
    """Two fixed questions with sound that needs no data set: a rising tone, and noise that fades."""
    rising, fading, _ = (Clip(array=sound, sampling_rate=RATE) for sound in fixed_sounds())
    rows = [
        Example("export-tone", (rising,), "Which sound do you hear?", ("a rising tone", "noise that fades")),
        Example("export-noise", (fading,), "Does the sound get louder or softer?", ("louder", "softer")),
    ]
    return [build_prompt(row, family, clips, PromptConfig()) for row in rows]


@torch.no_grad()
def policy_logits(prompt: Prompt, family: AudioFamily, clips: ClipStore) -> torch.Tensor:
    """Logits (KEEP, V) float32 at the last prompt positions, the way rollouts and scoring compute them."""
    device: Any = family.embed_tokens.weight.device
    ids = torch.tensor([prompt.input_ids], device=device)
    embeds = family.embed_tokens(family.embeddable(ids))
    if prompt.clip_keys:
        audio = family.encode([family.clip_features(*clips.waveform(key)) for key in prompt.clip_keys])
        slots = (ids == family.audio_token_id)[..., None]
        embeds = embeds.masked_scatter(slots, torch.cat(audio).to(embeds))
    more = {name: value[None] for name, value in family.decoder_inputs(ids[0], embeds[0]).items()}
    hidden = family.decoder(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=False, **more
    ).last_hidden_state
    return family.lm_head(hidden[0, -KEEP:]).float().cpu()


def ask_policy(modes: Trainable, prompts: Sequence[Prompt], clips: ClipStore) -> Expected:
    """Ask the policy in memory, with dropout off and with the adapter on and off."""
    model, was_training = modes.family.model, modes.family.model.training

    def logits() -> torch.Tensor:
        # in 16 bits, and in TF32, the policy rounds elsewhere than who loads the export
        with peft_products(model), whole_float32():
            return torch.stack([policy_logits(prompt, modes.family, clips) for prompt in prompts])

    model.eval()
    try:
        trained, base = logits(), None
        if modes.peft_model is not None and not modes.replaced:
            with modes.peft_model.disable_adapter():
                base = logits()
    finally:
        model.train(was_training)
    texts = [AudioFamily.render(modes.family, prompt.messages) for prompt in prompts]
    return Expected(prompts, str(next(model.parameters()).dtype).removeprefix("torch."), trained, base, texts)


# -- what a fresh process says -----------------------------------------------------------------------------------


def run_fresh(
    family: AudioFamily, base: str, targets: Sequence[Target], prompts: Sequence[Prompt], clips: ClipStore
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits (P, KEEP, V) float32 by target name and `Target.base`, and notes, from a process that starts from nothing.

    Families of transformers run with covo_rl forbidden, on the packages that this process has.

    Raises:
        ExportError: the process failed; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="covo-rl-verify-") as scratch:
        write_questions(Path(scratch), family, base, targets, prompts, clips)
        answer_questions([Path(scratch)], own=is_ours(family))
        return read_answers(Path(scratch))


# -- the verdict -------------------------------------------------------------------------------------------------


def largest_gap(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite where anything is not finite or shapes differ."""
    gap = (left.double() - right.double()).abs().max().item() if left.shape == right.shape else math.inf
    return gap if math.isfinite(gap) else math.inf


def update_kept(trained: torch.Tensor, before: torch.Tensor, export: torch.Tensor, fresh_base: torch.Tensor) -> float:
    """<s, o> / <s, s> with s = trained - before and o = export - fresh_base; 0 where the policy did not change."""
    s, o = (trained.double() - before.double()).flatten(), (export.double() - fresh_base.double()).flatten()
    norm = torch.dot(s, s).item()
    return torch.dot(s, o).item() / norm if norm > 0 else 0.0


def is_change(gap: float, logits: torch.Tensor) -> bool:
    """Is a difference of logits of this size more than noise?"""
    return gap > NOISE * max(logits.abs().max().item(), 1.0)


def is_idle(expected: Expected) -> bool:
    """True where the trained policy answers as its base, adapter disabled, does; False where that is unknown."""
    trained, base = expected.trained, expected.base
    # asked this way round, logits that are not finite are no idle policy
    return base is not None and largest_gap(trained, base) <= NOISE * max(trained.abs().max().item(), 1.0)


def compare_logits(
    target: Target,
    expected: Expected,
    logits: Mapping[str, torch.Tensor],
    notes: Mapping[str, Any],
    *,
    base_model: str,
    allow_noop: bool = False,
) -> Verification:
    """Compare one export with the policy and with the base: numbers in, a verdict out.

    An adapter in float32 does the policy's own arithmetic, so only the flat tolerance counts. Merging adds before it
    multiplies, and 16-bit weights are rounded: errors that grow with the logits. Of the precisions of export and
    policy the looser counts.
    """
    export, fresh_base = logits[target.name], logits[target.base]
    before, top = fresh_base if expected.base is None else expected.base, expected.trained.abs().max().item()
    flat = max(FLAT_TOLERANCE.get(dtype, EXACT) for dtype in (target.dtype, expected.dtype))
    relative = 0.0 if target.kind == "adapter" and flat == EXACT else flat / USUAL_LOGIT
    tolerance = max(flat, relative * top)
    gap, change = largest_gap(export, expected.trained), largest_gap(export, fresh_base)
    share = update_kept(expected.trained, before, export, fresh_base)
    problems = []
    if not gap <= tolerance:
        rounded = target.kind == "merged" and target.dtype != "float32"
        hint = "; merging rounds: use --dtype float32, or export the adapter" if rounded else ""
        problems.append(f"logits differ from the trained policy by {gap:.3g}, tolerance {tolerance:.3g}{hint}")
    idle = is_idle(expected) if expected.base is not None else (change == 0.0 and gap <= tolerance)
    if idle and not allow_noop:
        problems.append(NOOP)
    elif not idle and not share >= UPDATE_KEPT:
        problems.append(
            f"the export shows {100 * share:.0f} % of what training changed (update_kept {share:.3g}): it does not "
            f"take effect" + ("" if target.dtype == "float32" else f", or {target.dtype} rounds it away: use float32")
        )
    loading = dict(notes.get(target.name, {}))
    rendered, texts = loading.pop("rendered", None), list(expected.texts)
    problems += [f"{kind} on loading: {', '.join(keys[:5])}" for kind, keys in loading.items() if keys]
    if rendered is not None and rendered != texts:
        problems.append(f"the exported chat template renders {rendered[0]!r}, training used {texts[0]!r}")
    return Verification(
        not problems, target.kind, gap, change, tolerance, share, top, target.dtype, base_model,
        [prompt.example.id for prompt in expected.prompts], problems, idle, "covo_rl" in notes["loaded"],
        notes["versions"], tolerance_flat=flat, tolerance_relative=relative,
        prompts_with_audio=sum(bool(prompt.clip_keys) for prompt in expected.prompts),
    )  # fmt: skip


def compare_unquantised(held: Target, published: Target, trained: torch.Tensor, logits: Mapping[str, torch.Tensor]):
    """How an adapter does on the base as `published`, trained on the base as `held`: information, no verdict.

    What lies between the two bases without the adapter is the quantisation's own share of the difference.
    """
    export, base, held_base = logits[published.name], logits[published.base], logits[held.base]
    return {
        "max_abs_logit_diff_trained": largest_gap(export, trained),
        "max_abs_logit_diff_of_bases": largest_gap(base, held_base),
        "update_kept": update_kept(trained, held_base, export, base),
    }
