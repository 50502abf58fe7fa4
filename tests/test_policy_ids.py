"""Losses over the text or the audio codes of replies, and replies without codes: against a loop over single tokens."""

from dataclasses import replace

import policy_cases as cases
import pytest
import torch
import train_cases

from covo_rl.config import AdapterConfig, ConfigError, ModelConfig, Options, RolloutConfig, option_problems
from covo_rl.engines import vllm_requests
from covo_rl.engines.decoder import FusedDecoder, decoder_for
from covo_rl.engines.own import sample
from covo_rl.models.tiny import tiny_covo_audio
from covo_rl.policy.loading import answering_policy
from covo_rl.run.python.spoken import speech_problems
from covo_rl.train import batch as batch_module
from covo_rl.types import Group, Rollout

KINDS = ("all", "text", "codes")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A trainer over a family with 100 codes, and one generated batch with advantages that all differ."""
    trainer = train_cases.trainer(train_cases.options(tmp_path_factory.mktemp("run"), policy_ids="codes"))
    batch = trainer.generate()
    shape, generator = batch.advantages.advantages_PG.shape, torch.Generator().manual_seed(0)
    advantages = replace(
        batch.advantages, advantages_PG=torch.randn(shape, generator=generator).numpy(),
        informative_P=batch.advantages.informative_P | True,
    )  # fmt: skip
    codes = [len(rollout.codes) for group in batch.groups for rollout in group.rollouts]
    assert 0 in codes and max(codes) > 1, codes
    return trainer, replace(batch, advantages=advantages)


def slow_loss(trainer, batch, loss_type: str, kind: str) -> torch.Tensor:
    """Token by token, before the first update (all ratios are 1), with the counts of the whole step."""
    first, limit = trainer.policy.family.code_ids.start, trainer.options.rollout.max_completion_length
    logps, _ = cases.oracle_logps(trainer.policy, batch.groups)
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    terms = []  # of each rollout: of the ids that count
    for logps_C, rollout, advantage in zip(logps, rollouts, batch.advantages.advantages_PG.ravel(), strict=True):
        counts = [kind == "all" or (kind == "codes") == (i >= first) for i in rollout.completion_ids]
        terms.append([-advantage * logp for logp, is_in in zip(logps_C, counts, strict=True) if is_in])
    if loss_type == "grpo":
        return sum(sum(term) / len(term) for term in terms if term) / len(terms)
    divisor = {"dr_grpo": len(terms) * limit, "bnpo": sum(map(len, terms)), "dapo": sum(map(len, terms))}[loss_type]
    return sum(sum(term) for term in terms) / divisor


def gradient(trainer, batch, loss_type: str, kind: str, prompts: int = 2, rollouts: int = 3) -> dict:
    learner, members = trainer.learner, list(range(len(batch.groups)))
    learner.loss = replace(learner.loss, loss_type=loss_type, policy_ids=kind)
    learner.size = replace(learner.size, prompts=prompts, rollouts=rollouts)
    learner._backward(batch, members, learner._normalizer(batch, members))
    return cases.gradients(trainer.policy)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_single_tokens_however_the_batch_is_split(spoken, loss_type, kind):
    trainer, batch = spoken
    slow_loss(trainer, batch, loss_type, kind).backward()
    expected = cases.gradients(trainer.policy)
    for prompts, rollouts in ((4, 3), (1, 2)):
        ours = gradient(trainer, batch, loss_type, kind, prompts, rollouts)
        assert cases.relative_difference(ours, expected) < 1e-4


def test_text_and_codes_are_all_of_a_reply(spoken):
    trainer, batch = spoken
    whole, text, codes = (gradient(trainer, batch, "dr_grpo", kind) for kind in KINDS)
    assert cases.relative_difference({name: text[name] + codes[name] for name in text}, whole) < 1e-5
    assert cases.relative_difference(text, whole) > 0.1 < cases.relative_difference(codes, whole)


def test_a_batch_without_any_code_moves_nothing(spoken):
    trainer, batch = spoken
    text = Rollout((5, 6), (-1.0, -1.0), "", "length")
    groups = [replace(group, rollouts=(text,) * len(group.rollouts)) for group in batch.groups]
    silent = gradient(trainer, replace(batch, groups=groups), "dapo", "codes")
    assert silent and not any(value.any() for value in silent.values())


def test_ids_by_hand():
    groups = [Group(None, (Rollout((4, 300, 301, 1), (), "", "stop"), Rollout((300, 2), (), "", "length")))]
    mask_NC = torch.tensor([[True] * 4, [True, True, False, False]])

    def counted(**changes):
        config = replace(Options().loss, **changes)
        return batch_module.loss_mask(groups, mask_NC, config, range(300, 310)).int().tolist()

    assert counted(policy_ids="codes") == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert counted(policy_ids="text") == [[1, 0, 0, 1], [0, 1, 0, 0]]
    assert counted(policy_ids="codes", mask_truncated_completions=True) == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert counted() == mask_NC.int().tolist()


def test_a_family_without_codes_is_refused_and_so_is_a_contradiction(tmp_path):
    settings = train_cases.options(tmp_path)
    made = train_cases.trainer(settings)
    settings.loss.policy_ids = "codes"
    with pytest.raises(ConfigError, match="policy_ids codes: this model's replies hold no audio codes"):
        type(made.learner)(settings, made.policy, made.accelerator, made.learner.idle_group)
    silent = Options()
    silent.loss.policy_ids, silent.model.speech_mode = "codes", "a2t"
    assert any("with speech_mode a2t no reply has any" in problem for problem in option_problems(silent))


# -- replies without codes ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["lora", "full"])
def mute(request):
    policy = cases.policy(lora=request.param == "lora", sizes={"audio_codes": 100}, keep_reference=True)
    policy.family.speaks = False
    policy._reference_family.speaks = False
    return policy


def test_no_code_is_drawn_and_what_is_drawn_is_scored_as_it_was(mute):
    prompts = cases.prompts(mute, seconds=((0.6,), ()))
    config = RolloutConfig(num_generations=8, max_completion_length=24, temperature=0.7)
    features = mute.features(prompts)
    groups = sample(mute, prompts, features, config, seed=2)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert max(i for rollout in rollouts for i in rollout.completion_ids) < 300
    assert not any(rollout.codes for rollout in rollouts)
    scored = mute("logps", groups, features, temperature=0.7, entropy=True)
    recorded = cases.padded([torch.tensor(rollout.logps) for rollout in rollouts])
    torch.testing.assert_close(scored.logps_NC, recorded, atol=1e-5, rtol=0)
    rollout = rollouts[0]  # the slow way: a softmax over the text ids alone
    logits_CV = cases.oracle_logits(mute, groups[0].prompt, rollout.completion_ids)[:, :300] / 0.7
    table = logits_CV.float().log_softmax(-1)
    expected = table.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(scored.logps_NC[0, : len(expected)], expected, atol=1e-5, rtol=0)
    entropy_C = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(scored.entropy_NC[0, : len(expected)], entropy_C, atol=1e-5, rtol=0)


def test_the_fused_decoder_and_the_modules_draw_the_same_text(mute):
    prompts = cases.prompts(mute, seconds=((0.6,), ()))
    config = RolloutConfig(num_generations=3, max_completion_length=16)
    features = mute.features(prompts)
    assert isinstance(decoder_for(mute, rows=6, longest=100), FusedDecoder)
    fused = sample(mute, prompts, features, config, seed=2)
    mute.fused_decode = False
    assert cases.ids_of(sample(mute, prompts, features, config, seed=2)) == cases.ids_of(fused)


def test_a_code_that_somebody_else_drew_is_an_error(mute):
    prompt = cases.prompts(mute, seconds=((0.6,),))[0]
    group = Group(prompt, (Rollout((5, 301, 1), (0.0,) * 3, "", "stop"),))
    with pytest.raises(ValueError, match=r"ids \[301\], which this model never draws"):
        mute("logps", [group], mute.features([prompt]))


def test_vllm_is_asked_for_text_alone(mute):
    fields = vllm_requests.sampling_fields(RolloutConfig(), mute.family, generations=2, seed=1)
    assert fields["logit_bias"] == dict.fromkeys(range(300, 400), -100.0)
    mute.family.speaks = True
    assert "logit_bias" not in vllm_requests.sampling_fields(RolloutConfig(), mute.family, generations=2, seed=1)


def test_the_option_reaches_the_family(tmp_path):
    model, processor = tiny_covo_audio(decoder_width=32, decoder_layers=1, encoder_layers=1, audio_codes=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for mode, count in (("a2ta", 0), ("a2t", 16)):
        settings = ModelConfig(str(tmp_path), speech_mode=mode)
        policy, _ = answering_policy(settings, AdapterConfig(), clips=None, device=torch.device("cpu"))
        assert (len(policy.family.code_ids), len(policy.family.unsampled_ids)) == (16, count)
        assert ["text alone" in problem for problem in speech_problems(policy.family, None)] == [True] * (count > 0)
