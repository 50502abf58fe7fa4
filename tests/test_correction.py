"""Two ratios kept apart, pi / pi_old and pi_old / pi_engine: against slow float64 sums, in pieces, and in runs."""

import dataclasses
import itertools
import math

import numpy as np
import policy_cases
import pytest
import torch
import train_cases

from covo_rl.algo.correction import mismatch
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.metrics import summarise
from covo_rl.algo.normalizer import Normalizer
from covo_rl.config import Options, corrects_sampler, option_problems
from covo_rl.engines.vllm_arguments import engine_arguments
from covo_rl.records.steps import rollout_rows
from covo_rl.run.result import summary_rows

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LENGTHS = [6, 1, 3, 0, 5, 2]
CAP, EPSILON = 1.2, 0.2


def settings(mode="token_truncate", **changes):
    return dataclasses.replace(Options().loss, loss_type="grpo", sampler_correction=True, sampler_correction_mode=mode,
                               sampler_correction_cap=CAP, epsilon=EPSILON, **changes)  # fmt: skip


def batch(dtype=torch.float32):
    """Log-probs of the policy that trains, of the one before the first update, and of an engine that is off."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda scale: scale * torch.randn(len(LENGTHS), max(LENGTHS), generator=generator)  # noqa: E731
    old_NC = -draw(1.0).abs() - 0.1
    tensors = {"logps_NC": old_NC + draw(0.3), "old_logps_NC": old_NC, "sampler_logps_NC": old_NC + draw(0.2)}
    advantages_N = torch.randn(len(LENGTHS), generator=generator)
    mask_NC = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {name: values.to(dtype) for name, values in tensors.items()}, advantages_N, mask_NC


def reference(mode, tensors, advantages_N):
    """Loss, d loss / d logp and figures, one token after the other in float64."""
    pi, old, engine = (tensors[name].double().numpy() for name in ("logps_NC", "old_logps_NC", "sampler_logps_NC"))
    loss, gradient_NC, differences, ratios = 0.0, np.zeros(pi.shape), [], []
    for n, length in enumerate(LENGTHS):
        apart = [old[n, c] - engine[n, c] for c in range(length)]
        by_token = mode.startswith("token")
        weights = [math.exp(d) for d in apart] if by_token else [math.exp(sum(apart))] * length
        differences += apart
        ratios += weights if by_token else weights[:1]
        for c in range(length):
            weight = weights[c] if weights[c] <= CAP else (CAP if mode.endswith("truncate") else 0.0)
            ratio, advantage = math.exp(pi[n, c] - old[n, c]), float(advantages_N[n])
            held = min(max(ratio, 1 - EPSILON), 1 + EPSILON)
            share = weight / length / len(LENGTHS)
            loss -= min(ratio * advantage, held * advantage) * share
            if ratio * advantage <= held * advantage:
                gradient_NC[n, c] = -ratio * advantage * share
    n, r, d = len(ratios), np.array(ratios), np.array(differences)
    figures = {
        "kl_k1": sum(-x for x in d) / len(d), "kl_k3": sum(math.exp(x) - 1 - x for x in d) / len(d),
        "max_abs": max(map(abs, d)), "share_above_0.1": sum(abs(x) > 0.1 for x in d) / len(d),
        "truncated_share": sum(x > CAP for x in r) / n, "ess": sum(r) ** 2 / (n * sum(x * x for x in r)),
    }  # fmt: skip
    for name, q in {"p01": 0.01, "p50": 0.5, "p99": 0.99, "p999": 0.999}.items():
        place = q * (n - 1)
        low, ordered = int(place), sorted(ratios)
        high = ordered[min(low + 1, n - 1)]
        figures[f"ratio_{name}"] = ordered[low] + (place - low) * (high - ordered[low])
    return loss, gradient_NC, {f"engine/{name}": value for name, value in figures.items()}


def in_pieces(mode, tensors, advantages_N, mask_NC, ranks):
    """The loss, gradient and metrics of micro-batches on ranks that gather."""
    config, leaf_NC = settings(mode), tensors["logps_NC"].clone().requires_grad_()
    normalizer = Normalizer.from_lengths(LENGTHS, world_size=len(ranks))
    shares, reports = [], []
    for micro in ranks:
        made = [
            policy_loss(leaf_NC[rows], tensors["old_logps_NC"][rows], advantages_N[rows], mask_NC[rows], config,
                        normalizer=normalizer, sampler_logps_NC=tensors["sampler_logps_NC"][rows],
                        max_completion_length=9)
            for rows in micro
        ]  # fmt: skip
        shares += [share for share, _ in made]
        reports.append([report for _, report in made])
    torch.stack(shares).sum().backward()
    sent = []
    for report in reports:  # what each rank gives to the others
        mismatch(report, config, lambda value: [sent.append(value), value][1:])
    figures = [mismatch(report, config, lambda value: sent) for report in reports]
    assert all(each == figures[0] for each in figures), "every rank knows the same"
    return (
        torch.stack(shares).sum().item(),
        leaf_NC.grad,
        summarise([part for report in reports for part in report]) | figures[0],
    )


@pytest.mark.parametrize(("mode", "dtype"), list(itertools.product(MODES, [torch.float32, torch.bfloat16])))
def test_loss_gradient_and_figures_are_those_of_slow_arithmetic_however_they_are_cut(mode, dtype):
    tensors, advantages_N, mask_NC = batch(dtype)
    loss, gradient_NC, figures = reference(mode, tensors, advantages_N)
    assert 0 < figures["engine/truncated_share"] < 1, "the cap is felt, and not by all"
    for ranks in ([[slice(0, 6)]], [[slice(0, 1), slice(1, 3)], [slice(3, 4), slice(4, 6)]]):
        ours, gradient, metrics = in_pieces(mode, tensors, advantages_N, mask_NC, ranks)
        assert ours == pytest.approx(loss, abs=1e-6)
        # the gradient of 16-bit log-probs is rounded to 16 bits at the end, and only there
        tolerance = {"rtol": 2**-8, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(gradient.double(), torch.from_numpy(gradient_NC), **tolerance)
        assert {name: metrics[name] for name in figures} == pytest.approx(figures, abs=2e-6)


def test_an_engine_that_is_the_policy_is_at_distance_0_and_its_sample_is_worth_all():
    tensors, advantages_N, mask_NC = batch()
    tensors["sampler_logps_NC"] = tensors["old_logps_NC"]
    _, _, metrics = in_pieces("token_truncate", tensors, advantages_N, mask_NC, [[slice(0, 6)]])
    assert [metrics[f"engine/{name}"] for name in ("kl_k1", "kl_k3", "max_abs", "truncated_share")] == [0] * 4
    assert metrics["engine/ess"] == metrics["engine/ratio_p01"] == metrics["engine/ratio_p999"] == 1


def test_tiny_differences_do_not_drown_in_float32():
    """e^d - 1 - d of 1e-5 nats is 5e-11; with float32's exp it is 0 or 1e-7."""
    tensors, advantages_N, mask_NC = batch()
    tensors["sampler_logps_NC"] = (tensors["old_logps_NC"].double() - 1e-5).float()
    _, _, metrics = in_pieces("token_truncate", tensors, advantages_N, mask_NC, [[slice(0, 6)]])
    assert metrics["engine/kl_k3"] == pytest.approx(5e-11, rel=0.05)


