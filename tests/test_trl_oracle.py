"""Our numbers against TRL's GRPOTrainer itself: advantages, loss and gradients of every shared variant.

One text-only TRL trainer with a tiny random decoder is built for the whole file; a variant sets the attributes that
TRL's constructor would have set from its own options. The policy has moved away from the sampling policy, so that
ratios leave the clip range on both sides.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from covo_rl.algo.advantage import advantages, overlong_penalty
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.metrics import summarise
from covo_rl.algo.normalizer import Normalizer, entropy_threshold
from covo_rl.config import LOSS_TYPES, LossConfig
from covo_rl.types import RewardTable

P, G, C = 3, 4, 7
SAMPLER_CAP = 1.2


def tiny_tokenizer():
    words = [f"w{i}" for i in range(40)]
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(vocab_size):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@dataclass
class Scores:
    """Rewards that the next generation batch of the trainer gets, (N, 2) with None for not gradeable."""

    rows: list = field(default_factory=lambda: [[0.0, 0.0]] * (P * G))


@dataclass
class Oracle:
    trainer: GRPOTrainer
    scores: Scores
    rows: list

    def generate(self, rows):
        self.scores.rows = rows
        torch.manual_seed(1)
        self.trainer.model.train()
        return self.trainer._generate_and_score_completions(self.rows)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    scores = Scores()
    tokenizer = tiny_tokenizer()
    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=P * G, num_generations=G,
        max_completion_length=C, report_to="none", use_cpu=True, bf16=False, temperature=1.0, disable_dropout=True,
        reward_weights=[1.0, 0.5], gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in ("w1 w2 w3", "w4", "w5 w6")])

    def first(prompts, completions, **columns):
        return [row[0] for row in scores.rows]

    def second(prompts, completions, **columns):
        return [row[1] for row in scores.rows]

    trainer = GRPOTrainer(
        model=tiny_model(len(tokenizer)), reward_funcs=[first, second], args=arguments, train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return Oracle(trainer, scores, [row for row in rows for _ in range(G)])


ROWS = [
    [0.0, 0.2], [1.0, 0.4], [1.0, None], [0.5, 0.9],
    [None, None], [0.3, 0.1], [0.0, 0.6], [0.9, 0.2],
    [0.7, 0.7], [0.7, 0.7], [0.7, 0.7], [0.7, 0.7],
]  # fmt: skip


def reward_table(rows, weights=(1.0, 0.5)):
    rewards_PGR = np.array([[math.nan if r is None else r for r in row] for row in rows]).reshape(P, G, 2)
    rewards_PG = np.where(np.isnan(rewards_PGR).all(-1), math.nan, np.nansum(rewards_PGR * weights, -1))
    return RewardTable(("first", "second"), np.array(weights), rewards_PGR, rewards_PG)


@pytest.mark.parametrize("variant", ["group", "batch", "none", "component"])
def test_advantages_equal_trl(oracle, monkeypatch, variant):
    component = variant == "component"
    scale = "group" if component else variant
    monkeypatch.setattr(oracle.trainer, "scale_rewards", scale)
    aggregation = "normalize_then_sum" if component else "sum_then_normalize"
    monkeypatch.setattr(oracle.trainer, "multi_objective_aggregation", aggregation)
    theirs_N = oracle.generate(ROWS)["advantages"]
    ours = advantages(reward_table(ROWS), LossConfig(scale_rewards=scale, component_advantages=component))
    np.testing.assert_allclose(ours.advantages_PG.flatten(), theirs_N.numpy(), atol=1e-5)
    assert ours.informative_P.tolist() == [True, True, False]
    assert theirs_N.abs().max() > 0.3


def test_overlong_penalty_equals_trl():
    lengths = list(range(0, 110))
    theirs = get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * n for n in lengths])
    np.testing.assert_allclose(overlong_penalty(np.array(lengths), 100, 20), theirs, atol=1e-12)


@pytest.fixture(scope="module")
def batch(oracle):
    """TRL's batch, with old, reference and sampler log-probs at a distance from the policy's."""
    inputs = oracle.generate(ROWS)
    noise = torch.Generator().manual_seed(2)
    logps_NC = logps_and_entropy(oracle.trainer.model, inputs)[0].detach()

    def moved(size):
        return logps_NC + size * torch.randn(logps_NC.shape, generator=noise)

    inputs |= {"old_per_token_logps": moved(0.8), "ref_per_token_logps": moved(0.3)}
    inputs["sampler_logps"] = inputs["old_per_token_logps"] + 0.3 * torch.randn(logps_NC.shape, generator=noise)
    # a completion cut by length, masked as with mask_truncated_completions
    inputs["completion_mask"] = inputs["completion_mask"].clone()
    inputs["completion_mask"][5] = 0
    inputs["completion_mask"][2, 3:] = 0
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def logps_and_entropy(model, inputs):
    """The plain way: full logits, one row per completion."""
    ids_NT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask_NT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    positions_NT = None
    logits_NTV = model(input_ids=ids_NT, attention_mask=mask_NT, position_ids=positions_NT).logits
    width = inputs["completion_ids"].shape[1]
    logits_NCV = logits_NTV[:, -width - 1 : -1].log_softmax(-1)
    logps_NC = logits_NCV.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return logps_NC, -(logits_NCV.exp() * logits_NCV).sum(-1)


def theirs(oracle, inputs, config, monkeypatch):
    trainer, mask_NC = oracle.trainer, inputs["completion_mask"]
    settings = {
        "loss_type": config.loss_type, "beta": config.beta, "epsilon_low": config.epsilon,
        "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
        "importance_sampling_level": config.importance_sampling_level,
        "top_entropy_quantile": config.top_entropy_quantile, "entropy_coef": config.entropy_coef,
        "_entropy_bonus_enabled": config.entropy_coef != 0, "use_vllm": config.sampler_correction,
        "vllm_importance_sampling_correction": config.sampler_correction,
    }  # fmt: skip
    for name, value in settings.items():
        assert hasattr(trainer, name), f"TRL's trainer has no {name}: the oracle would test nothing"
        monkeypatch.setattr(trainer, name, value)
    names = [
        "delta",
        "use_bias_correction_kl",
        *(f"vespo_{x}_{sign}" for x in ("k", "lambda") for sign in ("pos", "neg")),
    ]
    for name in [*names, "sapo_temperature_pos", "sapo_temperature_neg"]:
        monkeypatch.setattr(trainer.args, name, getattr(config, name))
    if config.sampler_correction:
        difference_NC = (inputs["old_per_token_logps"] - inputs["sampler_logps"]) * mask_NC
        mode, cap = config.sampler_correction_mode, config.sampler_correction_cap
        if mode.startswith("sequence"):
            difference_NC = difference_NC.sum(-1, keepdim=True)
        ratio = difference_NC.exp()  # as TRL does while it generates, with `use_vllm`
        ratio = ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
        inputs = inputs | {"importance_sampling_ratio": ratio}
    trainer._metrics["train"].clear()
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss, gradients(trainer.model, loss), metrics


def ours(oracle, inputs, config, micro_batches=1):
    model, mask_NC = oracle.trainer.model, inputs["completion_mask"]
    parts = torch.arange(len(mask_NC)).chunk(micro_batches)
    normalizer = Normalizer.from_lengths([int(n) for part in parts for n in mask_NC[part].sum(1)])
    if config.top_entropy_quantile < 1 and micro_batches > 1:
        entropies_NC = logps_and_entropy(model, inputs)[1]
        normalizer = Normalizer(
            normalizer.sequences, normalizer.tokens, normalizer.window_tokens, 1,
            *entropy_threshold([entropies_NC], [mask_NC], config.top_entropy_quantile),
        )  # fmt: skip
    total, reports = torch.zeros(()), []
    for part in parts:
        rows = {name: value[part] for name, value in inputs.items() if name != "num_items_in_batch"}
        logps_NC, entropy_NC = logps_and_entropy(model, rows)
        loss, report = policy_loss(
            logps_NC, rows["old_per_token_logps"], rows["advantages"], rows["completion_mask"], config,
            normalizer=normalizer, max_completion_length=C, ref_logps_NC=rows["ref_per_token_logps"],
            entropy_NC=entropy_NC, sampler_logps_NC=rows["sampler_logps"],
        )  # fmt: skip
        total = total + loss
        reports.append(report)
    return total, gradients(model, total), summarise(reports)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


HIGH = {"cispo": 1.3}
VARIANTS = [
    *({"loss_type": name} for name in LOSS_TYPES if name != "luspo"),
    *({"loss_type": name, "importance_sampling_level": "sequence"} for name in LOSS_TYPES),
    *({"loss_type": name, "beta": 0.3} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")),
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "beta": 0.3, "importance_sampling_level": "sequence"},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_k_neg": 2.5, "vespo_lambda_pos": 0.5, "vespo_lambda_neg": 0.1},
    {"loss_type": "luspo", "beta": 0.3, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.28},
    {"loss_type": "dapo", "delta": 1.4},
    {"loss_type": "bnpo", "delta": 1.4, "importance_sampling_level": "sequence", "epsilon": 0.05},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    *({"loss_type": name, "top_entropy_quantile": 0.4} for name in ("grpo", "dapo", "sapo")),
    {"loss_type": "luspo", "top_entropy_quantile": 0.4, "beta": 0.1, "importance_sampling_level": "sequence"},
    *({"loss_type": name, "entropy_coef": 0.05} for name in ("grpo", "dr_grpo", "dapo")),
    {"loss_type": "dapo", "entropy_coef": 0.05, "top_entropy_quantile": 0.4, "beta": 0.1},
    *({"loss_type": name, "sampler_correction": True} for name in ("grpo", "dapo", "cispo", "sapo", "vespo")),
    *({"loss_type": name, "sampler_correction": True, "sampler_correction_mode": f"{level}_{above}"}
      for name in ("grpo", "dapo") for level, above in
      (("token", "mask"), ("sequence", "truncate"), ("sequence", "mask"))),
    {"loss_type": "vespo", "sampler_correction": True, "sampler_correction_mode": "token_mask"},
]  # fmt: skip


def config_of(variant):
    options = {"epsilon_high": HIGH.get(variant["loss_type"]), "sampler_correction_cap": SAMPLER_CAP} | variant
    return LossConfig(**options)


@pytest.mark.parametrize("micro_batches", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{x}" for x in v.values()))
def test_loss_and_gradient_equal_trl(oracle, batch, monkeypatch, variant, micro_batches):
    config = config_of(variant)
    their_loss, their_gradient, their_metrics = theirs(oracle, batch, config, monkeypatch)
    our_loss, our_gradient, our_metrics = ours(oracle, batch, config, micro_batches)
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5, rel=1e-5)
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-5, rtol=1e-5)
    shared = set(our_metrics) & set(their_metrics)
    assert {"entropy"} <= shared
    if config.importance_sampling_level == "sequence":  # TRL also counts the sequence without tokens, we do not
        shared = {name for name in shared if "clip" not in name}
    shared -= {"vespo/phi_seq_mean"}  # the same
    for name in shared:
        assert our_metrics[name] == pytest.approx(their_metrics[name], abs=1e-5, rel=1e-4), name
    if config.loss_type in ("grpo", "dapo") and config.importance_sampling_level == "token":
        assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/low_min"} <= shared


def test_the_batch_leaves_the_clip_range_on_both_sides(oracle, batch, monkeypatch):
    metrics = theirs(oracle, batch, LossConfig(loss_type="dapo"), monkeypatch)[2]
    assert metrics["clip_ratio/low_mean"] > 0.02 and metrics["clip_ratio/high_mean"] > 0.02


def test_steps_per_generation_divides_as_trl_does(oracle, batch, monkeypatch):
    """TRL normalises dapo by the generation batch's tokens / steps, not by the tokens of the optimiser step."""
    monkeypatch.setattr(oracle.trainer.args, "steps_per_generation", 2)
    inputs = batch | {"num_items_in_batch": torch.tensor(100)}
    config = LossConfig(loss_type="dapo")
    their_loss = theirs(oracle, inputs, config, monkeypatch)[0]
    mask_NC = batch["completion_mask"]
    logps_NC = logps_and_entropy(oracle.trainer.model, batch)[0]
    normalizer = Normalizer.from_lengths(mask_NC.sum(1).int().tolist(), generation_tokens=100, steps_per_generation=2)
    our_loss, _ = policy_loss(
        logps_NC, batch["old_per_token_logps"], batch["advantages"], mask_NC, config,
        normalizer=normalizer, max_completion_length=C,
    )  # fmt: skip
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
