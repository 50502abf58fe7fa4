"""An auxiliary task that opens the ears: name the facts of a clip from its audio embeddings alone.

Trained from scratch through the decoder's loss, an encoder stays deaf for minutes; a minute of direct
classification halves the time of everything after it. The heads are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from covo_rl.models.base import AudioFamily
from covo_rl.supervised.config import Stage
from covo_rl.supervised.rows import Row


class FactHeads(nn.Module):
    """Two linear classifiers per fact: on all slots side by side (zero-padded), and on their mean.

    The first learns fast, because it may look for a fact at its own place; the second makes the encoder put the fact
    where any slot can be read, which is what the decoder has to do later.
    """

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        super().__init__()
        self.slots = max(row.clips[0].slots for row in rows)
        self.values: dict[str, list[str]] = {}
        for row in rows:
            self.values.update(row.example.columns["fact_lexicon"])
        sizes = {name: len(values) for name, values in self.values.items()}
        self.norm = nn.LayerNorm(width)
        self.placed = nn.ModuleDict({name: nn.Linear(self.slots * width, size) for name, size in sizes.items()})
        self.pooled = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(
        self, embeddings: Sequence[torch.Tensor], facts: Sequence[dict[str, str]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (S_i, D) per clip -> mean cross entropy over facts and heads, facts named right by (2,) heads."""
        normed = [self.norm(e) for e in embeddings]
        flat = torch.stack([nn.functional.pad(e, (0, 0, 0, self.slots - len(e))).flatten() for e in normed])
        mean = torch.stack([e.mean(0) for e in normed])
        losses, right = [], torch.zeros(2, dtype=torch.long)
        for name, values in self.values.items():
            named = [i for i, fact in enumerate(facts) if name in fact]
            if not named:
                continue
            targets = torch.tensor([values.index(facts[i][name]) for i in named], device=flat.device)
            for which, logits in enumerate((self.placed[name](flat[named]), self.pooled[name](mean[named]))):
                losses.append(nn.functional.cross_entropy(logits, targets, reduction="sum"))
                right[which] += (logits.argmax(1) == targets).sum().cpu()
        return torch.stack(losses).sum() / (2 * sum(len(fact) for fact in facts)), right


def train_tagging(family: AudioFamily, rows: Sequence[Row], stage: Stage, seed: int) -> list[dict]:
    """Train encoder and adapter in place on rows with `facts` and `fact_lexicon`; returns loss and accuracy by step.

    Raises:
        ValueError: a row lacks the facts, or has not exactly one clip.
    """
    for row in rows:
        if "facts" not in row.example.columns or len(row.clips) != 1:
            raise ValueError(f"{row.example.id}: tagging needs one clip and the columns 'facts' and 'fact_lexicon'")
    generator = torch.Generator().manual_seed(seed)
    heads = FactHeads(rows, family.embed_tokens.weight.shape[1]).to(family.embed_tokens.weight.device)
    prefixes = (family.parts["encoder"], family.parts["audio_adapter"])
    parameters = [p for name, p in family.model.named_parameters() if name.startswith(prefixes)]
    parameters += heads.parameters()
    steps = stage.steps or math.ceil(stage.epochs * len(rows) / stage.batch_size)
    optimizer = torch.optim.AdamW(parameters, stage.learning_rate, weight_decay=stage.weight_decay)
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
        loss, correct = heads(family.encode([row.clips[0] for row in batch]), facts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        schedule.step()
        count, right = count + sum(map(len, facts)), right + correct
        if step % 50 == 0 or step == steps:
            placed, pooled = (right / count).tolist()
            log.append({"step": step, "loss": float(loss.detach()), "fact_accuracy": placed, "pooled_accuracy": pooled})
            print(log[-1], flush=True)
            count, right = 0, torch.zeros(2)
    return log