def test_one_token_of_a_far_ratio_costs_most_of_the_sample_and_none_overflows():
    tensors, advantages_N, mask_NC = batch()
    tensors["sampler_logps_NC"] = tensors["old_logps_NC"].clone()
    for far, ess in [(math.log(17), (16 + 17) ** 2 / 17 / (16 + 17**2)), (1000.0, 1 / 17)]:  # of 17 tokens
        tensors["sampler_logps_NC"][0, 0] = tensors["old_logps_NC"][0, 0] - far
        for mode in MODES[:2]:
            loss, _, metrics = in_pieces(mode, tensors, advantages_N, mask_NC, [[slice(0, 6)]])
            assert metrics["engine/ess"] == pytest.approx(ess, abs=1e-5) and math.isfinite(loss)
            assert metrics["engine/max_abs"] == pytest.approx(far) and math.isfinite(metrics["engine/kl_k3"])


def test_nothing_is_said_where_no_token_counts():
    tensors, advantages_N, mask_NC = batch()
    _, _, metrics = in_pieces("sequence_mask", tensors, advantages_N, mask_NC & False, [[slice(0, 6)]])
    assert not [name for name in metrics if name.startswith("engine/")] and mismatch([], settings()) == {}


# -- in the trainer --------------------------------------------------------------------------------------------------


