"""A GRPO run small enough to be killed hundreds of times: the real saver, sampler, advantages, loss and logs around a
policy that is a table of logits. Rollouts are drawn from torch's global random state, so a resume that forgets any
random state, counter, rollout or log-prob ends with other metrics.

    python tests/faults/toy.py --output DIR --steps 12 [--resume auto] [--num-iterations 2] [--steps-per-generation 2]
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from covo_rl.algo.advantage import advantages
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.normalizer import Normalizer
from covo_rl.config import Options
from covo_rl.records.folder import Run
from covo_rl.train.batch import Batch, refill
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.train.sampler import PromptSampler, share
from covo_rl.train.shutdown import exit_after
from covo_rl.types import Example, Group, Prompt, RewardTable, Rollout

ROWS, VOCABULARY, LENGTH, GROUP = 10, 6, 3, 4


class ToyPolicy(nn.Module):
    """Logits per row and position; the bias is shared and the frozen part never moves."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(0.1 * torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator))
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, row: int):
        return (self.logits[row] + self.bias).log_softmax(-1)


class ToyTrainer:
    """The real trainer's protocol: generate a batch, then `num_iterations * steps_per_generation` updates of it."""

    def __init__(self, options: Options, examples: list[Example]):
        self.options = options
        self.ranks = Ranks.current()
        self.sampler = PromptSampler(examples, options.train.seed)
        self.policy = ToyPolicy()
        self.optimizer = torch.optim.AdamW([
            {"params": [self.policy.logits], "lr": 0.1},
            {"params": [self.policy.bias], "lr": 0.01, "betas": (0.8, 0.9)},
        ])  # fmt: skip
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + 0.1 * n))
        self.step = 0
        self.update_index = 0
        self.batch: Batch | None = None
        self.totals: dict[str, float] = {}
        random.seed(options.train.seed)
        np.random.seed(options.train.seed)
        torch.manual_seed(options.train.seed + self.ranks.rank)

    @property
    def device(self):
        return torch.device("cpu")

    def prompt_of(self, example_id: str) -> Prompt:
        row = next(e for e in self.sampler.examples if e.id == example_id)
        return Prompt(row, (), row.question, tuple(range(5)))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "update_index": self.update_index, "totals": self.totals,
                "sampler": self.sampler.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.update_index = state["step"], state["update_index"]
        self.totals = dict(state["totals"])
        self.sampler.load_state_dict(state["sampler"])

    def settle(self, patience):
        pass

    def run(self, saver: Saver | None = None, run: Run | None = None) -> None:
        train = self.options.train
        updates = train.num_iterations * train.steps_per_generation
        while self.step < train.max_steps:
            if self.batch is None:
                self.batch = self.generate()
            while self.update_index < updates:
                self.update(self.batch, self.update_index % train.steps_per_generation)
                self.update_index += 1
                if saver and self.update_index < updates:
                    saver.after_update(self)
            metrics = {"step": self.step + 1, "epoch": self.sampler.epoch, "noise": random.random() + np.random.rand(),
                       **self.totals}  # fmt: skip
            self.step, self.update_index, self.batch, self.totals = self.step + 1, 0, None, {}
            if run:
                run.log_metrics(metrics)
                run.log_rollouts(self.step, [{"step": self.step}])
            if saver:
                saver.after_step(self)
        if saver:
            saver.finish(self)

    def generate(self) -> Batch:
        groups, table = self.rollouts(self.options.train.prompts_per_step)
        keep = advantages(table, self.options.loss).informative_P
        wanted = self.ranks.gathered(int((~keep).sum()))
        if self.options.train.dynamic_sampling and sum(wanted):
            more, more_table = self.rollouts(sum(wanted), wanted)
            groups, table = refill(groups, table, keep, more, more_table)
        batch = Batch(groups, table, advantages(table, self.options.loss))
        batch.old_logps = [torch.tensor([r.logps for r in group.rollouts]) for group in groups]
        return batch

    def rollouts(self, count: int, counts: list[int] | None = None) -> tuple[list[Group], RewardTable]:
        rows, rank = self.sampler.take(count), self.ranks.rank
        mine = share(rows, rank, self.ranks.world)
        if counts is not None:
            mine = rows[sum(counts[:rank]) : sum(counts[: rank + 1])]
        groups = []
        with torch.no_grad():
            for row in mine:
                logps_CV = self.policy(int(row.id))
                ids_GC = torch.distributions.Categorical(logits=logps_CV).sample((GROUP,))
                logps_GC = logps_CV.expand(GROUP, -1, -1).gather(-1, ids_GC.unsqueeze(-1)).squeeze(-1)
                rollouts = tuple(Rollout(tuple(ids), tuple(logps), str(ids), "length")
                                 for ids, logps in zip(ids_GC.tolist(), logps_GC.tolist(), strict=True))  # fmt: skip
                groups.append(Group(self.prompt_of(row.id), rollouts))
        scores = [[sum(i % 2 for i in r.completion_ids) / LENGTH for r in g.rollouts] for g in groups]
        rewards_PG = np.array(scores, dtype=float).reshape(len(groups), GROUP)
        return groups, RewardTable(("odd",), np.ones(1), rewards_PG[..., None], rewards_PG)

    def update(self, batch: Batch, part: int) -> None:
        chosen = share(list(range(len(batch.groups))), part, self.options.train.steps_per_generation)
        normalizer = Normalizer.from_lengths([LENGTH] * GROUP * sum(self.ranks.gathered(len(chosen))))
        total = sum(p.sum() for p in self.policy.parameters() if p.requires_grad) * 0.0
        for p in chosen:
            group = batch.groups[p]
            logps_CV = self.policy(int(group.prompt.example.id))
            ids_GC = torch.tensor([r.completion_ids for r in group.rollouts])
            logps_GC = logps_CV.expand(GROUP, -1, -1).gather(-1, ids_GC.unsqueeze(-1)).squeeze(-1)
            share_, _ = policy_loss(
                logps_GC, batch.old_logps[p], torch.from_numpy(batch.advantages.advantages_PG[p]).float(),
                torch.ones_like(logps_GC), self.options.loss, normalizer=normalizer, max_completion_length=LENGTH,
            )  # fmt: skip
            total = total + share_
        self.optimizer.zero_grad()
        total.backward()
        for parameter in self.policy.parameters():
            if parameter.grad is not None and self.ranks.world > 1:
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        values = {"loss": sum(self.ranks.gathered(total.item())), "grad_norm": norm.item(),
                  "reward": sum(self.ranks.gathered(float(batch.table.rewards_PG.sum())))}  # fmt: skip
        self.totals = {name: self.totals.get(name, 0.0) + value for name, value in values.items()}


