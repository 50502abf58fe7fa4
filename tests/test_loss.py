"""The objectives: arithmetic by hand, exact shares over micro-batches, and what may never reach the loss."""

import math

import pytest
import torch

from covo_rl.algo.loss import LOSSES, kl_divergence, mask_truncated, policy_loss
from covo_rl.algo.metrics import summarise
from covo_rl.algo.normalizer import Normalizer, entropy_threshold
from covo_rl.config import LOSS_TYPES, LossConfig, Options, option_problems

LN2 = math.log(2)
# two completions of 1 and 3 tokens; ratios 2 | 1, 0.5, 1; advantages +1 and -1
LOGPS_NC = torch.tensor([[LN2 - 3, 0.0, 0.0], [-1.0, -LN2 - 1, -1.0]])
OLD_NC = torch.tensor([[-3.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
MASK_NC = torch.tensor([[1, 0, 0], [1, 1, 1]])
ADVANTAGES_N = torch.tensor([1.0, -1.0])


def counted(*masks):
    """The normaliser of a step that holds these micro-batches."""
    return Normalizer.from_lengths([int(row.sum()) for mask_NC in masks for row in mask_NC])


def config(loss_type="dapo", **options):
    return LossConfig(loss_type=loss_type, **options)


def loss_of(settings, logps_NC=LOGPS_NC, normalizer=None, mask_NC=MASK_NC, **tensors):
    normalizer = normalizer or counted(mask_NC)
    return policy_loss(logps_NC, OLD_NC, ADVANTAGES_N, mask_NC, settings, normalizer=normalizer,
                       max_completion_length=5, **tensors)  # fmt: skip


# Clipped at 0.8 .. 1.2, the tokens' losses are -1.2 (ratio 2, kept back at 1.2) | 1, 0.8 (ratio 0.5 held at 0.8), 1.
@pytest.mark.parametrize(
    ("loss_type", "value"),
    [
        ("grpo", (-1.2 + 2.8 / 3) / 2),
        ("bnpo", (-1.2 + 2.8) / 4),
        ("dapo", (-1.2 + 2.8) / 4),
        ("dr_grpo", (-1.2 + 2.8) / (2 * 5)),
    ],
)
def test_normalisation_by_hand(loss_type, value):
    assert loss_of(config(loss_type))[0].item() == pytest.approx(value, abs=1e-6)


def test_clip_ratios_are_counted_by_hand():
    metrics = summarise([loss_of(config())[1]])
    # one token of four is clipped on each side: ratio 2 with a positive, ratio 0.5 with a negative advantage
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/low_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5
    assert metrics["clip_ratio/high_max"] == 1.0 and metrics["clip_ratio/low_min"] == 0.0
    assert metrics["ratio/mean"] == pytest.approx(4.5 / 4) and metrics["ratio/max"] == pytest.approx(2)


def test_sequence_level_uses_the_geometric_mean_ratio():
    # second sequence: (1 * 0.5 * 1) ** (1/3) = 0.7937, held at 0.8; first: 2, kept back at 1.2
    value, report = loss_of(config("grpo", importance_sampling_level="sequence"))
    assert value.item() == pytest.approx((-1.2 + 0.8) / 2, abs=1e-6)
    assert summarise([report])["clip_ratio/region_mean"] == 1.0
    # luspo: each sequence counts by its length
    value, _ = loss_of(config("luspo", importance_sampling_level="sequence"))
    assert value.item() == pytest.approx((-1.2 * 1 + 0.8 * 3) / 2, abs=1e-6)


def test_higher_upper_clip_and_two_sided_delta():
    # epsilon_high 0.5 lets the first ratio reach 1.5: -1.5 + 2.8
    assert loss_of(config(epsilon_high=0.5))[0].item() == pytest.approx(1.3 / 4, abs=1e-6)
    # a negative advantage with ratio 2 costs 2 without delta, 1.5 with it
    flipped = {"normalizer": counted(MASK_NC), "max_completion_length": 5}
    without, _ = policy_loss(LOGPS_NC, OLD_NC, -ADVANTAGES_N, MASK_NC, config(), **flipped)
    bounded, _ = policy_loss(LOGPS_NC, OLD_NC, -ADVANTAGES_N, MASK_NC, config(delta=1.5), **flipped)
    assert (without - bounded).item() == pytest.approx(0.5 / 4, abs=1e-6)


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    logps_NC = LOGPS_NC.clone().requires_grad_()
    value, report = loss_of(config("cispo", epsilon_high=1.5), logps_NC)
    value.backward()
    # -weight * advantage / 4 tokens, weights min(ratio, 1.5) = 1.5 | 1, 0.5, 1
    expected = torch.tensor([[-1.5, 0, 0], [1, 0.5, 1]]) / 4
    torch.testing.assert_close(logps_NC.grad, expected)
    assert summarise([report])["cispo_clip_ratio"] == 0.25


def test_clipped_tokens_have_no_gradient():
    logps_NC = LOGPS_NC.clone().requires_grad_()
    loss_of(config(), logps_NC)[0].backward()
    torch.testing.assert_close(logps_NC.grad, torch.tensor([[0.0, 0, 0], [0.25, 0, 0.25]]))


def test_sapo_at_ratio_one_has_the_gradient_of_the_policy_gradient():
    # d/dratio of 4/t * sigmoid(t * (ratio - 1)) is 1 at ratio 1, for every temperature
    logps_NC = OLD_NC.clone().requires_grad_()
    loss_of(config("sapo"), logps_NC)[0].backward()
    torch.testing.assert_close(logps_NC.grad, torch.tensor([[-0.5, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))


def test_vespo_weight_is_one_at_ratio_one_and_by_hand_at_two():
    logps_NC = LOGPS_NC.clone().requires_grad_()
    loss_of(config("vespo"), logps_NC)[0].backward()
    # phi(w) = e^lambda w^k e^(-lambda w): w = 2, k = 2, lambda = 3 for the first; w = 0.5, 3, 2 for the second
    first, second = 4 * math.exp(-3), 0.125 * math.e
    expected = torch.tensor([[-first, 0, 0], [second, second, second]]) / 4
    torch.testing.assert_close(logps_NC.grad, expected)


def test_without_old_log_probs_the_ratio_is_one():
    logps_NC = OLD_NC.clone().requires_grad_()
    value, report = policy_loss(
        logps_NC, None, ADVANTAGES_N, MASK_NC, config(), normalizer=counted(MASK_NC), max_completion_length=5
    )
    value.backward()
    torch.testing.assert_close(logps_NC.grad, torch.tensor([[-1.0, 0, 0], [1, 1, 1]]) / 4)
    assert summarise([report])["ratio/max"] == 1.0


@pytest.mark.parametrize(("estimator", "value"), [("k1", LN2), ("k2", LN2**2 / 2), ("k3", 0.5 + LN2 - 1)])
def test_kl_estimators_by_hand(estimator, value):
    # the policy finds the token twice as likely as the reference does: d = -ln 2
    assert kl_divergence(torch.tensor(-1.0), torch.tensor(-1.0 - LN2), estimator).item() == pytest.approx(value)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_bias_corrected_kl_has_the_gradient_of_the_true_kl(estimator):
    """Summed over all tokens with their probabilities, the estimators' gradients are the gradient of the KL itself."""
    logits_V, ref_V = torch.tensor([0.3, -0.2, 0.9], requires_grad=True), torch.tensor([0.1, 0.2, 0.3]).log()
    logps_V = logits_V.log_softmax(-1)
    (true_gradient,) = torch.autograd.grad((logps_V.exp() * (logps_V - ref_V)).sum(), logits_V, retain_graph=True)
    settings = config(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=True)
    # a micro-batch with one row per token of the vocabulary, weighted by its probability through the gradient
    value = torch.zeros(())
    for token, probability in enumerate(logps_V.exp().tolist()):
        share, _ = policy_loss(
            logps_V[token].reshape(1, 1), None, torch.zeros(1), torch.ones(1, 1), settings,
            normalizer=Normalizer(1, 1, 1), max_completion_length=1, ref_logps_NC=ref_V[token].reshape(1, 1),
        )  # fmt: skip
        value = value + probability * share
    (gradient,) = torch.autograd.grad(value, logits_V)
    torch.testing.assert_close(gradient, true_gradient)


def random_batch(rows=7, width=6):
    generator = torch.Generator().manual_seed(3)
    logps_NC = -torch.rand(rows, width, generator=generator)
    lengths = torch.tensor([6, 1, 3, 0, 5, 2, 6])
    tensors = {
        "old_logps_NC": logps_NC + 0.4 * torch.randn(rows, width, generator=generator),
        "advantages_N": torch.randn(rows, generator=generator),
        "mask_NC": torch.arange(width) < lengths[:, None],
        "ref_logps_NC": logps_NC + 0.2 * torch.randn(rows, width, generator=generator),
        "sampler_logps_NC": logps_NC + 0.2 * torch.randn(rows, width, generator=generator),
    }
    return logps_NC, tensors, torch.rand(rows, width, generator=generator)


def full_config(loss_type, **options):
    level = "sequence" if loss_type == "luspo" else "token"
    high = 2.0 if loss_type == "cispo" else None
    return config(loss_type, beta=0.1, entropy_coef=0.01, epsilon_high=high, importance_sampling_level=level, **options)


@pytest.mark.parametrize("quantile", [1.0, 0.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_shares_of_micro_batches_and_ranks_sum_to_the_whole(loss_type, quantile):
    """Two ranks of two micro-batches each, cut anywhere, give the loss, gradient and metrics of one batch."""
    settings = full_config(loss_type, top_entropy_quantile=quantile, sampler_correction=True)
    logps_NC, tensors, entropy_NC = random_batch()
    threshold = entropy_threshold([entropy_NC], [tensors["mask_NC"]], quantile)

    def run(ranks):
        leaf_NC = logps_NC.clone().requires_grad_()
        masks = [[tensors["mask_NC"][part] for part in parts] for parts in ranks]
        counts = [counted(*some) for some in masks]
        totals = [sum(getattr(c, name) for c in counts) for name in ("sequences", "tokens", "window_tokens")]
        normalizer = Normalizer(*totals, len(ranks), *threshold)
        reports, total = [], torch.zeros(())
        for part in (part for parts in ranks for part in parts):
            rows = {name: value[part] for name, value in tensors.items()}
            share, report = policy_loss(leaf_NC[part], entropy_NC=entropy_NC[part], config=settings,
                                        normalizer=normalizer, max_completion_length=9, **rows)  # fmt: skip
            total = total + share
            reports.append(report)
        total.backward()
        return total.item(), leaf_NC.grad, summarise(reports)

    whole, whole_gradient, whole_metrics = run([[slice(0, 7)]])
    split, split_gradient, split_metrics = run([[slice(0, 1), slice(1, 4)], [slice(4, 6), slice(6, 7)]])
    assert split == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(split_gradient, whole_gradient, atol=1e-6, rtol=1e-5)
    assert split_metrics == pytest.approx(whole_metrics, abs=1e-6)


def test_ranks_reduce_counts_and_metrics():
    """reduce_sum and reduce_max are called once with everything, so two ranks need two small collectives."""
    calls = []

    def doubled(values):
        calls.append(len(values))
        return values * 2

    def largest(values):
        calls.append(len(values))
        return values

    normalizer = Normalizer.from_lengths([1, 3, 1, 3], world_size=2)
    assert (normalizer.sequences, normalizer.tokens, normalizer.world_size) == (4, 8, 2)
    metrics = summarise([loss_of(config(), normalizer=normalizer)[1]], reduce_sum=doubled, reduce_max=largest)
    assert metrics["ratio/mean"] == pytest.approx(4.5 / 4)
    assert len(calls) == 2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_idle_rank_adds_nothing_but_keeps_the_graph(loss_type):
    logps_NC, tensors, entropy_NC = random_batch()
    leaf_NC = logps_NC.clone().requires_grad_()
    tensors["mask_NC"] = torch.zeros_like(tensors["mask_NC"])
    value, report = policy_loss(leaf_NC, entropy_NC=entropy_NC, config=full_config(loss_type), **tensors,
                                normalizer=Normalizer(8, 20, 20), max_completion_length=9)  # fmt: skip
    value.backward()
    assert value.item() == 0 and leaf_NC.grad is not None and not leaf_NC.grad.any()
    assert not any(summarise([report]).values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_can_hold_anything(loss_type, garbage):
    def run(filler):
        logps_NC, tensors, entropy_NC = random_batch()
        kept = tensors["mask_NC"]
        tensors = {k: torch.where(kept, v, filler) if v.ndim == 2 and k != "mask_NC" else v for k, v in tensors.items()}
        leaf_NC = torch.where(kept, logps_NC, filler).requires_grad_()
        value, report = policy_loss(leaf_NC, entropy_NC=torch.where(kept, entropy_NC, filler), **tensors,
                                    config=full_config(loss_type, sampler_correction=True),
                                    normalizer=counted(kept), max_completion_length=9)  # fmt: skip
        value.backward()
        return value.item(), leaf_NC.grad, summarise([report])

    clean, dirty = run(0.0), run(garbage)
    assert dirty[0] == clean[0] and dirty[2] == clean[2]
    assert torch.equal(dirty[1], clean[1])


def test_truncated_importance_sampling_by_hand():
    # pi_old / pi_sampler: 4 (capped at 2) | 1, 0.5, 1; times the tokens' losses -1.2 | 1, 0.8, 1
    sampler_NC = OLD_NC - torch.tensor([[2 * LN2, 9, 9], [0, -LN2, 0]])
    value, report = loss_of(config(sampler_correction=True, sampler_correction_cap=2.0), sampler_logps_NC=sampler_NC)
    assert value.item() == pytest.approx((-2.4 + 1 + 0.4 + 1) / 4, abs=1e-6)
    metrics = summarise([report])
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(2)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(0.5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(2 * LN2)
    sampler_NC[1, 1] = math.nan  # a token that the engine did not score is not corrected
    value, _ = loss_of(config(sampler_correction=True), sampler_logps_NC=sampler_NC)
    assert value.item() == pytest.approx((-2.4 + 1 + 0.8 + 1) / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mask", (0 + 1 + 0.4 + 1) / 4),
        ("sequence_truncate", (-2.4 + 0.5 * (1 + 0.8 + 1)) / 4),  # the second sequence's ratio is 1 * 0.5 * 1
        ("sequence_mask", (0 + 0.5 * (1 + 0.8 + 1)) / 4),
    ],
)
def test_other_corrections_of_the_sampler_by_hand(mode, expected):
    sampler_NC = OLD_NC - torch.tensor([[2 * LN2, 9, 9], [0, -LN2, 0]])
    settings = config(sampler_correction=True, sampler_correction_cap=2.0, sampler_correction_mode=mode)
    assert loss_of(settings, sampler_logps_NC=sampler_NC)[0].item() == pytest.approx(expected, abs=1e-6)


def test_top_entropy_masking_keeps_the_upper_share():
    # entropies 1 | 2, 3, 4; the upper half starts at the median 2.5: two tokens, losses 0.8 and 1, still over 4 tokens
    entropy_NC = torch.tensor([[1.0, 9, 9], [2, 3, 4]])
    assert entropy_threshold([entropy_NC], [MASK_NC], 0.5) == (2.5, 2.0)
    value, _ = loss_of(config(top_entropy_quantile=0.5), entropy_NC=entropy_NC)
    assert value.item() == pytest.approx(1.8 / 4, abs=1e-6)


def test_entropy_bonus_is_the_mean_over_tokens():
    entropy_NC = torch.tensor([[1.0, 9, 9], [2, 3, 4]])
    with_bonus, report = loss_of(config(entropy_coef=0.1), entropy_NC=entropy_NC)
    assert (loss_of(config())[0] - with_bonus).item() == pytest.approx(0.1 * 2.5, abs=1e-6)
    assert summarise([report])["entropy"] == 2.5


def test_completions_cut_by_length_leave_the_loss():
    mask_NC = mask_truncated(MASK_NC, torch.tensor([False, True]))
    assert mask_NC.tolist() == [[True, False, False], [False, False, False]]
    assert loss_of(config("dapo"), mask_NC=mask_NC)[0].item() == pytest.approx(-1.2, abs=1e-6)
    # as in TRL, sequences still count in grpo: -1.2 / 2
    assert loss_of(config("grpo"), mask_NC=mask_NC)[0].item() == pytest.approx(-0.6, abs=1e-6)


def test_half_precision_log_probs_are_scored_in_float32():
    value, _ = loss_of(config(), LOGPS_NC.bfloat16())
    assert value.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "gspo"}, "importance_sampling_level: sequence"),
        ({"loss_type": "cispo"}, "epsilon_high: 5.0"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high: 5.0"),
        ({"loss_type": "luspo"}, "importance_sampling_level: sequence"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta has no meaning with loss_type sapo"),
        ({"delta": 1.1}, "above 1 + epsilon_high = 1.2"),
        ({"kl_estimator": "k4"}, "choose k1, k2 or k3"),
        ({"importance_sampling_level": "word"}, "choose token or sequence"),
        ({"component_advantages": True, "scale_rewards": "batch"}, "no effect"),
        ({"beta": -0.1}, "must not be negative"),
        ({"epsilon": 1.5}, "must be in [0, 1)"),
        ({"top_entropy_quantile": 0.0}, "(0, 1]"),
        ({"sapo_temperature_neg": 0.0}, "sapo temperatures"),
        ({"sampler_correction_cap": 0.0}, "sampler_correction_cap"),
        ({"overlong_buffer": -1}, "overlong_buffer"),
        ({"scale_rewards": "prompt"}, "choose group, batch or none"),
    ],
)
def test_contradictions_are_named_with_what_to_write(options, words):
    problems = option_problems(Options(loss=LossConfig(**options)))
    assert len(problems) == 1 and words in problems[0]


def test_defaults_and_the_recommended_cispo_are_fine():
    assert option_problems(Options()) == []
    assert option_problems(Options(loss=LossConfig(loss_type="cispo", epsilon_high=5.0))) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.1}, "ref_logps_NC"),
        ({"entropy_coef": 0.1}, "entropy_NC"),
        ({"top_entropy_quantile": 0.5}, "entropy_NC"),
        ({"sampler_correction": True}, "sampler_logps_NC"),
    ],
)
def test_a_tensor_that_the_options_need_is_asked_for(options, words):
    with pytest.raises(ValueError, match=words):
        loss_of(config(**options))


def test_shapes_that_disagree_are_shown():
    with pytest.raises(ValueError, match=r"advantages \(2,\) must be \(N, C\), \(N, C\) and \(N,\)"):
        loss_of(config(), LOGPS_NC[:1])


def test_every_loss_type_of_the_options_has_its_line():
    assert set(LOSSES) == set(LOSS_TYPES)