def generated(tmp_path, lag, **changes):
    """A trainer that has taken a step, and groups that were sampled `lag` updates before its policy."""
    made = train_cases.trainer(train_cases.options(tmp_path, max_steps=3, **changes))
    prompts = made.rows.prompts(train_cases.rows()[:3], 0)
    ask = lambda: made.engine.submit(prompts, made.options.rollout, seed=1, generations=3)  # noqa: E731
    older = made.engine.collect(ask())
    made.train_step()
    assert made.learner.applied == made.engine.sync(1).version
    return made, older if lag else made.engine.collect(ask())


@pytest.mark.parametrize("lag", [0, 1])
def test_the_policy_that_is_clipped_against_is_scored_by_us_where_an_older_one_sampled(tmp_path, lag):
    made, groups = generated(tmp_path, lag, sampler_correction=True)
    assert made.engine.exact and made.learner.needs_old_logps
    stored = made.learner.old_logps(groups, exact=True)
    features = made.policy.features([group.prompt for group in groups])
    now_NC = made.policy("old_logps", groups, features, temperature=made.options.rollout.temperature).logps_NC
    sampled = [own_GC for group in groups for own_GC in [torch.tensor(padded(group))]]
    apart = []
    for p, old_GC in enumerate(stored):
        torch.testing.assert_close(old_GC, now_NC[3 * p : 3 * p + 3, : old_GC.shape[1]], atol=1e-5, rtol=0)
        apart.append(float((old_GC[:, : sampled[p].shape[1]] - sampled[p]).abs().max()))
    assert max(apart) > 1e-3 if lag else max(apart) == 0, "a learning rate of 1e-2 moves the policy"


def padded(group):
    width = max(len(r.logps) for r in group.rollouts)
    return [[*r.logps, *[0.0] * (width - len(r.logps))] for r in group.rollouts]


