"""An auxiliary task that opens the ears: name the facts of a clip from its audio embeddings alone.

Trained from scratch through the decoder's loss, an encoder stays deaf for minutes; a minute of direct
classification halves the time of everything after it. The heads are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from covo_rl.coldstart.config import Stage
from covo_rl.coldstart.data import Row
from covo_rl.models.base import AudioFamily


class FactHeads(nn.Module):
    """One linear classifier per fact over all slots of a clip, laid side by side and zero-padded."""

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        super().__init__()
        self.slots = max(row.clips[0].slots for row in rows)
        self.values: dict[str, list[str]] = {}
        for row in rows:
            self.values.update(row.example.columns["fact_lexicon"])
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.slots * width, len(values)) for name, values in self.values.items()}
        )

    def forward(self, embeddings: Sequence[torch.Tensor], facts: Sequence[dict[str, str]]) -> tuple[torch.Tensor, int]:
        """Embeddings (S_i, D) per clip -> (mean cross entropy over all facts, number of facts named right)."""
        padded = [nn.functional.pad(self.norm(e), (0, 0, 0, self.slots - len(e))) for e in embeddings]
        flat = torch.stack(padded).flatten(1)
        losses, right = [], 0
        for name, head in self.heads.items():
            chosen = [i for i, fact in enumerate(facts) if name in fact]
            if not chosen:
                continue
            targets = torch.tensor([self.values[name].index(facts[i][name]) for i in chosen], device=flat.device)
            logits = head(flat[chosen])
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(1) == targets).sum())
        return torch.stack(losses).sum() / sum(len(fact) for fact in facts), right


def run(family: AudioFamily, rows: Sequence[Row], stage: Stage, seed: int) -> list[dict]:
    """Train encoder and adapter in place on rows with `facts` and `fact_lexicon`; returns loss and accuracy by step.

    Raises:
        ValueError: a row lacks the facts, or has not exactly one clip.
    """
    for row in rows:
        if "facts" not in row.example.columns or len(row.clips) != 1:
            raise ValueError(f"{row.example.id}: tagging needs one clip and the columns 'facts' and 'fact_lexicon'")
    generator = torch.Generator().manual_seed(seed)
    heads = FactHeads(rows, family.embed_tokens.weight.shape[1]).to(family.embed_tokens.weight.device)  # type: ignore[arg-type]
    trained = [p for name, p in family.model.named_parameters()
               if name.startswith((family.parts["encoder"], family.parts["audio_adapter"]))]  # fmt: skip
    steps = stage.steps or math.ceil(stage.epochs * len(rows) / stage.batch_size)
    optimizer = torch.optim.AdamW([*trained, *heads.parameters()], stage.learning_rate, weight_decay=stage.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.learning_rate, total_steps=steps, pct_start=min(max(stage.warmup_steps / steps, 0.01), 0.5)
    )
    log, seen, right, order = [], 0, 0, torch.empty(0, dtype=torch.long)
    family.model.train()
    for step in range(1, steps + 1):
        while len(order) < stage.batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = [rows[int(i)] for i in order[: stage.batch_size]], order[stage.batch_size :]
        facts = [dict(row.example.columns["facts"]) for row in batch]
        loss, correct = heads(family.encode([row.clips[0] for row in batch]), facts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, *heads.parameters()], stage.max_grad_norm)
        optimizer.step()
        schedule.step()
        seen, right = seen + sum(map(len, facts)), right + correct
        if step % 50 == 0 or step == steps:
            log.append({"step": step, "loss": float(loss.detach()), "fact_accuracy": right / seen})
            print(log[-1], flush=True)
            seen = right = 0
    return log
