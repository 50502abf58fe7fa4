"""On a machine whose torch names mps, whose GPUs have no float64, nothing asks the device for it."""

from dataclasses import replace

import policy_cases as cases
import pytest
import torch
import train_cases
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from fake_device import FakeDevice

from covo_rl.algo.normalizer import entropy_threshold
from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig
from covo_rl.engines.health import self_check
from covo_rl.evaluate import evaluate
from covo_rl.export.verify import ask_policy
from covo_rl.policy.trainable import Trainable
from covo_rl.supervised.config import ColdStartConfig, Stage
from covo_rl.supervised.rows import prepare_rows
from covo_rl.supervised.tagging import train_tagging
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.launch import device_of, on_cpus

WITHOUT = (torch.float64, torch.complex128)


class StopAtOnce(StopSignals):
    def __init__(self):
        self.received = "SIGTERM"


def test_the_imitation_refuses_what_the_device_would():
    with FakeDevice("mps", without=WITHOUT) as fake:
        layer, x = torch.nn.Linear(3, 4).to("mps"), torch.randn(2, 3)
        layer(x.to("mps")).sum().backward()
        assert {t.device.type for t in (layer.weight, layer.weight.grad, layer(x.to(layer.weight)))} == {"mps"}
        assert layer.weight.detach().cpu().device.type == "cpu" and fake.operators > 5
        assert torch.zeros(3, dtype=torch.float64).device.type == "cpu" and not fake.problems
        for mistake in (
            lambda: layer(x), lambda: layer.weight.double(), lambda: layer.weight.detach().numpy(),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=layer.weight.device),
            lambda: layer.weight.sum(0, dtype=torch.float64), lambda: layer.weight.cpu()[layer.weight.argmax(1)],
        ):  # fmt: skip
            mistake()
            assert fake.problems, mistake
            fake.problems.clear()


@pytest.fixture
def fake(monkeypatch):
    """Inside, accelerate names the device as it does on such a machine."""
    Accelerator(cpu=True)
    with FakeDevice("mps", without=WITHOUT) as fake:
        for state in (AcceleratorState, PartialState):
            monkeypatch.setitem(state._shared_state, "device", fake.device)
        yield fake
        assert not fake.problems, "\n".join(fake.problems[:20])


STEPS = {
    "KL, two updates, truncation": {"beta": 0.04, "num_iterations": 2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "full, entropy, corrected": {
        "lora": False, "train_parts": ["encoder", "audio_adapter", "llm", "lm_head"], "entropy_coef": 0.01,
        "top_entropy_quantile": 0.5, "sampler_correction": True, "loss_type": "dapo", "max_grad_norm": 0.1,
    },
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "vespo", "scale_rewards": "batch"},
}  # fmt: skip


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_a_run_that_is_stopped_and_resumed(fake, changes, tmp_path):
    """Encoding, sampling, old and reference log-probs, loss, clipping, optimiser, metrics, checkpoint."""
    settings = train_cases.options(tmp_path, max_steps=2, resume="auto", **changes)
    with pytest.raises(StoppedBySignal):
        train_cases.run(settings, stop=StopAtOnce(), accelerator=Accelerator())
    made, _ = train_cases.run(settings, accelerator=Accelerator())
    assert made.device.type == made.policy.device.type == "mps" and fake.operators > 2000
    assert {p.grad is None and p.device.type for p in made.policy.parameters()} == {"mps"}
    lines = train_cases.metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_evaluation_self_check_and_what_an_export_is_compared_with(fake, name):
    made = cases.policy(name)
    made.to(fake.device)
    rows = train_cases.rows()
    config = {"prompt_config": PromptConfig(instruction=""), "rollout_config": cases.SMALL, "reward_config": None}
    evaluation = evaluate(made, rows, clips=made.clips, num_generations=2, greedy=False, **config)
    assert len(evaluation.records) == len(rows)
    checked = self_check(made, cases.prompts(made), cases.SMALL)
    assert checked.sampling_vs_scoring < 1e-5 and checked.without_audio > 0
    modes = Trainable(made.family, AdapterConfig(), made.model, (), 1)
    expected = ask_policy(modes, cases.prompts(made), made.clips)
    assert expected.trained.device.type == "cpu" and not torch.equal(expected.trained, expected.base)
    assert fake.operators > 1000


def test_tagging_goes_to_the_device(fake):
    assert device_of().type == device_of("auto").type == "mps" and not on_cpus()
    family, clips = cases.family(), ClipStore()
    facts = [{"animal": "dog"}, {"animal": "cat"}]
    rows = []
    for i, fact in enumerate(facts):
        columns = {"facts": fact, "fact_lexicon": {"animal": ["dog", "cat"]}}
        rows.append(replace(train_cases.rows(1)[0], id=f"row{i}", clips=(cases.clip(i, 0.5),), columns=columns))
    prepared = prepare_rows(rows, family, ColdStartConfig(), clips=clips)
    log = train_tagging(family, prepared, Stage(kind="tagging", steps=2, batch_size=2), seed=0)
    assert family.embed_tokens.weight.device.type == "mps" and log[-1]["step"] == 2 and fake.operators > 100


def test_the_entropy_quantile_of_a_micro_batch(fake):
    values = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    threshold, tokens = entropy_threshold([values.to("mps")], [torch.ones(3, 7, device="mps")], 0.5)
    assert (threshold, tokens) == entropy_threshold([values], [torch.ones(3, 7)], 0.5)
