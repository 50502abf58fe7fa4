"""A whole step against TRL's GRPOTrainer that was made to see audio: same loss, same gradients, fewer encoder rows."""

import numpy as np
import policy_cases as cases
import pytest
import torch

from covo_rl.algo.advantage import advantages
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.normalizer import Normalizer
from covo_rl.bench.trl_audio import AudioGRPOTrainer, trl_options
from covo_rl.config import LossConfig
from covo_rl.types import Group, RewardTable, Rollout

G, C = 4, 9


def length_reward(completion_ids, **_):
    return [float(len(ids) + ids[0] % 7) for ids in completion_ids]


def grouped(made, prompts, ids_NC, mask_NC):
    groups = []
    for p, prompt in enumerate(prompts):
        rows = range(p * G, (p + 1) * G)
        ids = [tuple(ids_NC[n][mask_NC[n].bool()].tolist()) for n in rows]
        groups.append(Group(prompt, tuple(Rollout(i, (0.0,) * len(i), "", "stop") for i in ids)))
    return groups


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_a_step_equals_trl_with_audio(name, lora, tmp_path):
    made = cases.policy(name, lora=lora)
    prompts = cases.prompts(made, seconds=((0.6,), (0.9,)))
    trainer = AudioGRPOTrainer(made, prompts, [length_reward], trl_options(tmp_path, 2, G, C, loss_type="grpo"))
    encoded = {"trl": 0}
    encoder = made.family.model.get_submodule(made.family.parts["encoder"].rstrip("."))
    handle = encoder.register_forward_hook(lambda m, a, k, out: encoded.update(trl=encoded["trl"] + rows(a, k)),
                                           with_kwargs=True)  # fmt: skip
    torch.manual_seed(0)
    made.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": p.example.id} for p in prompts for _ in range(G)])
    loss = trainer._compute_loss(made.model, batch)
    loss.backward()
    handle.remove()
    theirs = cases.gradients(made)

    groups = grouped(made, prompts, batch["completion_ids"], batch["completion_mask"])
    scores = length_reward([r.completion_ids for g in groups for r in g.rollouts])
    rewards_PG = np.array(scores).reshape(2, G)
    assert rewards_PG.std(1).min() > 0
    table = RewardTable(("length",), np.ones(1), rewards_PG[..., None], rewards_PG)
    config = LossConfig(loss_type="grpo")
    ours_N = torch.as_tensor(advantages(table, config).advantages_PG, dtype=torch.float32).flatten()
    torch.testing.assert_close(ours_N, batch["advantages"], atol=1e-5, rtol=0)
    made.train()
    scored = made("logps", groups, made.features(prompts))
    mask_NC = scored.mask_NC.float()
    ours, _ = policy_loss(
        scored.logps_NC, None, ours_N, mask_NC, config,
        normalizer=Normalizer.from_lengths(mask_NC.sum(1).int().tolist()), max_completion_length=C,
    )  # fmt: skip
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert cases.relative_difference(cases.gradients(made), theirs) < 1e-4
    assert encoded["trl"] == 2 * 2 * G, "in generate and in the loss, once per rollout"
    assert made.store.encoded_clips == 2, "once per unique clip"


def rows(args, kwargs) -> int:
    """Rows of the first tensor that the encoder was called with."""
    return next(value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
