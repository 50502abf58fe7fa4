"""float32 weights computed in bfloat16 (`accelerate launch --mixed_precision bf16`): trained, resumed, exported."""

import policy_cases as cases
import pytest
import torch
import train_cases
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from covo_rl import models
from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig
from covo_rl.export.exporting import export_policy
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.records.folder import Run
from covo_rl.supervised.config import load_config
from covo_rl.supervised.stages import run_stages
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.launch import join
from covo_rl.train.loop import Trainer


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The launcher's word; accelerate keeps one state per process."""
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    Accelerator(cpu=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    family = cases.family()
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return str(folder)


def trained(base, folder, **changes):
    """A run with old log-probs, a reference and recomputation; returns its trainer and what trains."""
    settings = train_cases.options(
        folder, **{"num_iterations": 2, "beta": 0.1, "gradient_checkpointing": True, "checkpoint_every": 1,
                   "lr_scheduler_type": "constant", "max_steps": 2, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    modes = make_trainable(models.load_family(base), AdapterConfig(lora=settings.adapter.lora, lora_r=4))
    policy = Policy(modes.family, modes.peft_model, clips=ClipStore(), keep_reference=True, gradient_checkpointing=True)
    made = Trainer(settings, policy, policy.clips, train_cases.rows(), join())
    saver, record = Saver(settings, folder), Run(folder)
    saver.resume(made, settings.train.resume, allow_changed=True)
    made.run(lambda metrics, batch: record.log_metrics(metrics), saver)
    return made, modes


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_trains_goes_on_and_is_exported(base, tmp_path, lora):
    whole, modes = trained(base, tmp_path / "whole", lora=lora)
    start = make_trainable(models.load_family(base), AdapterConfig(lora=lora, lora_r=4)).family.model
    weights = {n: p for n, p in whole.policy.model.named_parameters() if p.requires_grad}
    assert weights and {p.dtype for p in weights.values()} == {torch.float32}
    assert whole.learner.applied == 4 and whole.guard.skipped == 0
    if not lora:
        assert any(
            not torch.equal(p, q) for p, q in zip(start.parameters(), modes.family.model.parameters(), strict=True)
        )
    for line in train_cases.metrics(tmp_path / "whole"):
        assert 1e-5 < line["sampling/sampling_logp_difference/max"] < 0.2, "16 bits computed"
        assert 0 < line["grad_norm"] < 100
    trained(base, tmp_path / "parts", lora=lora, max_steps=1)
    parts, _ = trained(base, tmp_path / "parts", lora=lora, resume="auto")
    for name, parameter in parts.policy.model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, weights[name]), f"{name} after the resume"
    assert train_cases.metrics(tmp_path / "parts") == train_cases.metrics(tmp_path / "whole")
    result = export_policy(modes, tmp_path / "export", kind="adapter" if lora else "merged")
    assert result.ok and result.max_abs_logit_diff_base > 1e-3


def test_supervised_stages_train_and_the_next_one_goes_on(tmp_path, monkeypatch):
    seen = []
    forward = torch.nn.Linear.forward

    def watched(self, x):
        out = forward(self, x)
        seen.append((self.weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    options = {
        "rows": 12, "output": str(tmp_path / "out"), "save_stages": True,
        "tiny": {"vocab_size": 400, "encoder_width": 16, "decoder_width": 16, "decoder_layers": 1, "encoder_layers": 1,
                 "decoder_heads": 2, "encoder_heads": 2, "mel_bins": 20, "adapter_hidden": 16},
        "stages": [{"kind": "tagging", "steps": 1, "batch_size": 4},
                   {"kind": "sft", "steps": 6, "batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": True}],
    }  # fmt: skip
    run_stages(load_config(None, options))
    assert (torch.float32, torch.bfloat16) in seen, "the sft stage computes in 16 bits"
    again = {**options, "output": str(tmp_path / "again"), "model": str(tmp_path / "out/stage-0"), "start_stage": 1}
    del again["tiny"]
    run_stages(load_config(None, again))
    one, other = (models.load_family(str(tmp_path / name)).model.state_dict() for name in ("out", "again"))
    assert {weight.dtype for weight in one.values()} == {torch.float32}
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    before = models.load_family(str(tmp_path / "out/stage-0")).model.state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in one.items())