def options_of(arguments: argparse.Namespace) -> Options:
    options = Options()
    options.train.output = str(arguments.output)
    options.train.max_steps = arguments.steps
    options.train.prompts_per_step = 4
    options.train.num_iterations = arguments.num_iterations
    options.train.steps_per_generation = arguments.steps_per_generation
    options.train.dynamic_sampling = 1
    options.train.checkpoint_every = arguments.checkpoint_every
    options.train.checkpoint_minutes = arguments.checkpoint_minutes
    options.train.resume = arguments.resume
    return options


def rows() -> list[Example]:
    return [Example(str(i), (), f"question {i}") for i in range(ROWS)]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--resume")
    parser.add_argument("--num-iterations", type=int, default=1)
    parser.add_argument("--steps-per-generation", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=1)
    parser.add_argument("--checkpoint-minutes", type=float, default=0.0)
    parser.add_argument("--update-seconds", type=float, default=0.0, help="make every step last at least so long")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    options = options_of(arguments)
    trainer = ToyTrainer(options, rows())
    if arguments.update_seconds:
        original = trainer.update

        def slow(batch: Batch, part: int) -> None:
            time.sleep(arguments.update_seconds)
            original(batch, part)

        trainer.update = slow
    with StopSignals() as stop:
        saver = Saver(options, arguments.output, stop)
        run = Run(arguments.output, active=trainer.ranks.main)
        for line in saver.resume(trainer, arguments.resume):
            print(json.dumps(line), file=sys.stderr)
        trainer.run(saver, run)


if __name__ == "__main__":
    exit_after(main)
