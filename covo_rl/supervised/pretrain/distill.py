"""On-policy distillation on text rows: the student writes replies, a teacher says what it would have written.

    distiller = Distiller(options, family, seed=0)              loads the teacher, checks every row
    metrics = distiller.backward(step)                          between the backward of other losses and the step

The replies are sampled by the engine of this project, without codes: text alone. The divergence, and what becomes of
the teacher's mass outside its top k, is in distill_loss.py. Gradients are added to those that the student has, and are
the same on every rank; under DDP call it after the backward pass that joins the ranks.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from covo_rl.config import ConfigError, RolloutConfig, option, value_problems
from covo_rl.engines.own import sample
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.head import head_of
from covo_rl.policy.packable import prepare_attention, restored_attention
from covo_rl.policy.packing import pack
from covo_rl.policy.policy import Policy
from covo_rl.policy.rows import PlainRows, evaluation_mode, packed_hidden
from covo_rl.prompt import position_limit
from covo_rl.supervised.pretrain.distill_loss import TopLogps, chunked_kl, joined_logps, top_logps
from covo_rl.supervised.pretrain.distill_rows import PromptRows
from covo_rl.supervised.pretrain.distill_teacher import DistillError, Teacher, shared_ids
from covo_rl.train.ranks import Ranks
from covo_rl.types import Group, Prompt, visible

if TYPE_CHECKING:
    from accelerate import Accelerator

    from covo_rl.models.base import AudioFamily

#: interval -> options that must lie in it
LIMITS = {
    "[1, inf)": "top_k prompts_per_update every max_new_tokens batch_size",
    "[0, inf)": "weight",
    "(0, inf)": "temperature",
}


@dataclass
class DistillOptions:
    """Distillation of the student towards a teacher, in updates of pre-training."""

    teacher: str = option("", "folder or hub name of the teacher: a causal language model of transformers, or a family")
    data: str = option("", "rows with a prompt (or turns that end with the user's): JSONL or parquet, folder, pattern")
    top_k: int = option(20, "ids of the teacher that are kept per position")
    outside: str = option(
        "rest", "the teacher's mass outside them: one more outcome, or the top k are scaled up to 1",
        ["rest", "renormalise"],
    )  # fmt: skip
    weight: float = option(1.0, "of its loss, the mean KL of a reply's ids, beside that of the packed rows; 0 is off")
    prompts_per_update: int = option(8, "prompts of an update, over all ranks")
    every: int = option(1, "updates from one distillation to the next")
    max_new_tokens: int = option(256, "limit of a reply")
    temperature: float = option(1.0, "at which the student samples its replies; the KL is at 1")
    batch_size: int = option(4, "replies in one pass with gradient")
    teacher_dtype: str = option(
        "auto", "precision of the teacher; auto is its checkpoint's", ["auto", "float32", "bfloat16", "float16"]
    )  # fmt: skip


def distill_problems(options: DistillOptions) -> list[str]:
    """What is missing or impossible in the options; empty when all is well."""
    missing = [f"{name}: give one" for name in ("teacher", "data") if not getattr(options, name)]
    return [f"distill: {problem}" for problem in (*missing, *value_problems(options, LIMITS))]


class Distiller:
    """Adds the gradient of the weighted mean KL over a few prompts' replies to what trains in `family.model`.

    Ranks share the prompts of an update: rank r of W takes r, r + W, ... of the same order. `drawn` counts prompts.
    """

    def __init__(
        self, options: DistillOptions, family: AudioFamily, accelerator: Accelerator | None = None, *, seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """Load the teacher onto the student's device, and check it, the rows and the student.

        `accelerator` says in which precision passes are made, and, where `ranks` does not, which rank this is.

        Raises:
            ConfigError: impossible options.
            ModelError, OSError: the teacher does not load.
            DistillError: it has another vocabulary, or the student's weights are sharded.
            DataError: every problem of every row.
        """
        if problems := distill_problems(options):
            raise ConfigError(problems)
        self.options, self.seed, self.accelerator, self.drawn = options, seed, accelerator, 0
        own = Ranks(accelerator.process_index, accelerator.num_processes) if accelerator else Ranks.current()
        self.ranks = own if ranks is None else ranks
        device = family.embed_tokens.weight.device
        self.teacher = Teacher(options.teacher, dtype=options.teacher_dtype, device=device)
        shared = shared_ids(family, self.teacher)
        self.shared_ids_U = torch.tensor(shared, device=device)
        self.family = text_only(family, shared)
        self.policy = _policy(self.family)
        _check_whole(self.policy)
        limits = {"the student": position_limit(family.model.config), "the teacher": self.teacher.limit}
        self.prompts = PromptRows(
            options.data, family, shared=shared, room=options.max_new_tokens, limits=limits, seed=seed
        )

    def backward(self, step: int) -> dict[str, float]:
        """Distil in the updates whose number `every` divides: adds gradients, returns metrics over all ranks.

        A collective. Nothing happens, and no prompt is drawn, in other updates and where the weight is 0.

        Raises:
            DistillError: the teacher's logits are not finite; on every rank.
        """
        if not self.options.weight or step % self.options.every:
            return {}
        start, count = time.perf_counter(), self.options.prompts_per_update
        places = range(self.drawn, self.drawn + count)[self.ranks.rank :: self.ranks.world]
        groups = self.replies([self.prompts.at(place) for place in places], seed=self.drawn // count)
        self.drawn += count
        tops = self.ranks.together(lambda: [self._top(group) for group in groups], DistillError)
        own = [group.rollouts[0] for group in groups]
        counts = [sum(len(reply.completion_ids) for reply in own), len(own), sum(r.stop_reason != "stop" for r in own)]
        tokens, replies, cut = (sum(values) for values in zip(*self.ranks.gathered(counts), strict=True))
        with self._added_over_ranks():
            total = self._backward(groups, tops, self.options.weight / tokens)
        mass = float(sum(top.mass_M.double().sum().item() for top in tops))
        total, mass = (sum(values) for values in zip(*self.ranks.gathered((total, mass)), strict=True))
        return {
            "distill_kl": total / tokens, "distill_top_mass": mass / tokens, "distill_tokens": float(tokens),
            "distill_reply_length": tokens / replies, "distill_cut": cut / replies,
            "distill_s": time.perf_counter() - start,
        }  # fmt: skip

    def measure(self, prompts: Sequence[Prompt]) -> float:
        """Mean KL of the ids of the student's likeliest replies, over the prompts given to all ranks; no gradient."""
        groups = self.replies(prompts, greedy=True)
        tops = self.ranks.together(lambda: [self._top(group) for group in groups], DistillError)
        with torch.no_grad(), evaluation_mode(self.policy):
            own = [float(self._kl([one], [top]).double().sum()) for one, top in zip(groups, tops, strict=True)]
        pairs = self.ranks.gathered((sum(own), sum(len(group.rollouts[0].completion_ids) for group in groups)))
        totals = [sum(values) for values in zip(*pairs, strict=True)]
        return totals[0] / totals[1] if totals[1] else math.nan

    def replies(self, prompts: Sequence[Prompt], *, seed: int = 0, greedy: bool = False) -> list[Group]:
        """A reply of the student to each, of ids that the teacher has too; `seed` beside the distiller's own."""
        config = RolloutConfig(
            num_generations=1, max_completion_length=self.options.max_new_tokens, temperature=self.options.temperature
        )
        if not prompts:
            return []
        _check_whole(self.policy)  # whatever wrapped it since
        with self._as_policy():
            groups = sample(
                self.policy, prompts, self.policy.features(prompts), config, seed=self.seed * 1_000_003 + seed,
                num_generations=1, greedy=greedy,
            )  # fmt: skip
        self.policy.release()
        return groups

    def state_dict(self) -> dict[str, Any]:
        """How many prompts have been drawn, and of which rows."""
        return {"drawn": self.drawn, "rows": len(self.prompts), "data": self.prompts.fingerprint, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped, on however many ranks.

        Raises:
            DistillError: it drew from other rows, or in another order.
        """
        here = self.state_dict()
        if other := [f"{name} {state.get(name)!r}, here {here[name]!r}" for name in ("rows", "data", "seed")
                     if state.get(name) != here[name]]:  # fmt: skip
            raise DistillError(f"distill: the checkpoint's prompts are others ({'; '.join(other)}): start anew")
        if type(state.get("drawn")) is not int or state["drawn"] < 0:
            raise DistillError(f"distill: the checkpoint says that {state.get('drawn')!r} prompts were drawn")
        self.drawn = state["drawn"]

    # -- one update ----------------------------------------------------------------------------------------------

    def _top(self, group: Group) -> TopLogps:
        """What the teacher says of a reply. Raises DistillError where that is not finite."""
        prompt, ids = group.prompt, group.rollouts[0].completion_ids
        logits_CV = self.teacher.logits([*prompt.input_ids, *ids], len(ids))
        top = top_logps(
            logits_CV, self.shared_ids_U, self.options.top_k,
            outside="renormalise" if self.options.outside == "renormalise" else "rest",
        )  # fmt: skip
        if not bool(top.logps_MK.isfinite().all()):
            row = visible(prompt.example.id)
            raise DistillError(f"teacher {self.options.teacher}: its logits for the reply to row {row} are not finite")
        return top

    def _kl(self, groups: Sequence[Group], tops: Sequence[TopLogps]) -> torch.Tensor:
        """KL of every id of these replies, (M,) float32."""
        family = self.family
        packed = pack(groups, family.audio_token_id, self.policy.device)
        with self._as_policy():
            embeds_LD = family.embed_tokens(family.embeddable(packed.input_ids_L))
            if family.packable:
                layout = PackedLayout(packed)
                hidden_XD = packed_hidden(family, packed.input_ids_L, embeds_LD, packed.position_ids_L, layout)
                predictors_M = packed.predictors_M
            else:
                rows = PlainRows.of(packed)
                hidden_XD, predictors_M = rows.hidden(family, packed.input_ids_L, embeds_LD), rows.predictors_M
            return chunked_kl(hidden_XD.index_select(0, predictors_M), head_of(family), joined_logps(tops))

    def _backward(self, groups: Sequence[Group], tops: Sequence[TopLogps], scale: float) -> float:
        """Adds `scale` times the gradient of the sum of all KL, a few replies at a time; returns the sum."""
        total, size = 0.0, self.options.batch_size
        for start in range(0, len(groups), size):
            part = slice(start, start + size)
            kl = self._kl(groups[part], tops[part]).sum()
            with self._as_policy():  # activations may be made again
                (kl * scale).backward()
            total += float(kl.detach())
        return total

    @contextmanager
    def _as_policy(self) -> Iterator[None]:
        """The attention of packed replies, and the run's precision; afterwards all is as it was."""
        with (
            restored_attention(self.family.decoder),
            self.accelerator.autocast() if self.accelerator else nullcontext(),
        ):
            if self.family.packable:
                prepare_attention(self.family)
            yield

    @contextmanager
    def _added_over_ranks(self) -> Iterator[None]:
        """Gradients made inside are summed over ranks and added to those of before.

        In the order of the parameters: a hook of a wrapper expects no second backward, and ranks without a prompt have
        no pass to make.
        """
        if self.ranks.world == 1:
            yield
            return
        trained = [parameter for parameter in self.family.model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        yield
        device = self.policy.device
        reached = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(reached, op=torch.distributed.ReduceOp.MAX)
        for parameter, earlier, is_reached in zip(trained, before, reached.tolist(), strict=True):
            own, parameter.grad = parameter.grad, earlier
            if not is_reached:
                continue
            own = torch.zeros_like(parameter) if own is None else own
            torch.distributed.all_reduce(own)
            parameter.grad = own if earlier is None else earlier.add_(own)


def text_only(family: AudioFamily, shared: Sequence[int]) -> AudioFamily:
    """The family over the same model, which draws none but these ids, and has a softmax of no others."""
    vocabulary = family.model.config.get_text_config().vocab_size
    others = tuple(sorted({*range(vocabulary)} - {*shared}))
    twin, kind = copy.copy(family), type(family)
    body = {"unsampled_ids": property(lambda self: others), "__module__": kind.__module__}
    twin.__class__ = type(kind.__name__, (kind,), body)
    return twin


def _policy(family: AudioFamily) -> Policy:
    """A policy that samples; making it leaves modes and attention of the model as they are."""
    modes = [(module, module.training) for module in family.model.modules()]
    with restored_attention(family.decoder):
        policy = Policy(family)
    for module, training in modes:
        module.training = training
    return policy


def _check_whole(policy: nn.Module) -> None:
    if getattr(policy, "sharded", False):
        raise DistillError(
            "distill: the student's weights are in pieces on several ranks (FSDP or ZeRO-3), and it must write replies "
            "in the middle of an update: launch with plain DDP, or leave distill out"
        )