def test_a_step_with_rollouts_of_an_older_policy_weighs_them_and_says_how_old_they_are(tmp_path, monkeypatch):
    """The clipped ratio of the first update is 1 all the same: it is against our own score of the policy as it is."""
    made, older = generated(tmp_path, 1, sampler_correction=True)
    monkeypatch.setattr(made.engine, "collect", lambda pending: older)
    made.options.train.prompts_per_step = len(older)
    metrics, batch = made.train_step()
    assert metrics["engine/lag"] == 1 and batch.version == 1
    rows = rollout_rows(batch.groups, batch.table, batch.advantages, version=batch.version)
    assert {row["lag"] for row in rows} == {1}
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5) and metrics["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert metrics["engine/max_abs"] > 1e-3 and metrics["engine/kl_k3"] > 1e-7 and metrics["engine/ess"] < 1
    largest = max(
        float((old_GC[:, : len(group[0])] - torch.tensor(group)).max())
        for old_GC, group in zip(batch.old_logps, map(padded, batch.groups), strict=True)
    )
    weight = metrics["sampling/importance_sampling_ratio/max"]
    assert weight == pytest.approx(min(math.exp(largest), 2.0), rel=1e-4) and weight > 1.01


def test_one_step_ahead_every_rollout_but_those_of_the_first_step_is_one_update_old_and_weighed(tmp_path):
    train_cases.run(train_cases.options(tmp_path, max_steps=3, rollout_ahead=1), saver=False)
    lines = train_cases.metrics(tmp_path)
    assert [line["engine/lag"] for line in lines] == [0, 1, 1]
    assert lines[0]["engine/max_abs"] < 1e-5 < 1e-3 < min(line["engine/max_abs"] for line in lines[1:])
    assert all("engine/truncated_share" in line and line["ratio/max"] == pytest.approx(1, abs=1e-5) for line in lines)


@pytest.mark.parametrize("full_precision", [True, False])
def test_the_mismatch_of_the_own_engine_is_in_the_metrics(tmp_path, monkeypatch, full_precision):
    """Also where nothing corrects it, and in 16 bits, where it is not nothing."""
    made = train_cases.trainer(train_cases.options(tmp_path, max_steps=1))
    made.policy.to(torch.float32 if full_precision else torch.bfloat16)
    metrics, _ = made.train_step()
    assert made.engine.exact == full_precision and metrics["engine/lag"] == 0
    names = {"kl_k1", "kl_k3", "max_abs", "share_above_0.1", "ratio_p01", "ratio_p50", "ratio_p99", "ratio_p999", "ess"}
    assert {f"engine/{name}" for name in names} <= {*metrics} and "engine/truncated_share" not in metrics
    assert metrics["engine/max_abs"] == pytest.approx(metrics["sampling/sampling_logp_difference/max"])
    if full_precision:
        assert 0 <= metrics["engine/kl_k3"] < 1e-10 and metrics["engine/max_abs"] < 1e-5
    else:
        assert 1e-7 < metrics["engine/kl_k3"] < 0.01 and 1e-4 < metrics["engine/max_abs"] < 0.5


# -- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "use_vllm", "rollout_ahead", "expected"),
    [(None, False, 0, False), (None, True, 0, True), (None, False, 1, True),
     (False, True, 1, False), (True, False, 0, True)],
)  # fmt: skip
def test_correction_is_on_where_another_or_an_older_policy_samples(tmp_path, chosen, use_vllm, rollout_ahead, expected):
    assert corrects_sampler(chosen, use_vllm, rollout_ahead) is expected
    options = train_cases.options(tmp_path, use_vllm=use_vllm, rollout_ahead=rollout_ahead, sampler_correction=chosen)
    table = dict(summary_rows(options, [], {"data": tmp_path}, (1, 1), "covo_audio", "cpu"))
    if use_vllm or rollout_ahead:  # an explicit off is printed
        assert table["sampling"].endswith("token_truncate, cap 2" if expected else "sampler_correction none: it is off")
    else:
        assert "sampling" not in table


def test_vllms_head_computes_in_float32_beside_what_a_user_overrides(tmp_path):
    """Logits in bfloat16 are another policy than ours: 0.03 nats at a logit of 8."""
    family, options = policy_cases.family("qwen2_audio"), Options()
    make = lambda: engine_arguments(options, family, path="x", dtype="bfloat16", max_model_len=64, lora_rank=8)  # noqa: E731
    assert make()["hf_overrides"] == {"head_dtype": "float32", "architectures": ["Qwen2AudioWithLoRA"]}
    options.engine.vllm_options = {"hf_overrides": {"head_dtype": "model"}, "seed_": 1}
    assert make()["hf_overrides"] == {"head_dtype": "model", "architectures": ["Qwen2AudioWithLoRA"]}
    options.engine.use_vllm, options.engine.vllm_options = True, "hf_overrides=x"
    assert any("hf_overrides must be a mapping" in problem for problem in option_problems(options))
