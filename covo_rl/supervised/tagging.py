"""Stages of kind `tagging`: encoder and adapter learn to name the facts of a clip from its audio embeddings alone.

Trained from scratch through the decoder's loss, an encoder stays deaf for minutes; a minute of this halves the time of
everything after it. The heads of the task are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from covo_rl.data import DataError
from covo_rl.data.terminal import say
from covo_rl.models.base import AudioFamily
from covo_rl.policy.patterns import part_of
from covo_rl.policy.trainable import adamw
from covo_rl.supervised.checks import fact_problems, trained_parts
from covo_rl.supervised.config import Stage, steps_of
from covo_rl.supervised.masks import Masks
from covo_rl.supervised.rows import Row
from covo_rl.train.launch import process_state

BATCH = 32  # clips at a time where facts are only named


class FactHeads(nn.Module):
    """Two linear classifiers per fact: on all slots side by side (zero-padded), and on their mean.

    The first learns fast, because it may look for a fact at its own place; the second makes the encoder put the fact
    where any slot can be read, which is what the decoder has to do later.
    """

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        super().__init__()
        self.slots = max(row.slots[0] for row in rows)
        self.values: dict[str, list[Any]] = {}
        for row in rows:  # rows may know different values of a fact
            for name, values in row.example.columns["fact_lexicon"].items():
                known = self.values.setdefault(name, [])
                known += [value for value in values or () if value not in known]
        sizes = [len(known) for known in self.values.values()]
        self.norm = nn.LayerNorm(width)
        self.placed = nn.ModuleList([nn.Linear(self.slots * width, size) for size in sizes])
        self.pooled = nn.ModuleList([nn.Linear(width, size) for size in sizes])

    def forward(self, embeddings: Sequence[Tensor], facts: Sequence[dict[str, str]]) -> tuple[Tensor, Tensor]:
        """Embeddings (S_i, D) per clip -> mean cross entropy over facts and heads, facts named right by (2,) heads."""
        flat, mean = self._inputs(embeddings)
        losses, right = [], torch.zeros(2, dtype=torch.long)
        heads = zip(self.values.items(), self.placed, self.pooled, strict=True)
        for (name, values), placed, pooled in heads:
            named = [i for i, fact in enumerate(facts) if name in fact]
            if not named:
                continue
            targets = torch.tensor([values.index(facts[i][name]) for i in named], device=flat.device)
            for which, logits in enumerate((placed(flat[named]), pooled(mean[named]))):
                losses.append(functional.cross_entropy(logits, targets, reduction="sum"))
                right[which] += (logits.argmax(1) == targets).sum().cpu()
        return torch.stack(losses).sum() / (2 * sum(len(fact) for fact in facts)), right

    def named(self, embeddings: Sequence[Tensor]) -> dict[str, tuple[list[Any], list[Any]]]:
        """Fact -> the values that each of the two heads names, one per clip."""
        inputs = self._inputs(embeddings)
        result = {}
        for (name, values), *pair in zip(self.values.items(), self.placed, self.pooled, strict=True):
            result[name] = tuple(
                [values[i] for i in head(x).argmax(1).tolist()] for head, x in zip(pair, inputs, strict=True)
            )
        return result

    def _inputs(self, embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Slots side by side (N, S * D), zero-padded or cut to those of training, and their mean (N, D)."""
        normed = [self.norm(e) for e in embeddings]
        flat = [functional.pad(e, (0, 0, 0, self.slots - len(e))).flatten() for e in normed]
        return torch.stack(flat), torch.stack([e.mean(0) for e in normed])


def train_tagging(
    family: AudioFamily, rows: Sequence[Row], stage: Stage, seed: int, held_out: Sequence[Row] = ()
) -> list[dict]:
    """Train encoder and adapter in place on rows with `facts` and `fact_lexicon`; returns loss and accuracy by step.

    The last entry also has `held_out`, what the heads make of those rows, where there are any.

    Raises:
        DataError: rows lack facts, have values outside their lexicon, or not exactly one clip; all are named.
    """
    if problems := fact_problems([row.example for row in rows]):
        raise DataError("tagging", problems)
    device: Any = process_state().device  # where `fine_tune` works too; the loader leaves the model on the CPU
    family.model.to(device)
    generator, masks = torch.Generator().manual_seed(seed), Masks(stage, seed)
    heads = FactHeads(rows, family.embed_tokens.weight.shape[1]).to(device)
    parts = trained_parts(family, stage)
    parameters = [p for name, p in family.model.named_parameters() if part_of(name, family) in parts]
    parameters += heads.parameters()
    steps = steps_of(stage, len(rows))
    optimizer = adamw(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.learning_rate, total_steps=steps, pct_start=min(max(stage.warmup_steps / steps, 0.01), 0.5)
    )
    log, count, right, order = [], 0, torch.zeros(2), torch.empty(0, dtype=torch.long)
    family.model.train()
    for step in range(1, steps + 1):
        while len(order) < stage.batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = [rows[int(i)] for i in order[: stage.batch_size]], order[stage.batch_size :]
        facts = [dict(row.example.columns["facts"]) for row in batch]
        loss, correct = heads(family.encode([masks(row.clips[0]) for row in batch]), facts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        schedule.step()
        count, right = count + sum(map(len, facts)), right + correct
        if process_state().is_main_process and step in (1, 10):
            say(f"tagging: {step}/{steps}  loss {float(loss.detach()):.3f}")
        if step % 50 == 0 or step == steps:
            placed, pooled = (right / count).tolist()
            log.append({"step": step, "loss": float(loss.detach()), "fact_accuracy": placed, "pooled_accuracy": pooled})
            named = f"facts named {placed:.1%}, from the mean alone {pooled:.1%}"
            say(f"tagging: {step}/{steps}  loss {log[-1]['loss']:.3f}  {named}")
            count, right = 0, torch.zeros(2)
    if held_out and process_state().is_main_process:
        family.model.eval()
        log[-1]["held_out"] = facts_named(family, heads, held_out)
    return log


@torch.no_grad()
def facts_named(family: AudioFamily, heads: FactHeads, rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of the facts of `rows` that each head names, over all and, by the better head, for each fact.

    A value that no training row could have is a fact not named.
    """
    counts = {name: [0, 0, 0] for name in heads.values}  # rows, right by place, right by mean
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        named = heads.named(family.encode([row.clips[0] for row in batch]))
        for i, row in enumerate(batch):
            for name, value in row.example.columns["facts"].items():
                if name in named:
                    counts[name][0] += 1
                    for which in range(2):
                        counts[name][1 + which] += named[name][which][i] == value
    present = {name: count for name, count in counts.items() if count[0]}
    total, placed, pooled = (sum(count[k] for count in present.values()) for k in range(3))
    shares = {name: round(max(count[1:]) / count[0], 4) for name, count in present.items()}
    result: dict[str, Any] = {"rows": len(rows), "by_fact": shares}
    if total:
        result |= {"fact_accuracy": round(placed / total, 4), "pooled_accuracy": round(pooled / total, 4)}
    return result
