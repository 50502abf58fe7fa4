"""On-policy distillation on text rows: the student writes replies, a teacher says what it would have written.

    distiller = Distiller(options, family, accelerator, seed=0)      loads the teacher, checks every row
    distiller.follow(policy)                                         what the trainer wraps, before the first update
    metrics = distiller.backward(step)                               between the other backward passes and the step

The replies are sampled by the engine of this project, without codes: text alone. The divergence, and what becomes of
the teacher's mass outside its top k, is in distill_loss.py. Gradients are added to those that the student has. Under
DDP call it after the backward pass that joins the ranks; they then have the same gradient. Under FSDP2 every pass goes
through the policy that is sharded.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.config import ConfigError, RolloutConfig
from covo_rl.engines.own import sample
from covo_rl.policy.packable import prepare_attention, restored_attention
from covo_rl.policy.policy import Policy
from covo_rl.prompt import position_limit
from covo_rl.supervised.pretrain.distill_loss import TopLogps, reply_kl, top_logps
from covo_rl.supervised.pretrain.distill_options import DistillOptions, distill_problems
from covo_rl.supervised.pretrain.distill_rows import PromptRows
from covo_rl.supervised.pretrain.distill_teacher import DistillError, Teacher, shared_ids
from covo_rl.train.ranks import Ranks
from covo_rl.types import Group, Prompt, Rollout, visible

if TYPE_CHECKING:
    from accelerate import Accelerator

    from covo_rl.models.base import AudioFamily

__all__ = ["DistillError", "DistillOptions", "Distiller", "text_only"]


class Distiller:
    """Adds the gradient of the weighted mean KL over a few prompts' replies to what trains in `family.model`.

    Ranks share the prompts of an update: rank r of W takes r, r + W, ... of the same order. `drawn` counts prompts.
    """

    def __init__(
        self, options: DistillOptions, family: AudioFamily, accelerator: Accelerator | None = None, *, seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """Load the teacher onto the accelerator's device, or the student's, and check it and the rows.

        `accelerator` says in which precision passes are made, and, where `ranks` does not, which rank this is.

        Raises:
            ConfigError: impossible options.
            ModelError, OSError: the teacher does not load.
            DistillError: it has another vocabulary.
            DataError: every problem of every row.
        """
        if problems := distill_problems(options):
            raise ConfigError(problems)
        self.options, self.seed, self.accelerator, self.drawn = options, seed, accelerator, 0
        own = Ranks(accelerator.process_index, accelerator.num_processes) if accelerator else Ranks.current()
        self.ranks = own if ranks is None else ranks
        device = accelerator.device if accelerator else family.embed_tokens.weight.device
        self.teacher = Teacher(options.teacher, dtype=options.teacher_dtype, device=device)
        shared = shared_ids(family, self.teacher)
        self.shared_ids_U = torch.tensor(shared, device=device)
        self.family = text_only(family, shared)
        self.policy = _own_policy(self.family)
        limits = {"the student": position_limit(family.model.config), "the teacher": self.teacher.limit}
        self.prompts = PromptRows(
            options.data, family, shared=shared, room=options.max_new_tokens, limits=limits, seed=seed
        )

    def follow(self, policy: Policy) -> None:
        """What the trainer trains, ready for the first update: passes go through it where its parameters are in pieces
        (FSDP2), whose hooks gather them.

        Raises:
            DistillError: nothing trains that could learn from text; or a decoder that cannot be packed samples rows one
                after the other, while ranks with pieces of its weights would wait.
        """
        self._check_trains()
        if not policy.sharded:
            return
        if not self.family.packable:
            raise DistillError(
                f"distill: {type(self.family.decoder).__name__} cannot be packed, so that ranks with pieces of its "
                "weights would wait for one another while it writes: launch without FSDP"
            )
        self.policy = policy

    def _check_trains(self) -> None:
        parts = [self.family.embed_tokens, self.family.decoder, self.family.lm_head]
        if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
            raise DistillError(
                "distill: neither decoder nor head nor embeddings train (train_parts), so that nothing can learn from "
                "text: leave distill out of this stage"
            )

    def backward(self, step: int) -> dict[str, float]:
        """Distil in the updates whose number `every` divides: adds gradients, returns metrics over all ranks.

        A collective. Nothing happens, and no prompt is drawn, in other updates and where the weight is 0.

        Raises:
            DistillError: the teacher's logits are not finite, on every rank; nobody called `follow` under FSDP2.
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
            total = self._passes(groups, tops, scale=self.options.weight / tokens)
        mass = float(sum(top.mass_M.double().sum().item() for top in tops))
        total, mass = (sum(values) for values in zip(*self.ranks.gathered((total, mass)), strict=True))
        return {
            "distill_kl": total / tokens, "distill_top_mass": mass / tokens, "distill_tokens": float(tokens),
            "distill_reply_length": tokens / replies, "distill_cut": cut / replies,
            "distill_s": time.perf_counter() - start,
        }  # fmt: skip

    def measure(self, prompts: Sequence[Prompt]) -> float:
        """Mean KL of the ids of the student's likeliest replies, over the prompts given to all ranks; no gradient.

        A collective. NaN where no rank has any.
        """
        groups = self.replies(prompts, greedy=True)
        tops = self.ranks.together(lambda: [self._top(group) for group in groups], DistillError)
        with torch.no_grad(), self.policy.evaluating():
            total = self._passes(groups, tops)
        pairs = self.ranks.gathered((total, sum(len(group.rollouts[0].completion_ids) for group in groups)))
        totals = [sum(values) for values in zip(*pairs, strict=True)]
        return totals[0] / totals[1] if totals[1] else math.nan

    def replies(self, prompts: Sequence[Prompt], *, seed: int = 0, greedy: bool = False) -> list[Group]:
        """A reply of the student to each, of ids that the teacher has too; `seed` beside the distiller's own."""
        config = RolloutConfig(
            num_generations=1, max_completion_length=self.options.max_new_tokens, temperature=self.options.temperature
        )
        with self._as_policy():
            if not prompts and not self.policy.sharded:
                return []
            asked = prompts or [self.prompts.at(0)]  # a rank without any keeps the others in step
            groups = sample(
                self.policy, asked, self.policy.features(asked), config, seed=self.seed * 1_000_003 + seed,
                num_generations=1, greedy=greedy,
            )  # fmt: skip
        self.policy.release()
        return groups if prompts else []

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
            outside="rest" if self.options.outside == "rest" else "renormalise",
        )  # fmt: skip
        if not bool(top.logps_MK.isfinite().all()):
            row = visible(prompt.example.id)
            raise DistillError(f"teacher {self.options.teacher}: its logits for the reply to row {row} are not finite")
        return top

    def _passes(self, groups: Sequence[Group], tops: Sequence[TopLogps], *, scale: float | None = None) -> float:
        """The sum of all KL, a few replies at a time; with a `scale` its gradient, times that, is added.

        Sharded ranks make as many passes each, some of which count nothing, and average gradients.
        """
        total, size = 0.0, self.options.batch_size
        parts = [(groups[start : start + size], tops[start : start + size]) for start in range(0, len(groups), size)]
        sharded = self.policy.sharded
        idle = max(self.ranks.gathered(len(parts))) - len(parts) if sharded else 0
        for number in range(len(parts) + idle):
            part, counts = (parts[number], 1.0) if number < len(parts) else (self._idle(), 0.0)
            with self._as_policy():  # activations of a checkpoint are made again in the backward
                kl = self.policy(reply_kl, *part).sum()
                if scale is not None:
                    (kl * (counts * scale * (self.ranks.world if sharded else 1))).backward()
            total += float(kl.detach()) * counts
        return total

    def _idle(self) -> tuple[list[Group], list[TopLogps]]:
        """A reply that keeps a rank without work in step."""
        end = next(i for i in self.family.eos_token_ids if i in self.shared_ids_U)
        group = Group(self.prompts.at(0), (Rollout((end,), (0.0,), "", "stop"),))
        uniform_1V = torch.zeros(1, int(self.shared_ids_U[-1]) + 1, device=self.shared_ids_U.device)
        return [group], [top_logps(uniform_1V, self.shared_ids_U, self.options.top_k)]

    @contextmanager
    def _as_policy(self) -> Iterator[None]:
        """The attention of packed replies, text alone, and the run's precision; afterwards all is as it was."""
        if self.policy.sharded and self.policy.family is self.family:
            raise DistillError(
                "distill: the student's weights are in pieces on several ranks: call follow(policy), with the policy "
                "that is sharded, before the first update"
            )
        policy, family = self.policy, self.policy.family
        with (
            restored_attention(self.family.decoder),
            self.accelerator.autocast() if self.accelerator else nullcontext(),
        ):
            if self.family.packable:
                prepare_attention(self.family)
            policy.family = self.family
            try:
                yield
            finally:
                policy.family = family

    @contextmanager
    def _added_over_ranks(self) -> Iterator[None]:
        """Gradients made inside are summed over ranks and added to those of before.

        In the order of the parameters: a hook of DDP expects no second backward, and ranks without a prompt have no
        pass to make. Sharded ones have done it.
        """
        if self.ranks.world == 1 or self.policy.sharded:
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


def _own_policy(family: AudioFamily) -> Policy:
    """A policy that samples; making it leaves modes and attention of the model as they are."""
    modes = [(module, module.training) for module in family.model.modules()]
    with restored_attention(family.decoder):
        policy = Policy(family)
    for module, training in modes:
        module.training = training
    return policy
