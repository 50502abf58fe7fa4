"""Two gloo ranks, started by test_policy_ranks.py: DDP and FSDP2 against the same work in one process.

Every rank takes half of the groups. Prints one line of JSON from rank 0: largest differences by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import policy_cases as cases

from covo_rl.config import RolloutConfig
from covo_rl.engines.own import sample
from covo_rl.train.shutdown import exit_after

CONFIG = RolloutConfig(num_generations=3, max_completion_length=16)
# rank 0 has audio in both rows, rank 1 a text-only row and one that shares a clip with nobody
SECONDS = ((0.6,), (0.9, 0.3), (), (0.4,))
TRAIN_ALL = {"train_parts": ["encoder", "audio_adapter", "llm", "lm_head"]}
CASES: dict[str, tuple[str, dict]] = {
    "ddp, qwen2-audio, lora": ("ddp", {"name": "qwen2_audio", "lora": True}),
    "fsdp2, qwen2-audio, full": ("fsdp2", {"name": "qwen2_audio", "lora": False, "gradient_checkpointing": True}),
    "ddp, gemma 4, lora": ("ddp", {"name": "gemma4", "lora": True}),
    "fsdp2, gemma 4, full": ("fsdp2", {"name": "gemma4", "lora": False, "gradient_checkpointing": True}),
    "fsdp2, qwen3-omni-moe, lora": ("fsdp2", {"name": "qwen3_omni_moe", "lora": True}),
    "ddp, lora": ("ddp", {"lora": True}),
    "ddp, full with encoder": ("ddp", {"lora": False, "adapter": TRAIN_ALL}),
    "fsdp2, lora, checkpointing": ("fsdp2", {"lora": True, "gradient_checkpointing": True}),
    "fsdp2, full with encoder": ("fsdp2", {"lora": False, "adapter": TRAIN_ALL}),
}


def end_bias(made) -> None:
    """Rows, and so ranks, finish at different steps."""
    head = made.family.model.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[made.family.eos_token_ids[0]] = 4.0
    head.register_forward_hook(lambda module, args, out: out + bias)


def shard(made) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [m for m in made.family.model.modules() if type(m).__name__ in made._no_split_modules]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)


def gradients(made) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in made.model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
    made.zero_grad(set_to_none=True)
    return found


def tokens(groups) -> list[tuple[int, ...]]:
    return [r.completion_ids for g in groups for r in g.rollouts]


def step(module, made, groups, weight) -> torch.Tensor:
    made.train()
    scored = module("logps", groups, made.features([g.prompt for g in groups]))
    part = weight[:, : scored.logps_NC.shape[1]]
    (scored.logps_NC * part).sum().mul(dist.get_world_size()).backward()
    return scored.logps_NC.detach()


def run(how: str, kwargs: dict) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, made = cases.policy(**kwargs), cases.policy(**kwargs)
    prompts = cases.prompts(alone, seconds=SECONDS)
    cases.prompts(made, seconds=SECONDS)  # names the clips in its store
    mine = slice(rank * len(prompts) // world, (rank + 1) * len(prompts) // world)
    if how == "ddp":
        module = DistributedDataParallel(made)
    else:
        shard(made)
        module = made
    for one in (alone, made):
        end_bias(one)
    groups = sample(alone, prompts, alone.features(prompts), CONFIG, seed=5)
    ours = sample(module, prompts[mine], made.features(prompts[mine]), CONFIG, seed=5)
    same = tokens(ours) == tokens(groups[mine])
    weight = cases.weights(groups)
    rows = slice(mine.start * 3, mine.stop * 3)
    scored = step(module, made, ours, weight[rows])
    expected = alone("logps", groups, alone.features(prompts)).logps_NC
    (expected * weight).sum().backward()
    theirs = cases.gradients(alone)
    found = gradients(made)
    assert found.keys() == theirs.keys(), sorted(found.keys() ^ theirs.keys())[:5]
    difference = float((scored - expected[rows, : scored.shape[1]].detach()).abs().max())
    reference = 0.0
    if made.has_adapter:
        kwargs = {"reference": True, "temperature": 1.0}
        a = module("logps", ours, made.features(prompts[mine]), **kwargs).logps_NC
        b = alone("logps", groups, alone.features(prompts), **kwargs).logps_NC[rows, : a.shape[1]]
        reference = float((a - b).abs().max())
    gathered: list = [None] * world
    dist.all_gather_object(gathered, (same, difference, reference, cases.relative_difference(found, theirs)))
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    assert len(set(lengths)) > 3, lengths
    return {
        "same_tokens": float(all(g[0] for g in gathered)),
        "logps": max(g[1] for g in gathered),
        "reference": max(g[2] for g in gathered),
        "gradients": max(g[3] for g in gathered),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: run(how, kwargs) for name, (how, kwargs) in CASES.items()}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    exit_after(main)
