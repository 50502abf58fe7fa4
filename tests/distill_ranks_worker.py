"""Two gloo ranks, started by test_pretrain_distill.py: distillation after DDP's backward pass, against one process.

    python -m torch.distributed.run ... distill_ranks_worker.py TEACHER DATA

Prints one line of JSON from rank 0: largest differences by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import policy_cases as cases

from covo_rl.supervised.pretrain.distill import Distiller, DistillOptions
from covo_rl.train.ranks import Ranks
from covo_rl.train.shutdown import exit_after


class NextIds(nn.Module):
    """A loss of packed rows, in the place of the trainer's."""

    def __init__(self, family) -> None:
        super().__init__()
        self.family, self.model = family, family.model

    def forward(self, ids_NT: torch.Tensor) -> torch.Tensor:
        embeds = self.family.embed_tokens(ids_NT)
        logits = self.family.lm_head(self.family.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten())


def frozen(seed: int = 0):
    family = cases.family(seed=seed, sizes={"audio_codes": 40})
    for part in ("encoder", "audio_adapter"):
        family.model.get_submodule(family.parts[part].rstrip(".")).requires_grad_(False)
    return family


def run(prompts: int, bucket_view: bool) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher, data = sys.argv[1:]
    options = DistillOptions(teacher, data, prompts_per_update=prompts, max_new_tokens=6, batch_size=1,
                             teacher_dtype="float32")  # fmt: skip
    alone, shared = frozen(), frozen()
    ids_NT = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(1))
    module = DistributedDataParallel(NextIds(shared), gradient_as_bucket_view=bucket_view)
    ours = Distiller(options, shared)
    theirs = Distiller(options, alone, ranks=Ranks())
    assert ours.ranks == Ranks(rank, world)
    worst, kl = 0.0, 0.0
    optimizers = [torch.optim.SGD(family.model.parameters(), lr=0.5) for family in (alone, shared)]
    for step in range(3):
        NextIds(alone)(ids_NT).backward()
        wanted = theirs.backward(step)
        module(ids_NT[rank::world]).backward()
        found = ours.backward(step)
        kl = max(kl, *(abs(found[name] - wanted[name]) for name in wanted if name != "distill_s"))
        pairs = zip(shared.model.parameters(), alone.model.parameters(), strict=True)
        for one, other in pairs:
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                worst = max(worst, float((one.grad - other.grad).abs().max()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    gathered: list = [None] * world
    dist.all_gather_object(gathered, (worst, kl))
    return {"gradients": max(g[0] for g in gathered), "metrics": max(g[1] for g in gathered)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        f"{prompts} prompts, bucket view {view}": run(prompts, view) for prompts, view in ((3, False), (1, True))
    }
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    exit_after(main)
