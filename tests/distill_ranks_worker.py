"""Two gloo ranks, started by test_pretrain_distill.py: distillation under DDP and FSDP2, against one process.

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import policy_cases as cases

from covo_rl.policy import Policy
from covo_rl.supervised.pretrain.distill import Distiller, DistillError, DistillOptions
from covo_rl.train.ranks import Ranks
from covo_rl.train.shutdown import exit_after

CASES = ((3, "ddp"), (1, "ddp, bucket view"), (3, "fsdp2"), (1, "fsdp2"))


def next_ids(policy: Policy, ids_NT: torch.Tensor) -> torch.Tensor:
    """A loss of packed rows, in the place of the trainer's."""
    family = policy.family
    hidden = family.decoder(inputs_embeds=family.embed_tokens(ids_NT), use_cache=False).last_hidden_state
    logits = family.lm_head(hidden)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten())


def sharded(policy: Policy) -> Policy:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [m for m in policy.family.model.modules() if type(m).__name__ in policy._no_split_modules]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def wrapped(policy: Policy, how: str) -> nn.Module:
    if how == "fsdp2":
        return sharded(policy)
    return DistributedDataParallel(policy, gradient_as_bucket_view=how == "ddp, bucket view")


def frozen(seed: int = 0):
    family = cases.family(seed=seed, sizes={"audio_codes": 40})
    for part in ("encoder", "audio_adapter"):
        family.model.get_submodule(family.parts[part].rstrip(".")).requires_grad_(False)
    return family


def run(prompts: int, how: str) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher, data = sys.argv[1:]
    options = DistillOptions(teacher, data, prompts_per_update=prompts, max_new_tokens=6, batch_size=1,
                             teacher_dtype="float32")  # fmt: skip
    alone, shared = frozen(), frozen()
    ids_NT = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(1))
    theirs, ours = Distiller(options, alone, ranks=Ranks()), Distiller(options, shared)
    assert ours.ranks == Ranks(rank, world)
    policy, single = Policy(shared), Policy(alone)
    module = wrapped(policy, how)
    if how == "fsdp2":
        try:
            ours.backward(0)
            raise AssertionError("nobody said which policy is sharded")
        except DistillError as error:
            assert "follow(policy)" in str(error)
        ours.drawn = 0
    ours.follow(policy)
    worst, kl = 0.0, 0.0
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.5) for made in (single, policy)]
    for step in range(3):
        single(next_ids, ids_NT).backward()
        wanted = theirs.backward(step)
        module(next_ids, ids_NT[rank::world]).backward()
        found = ours.backward(step)
        kl = max(kl, *(abs(found[name] - wanted[name]) for name in wanted if name != "distill_s"))
        pairs = zip(policy.model.parameters(), single.model.parameters(), strict=True)
        for one, other in pairs:
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                mine = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
                worst = max(worst, float((mine - other.grad).abs().max()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    measured = [made.measure([made.prompts.at(20 + n) for n in part]) for made, part in
                ((theirs, range(3)), (ours, range(3)[rank::world]))]  # fmt: skip
    kl = max(kl, abs(measured[0] - measured[1]))
    gathered: list = [None] * world
    dist.all_gather_object(gathered, (worst, kl))
    return {"gradients": max(g[0] for g in gathered), "metrics": max(g[1] for g in gathered)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {f"{how}, {prompts} prompts": run(prompts, how) for prompts, how in CASES}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    exit_after(main)
