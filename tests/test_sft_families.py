"""Supervised stages, evaluation and answers of every family, on its tiny random model."""

import json
import shutil

import numpy as np
import policy_cases as cases
import pytest
import torch

import covo_rl
from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, PromptConfig
from covo_rl.models import load_family
from covo_rl.models.builtin import TINY_MODELS, resolve_model
from covo_rl.models.text import text_ids
from covo_rl.policy import Policy
from covo_rl.policy.patterns import PatternError, part_of
from covo_rl.prompt import build_prompt
from covo_rl.supervised.checks import trained_parts
from covo_rl.supervised.config import ColdStartConfig, Stage, load_config
from covo_rl.supervised.held_out import as_it_was
from covo_rl.supervised.rows import prepare_rows
from covo_rl.supervised.stages import run_stages
from covo_rl.supervised.trainer import Collator, completion_loss, family_forward
from covo_rl.types import Example, Group, Rollout

#: clips of two lengths in a batch, a head that caps, per-layer inputs, one that scales, and ids outside the table
QUICK = ("qwen3_asr", "gemma3n", "granite_speech")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY_MODELS]
TEXTS = ("<think>a low tone</think><answer>B</answer>", "one", "two of them")


def family_of(name):
    return load_family(resolve_model(f"builtin:tiny_{name}"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_supervised_loss_is_that_of_scoring(name):
    """A batch of a short clip, a longer one and none: as if each row were alone, with the policy's own log-probs."""
    family, clips = family_of(name), ClipStore()
    rows = [Example("a", (cases.clip(0, 0.7),), "What?"), Example("b", (cases.clip(1, 1.6),), "Which, and how often?"),
            Example("c", (), "No sound here.")]  # fmt: skip
    config = ColdStartConfig(prompt=PromptConfig(instruction=""))
    prepared = prepare_rows(rows, family, config, clips=clips)
    batch = Collator(family, prepared, TEXTS)([{"row": 0}, {"row": 1}, {"row": 2}])
    with torch.no_grad(), family_forward(family) as model:
        loss = float(completion_loss(model, batch))
    groups = []
    for row, text in zip(rows, TEXTS, strict=True):
        ids = (*text_ids(family.tokenizer, text), family.eos_token_ids[0])
        prompt = build_prompt(row, family, clips, config.prompt)
        groups.append(Group(prompt, (Rollout(ids, (0.0,) * len(ids), text, "stop"),)))
    with torch.no_grad(), as_it_was(family):
        policy = Policy(family, clips=clips)
        scores = policy.logps(groups, policy.features([group.prompt for group in groups]))
    expected = -float(scores.logps_NC[scores.mask_NC].mean())
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in TINY_MODELS])
def test_stages_train_every_part_and_what_they_save_answers(name, tmp_path):
    stages = [{"kind": "tagging", "steps": 3, "batch_size": 3, "learning_rate": 1e-3},
              {"kind": "sft", "steps": 6, "batch_size": 4, "learning_rate": 3e-3}]  # fmt: skip
    options = {"rows": 10, "held_out": 0.2, "model": f"builtin:tiny_{name}", "stages": stages}
    config = load_config(None, {**options, "output": str(tmp_path / "sft"), "prompt": {"choice_style": "inline"}})
    folder = run_stages(config)
    log = json.loads((folder / "training_log.json").read_text())
    assert log[1]["log"][-1]["train_loss"] < log[1]["log"][0]["loss"] and log[-1]["held_out"]["rows"] >= 1
    before, after = family_of(name), load_family(str(folder))
    assert {*after.model.state_dict()} == {*before.model.state_dict()}
    ours = dict(before.model.named_parameters())
    moved = {part_of(key, after) for key, p in after.model.named_parameters() if not torch.equal(p, ours[key])}
    assert moved | {"lm_head"} == {"encoder", "audio_adapter", "llm", "lm_head"} & {*after.parts}  # heads may be tied

    model = covo_rl.load(folder)
    sound = np.sin(np.arange(16_000) / 20).astype(np.float32) / 4, 16_000
    reply = model.generate("What rings?", sound, ["bell", "phone"], max_completion_length=6)
    assert len(reply.token_ids) in range(1, 7)
    chat = model.chat(max_completion_length=4)
    assert chat.ask("What rings?", sound).token_ids and chat.ask("How often?").token_ids
    report = model.evaluate("builtin", limit=3, max_completion_length=6).report
    assert report["set"] == "builtin"


def test_a_part_that_a_family_does_not_have_is_named():
    family = family_of("qwen2_5_omni")
    assert trained_parts(family, Stage()) == {"encoder", "llm", "lm_head"}
    assert trained_parts(family, Stage(kind="tagging")) == {"encoder"}
    with pytest.raises(PatternError, match="train_parts: 'audio_adapter' is not a part of qwen2_5_omni"):
        trained_parts(family, Stage(train_parts=["llm", "audio_adapter"]))


def test_stages_do_not_write_over_the_model_that_they_start_from(tmp_path):
    folder = shutil.copytree(resolve_model("builtin:tiny_qwen3_asr"), tmp_path / "model")
    (folder / "cold_start.yaml").write_text("")  # an earlier cold start, which --overwrite replaces
    weights = (folder / "model.safetensors").read_bytes()
    options = {"rows": 4, "model": str(folder), "output": str(folder), "overwrite": True, "stages": [{"kind": "sft"}]}
    with pytest.raises(ConfigError, match="is the model that the stages start from: choose another"):
        run_stages(load_config(None, options))
    assert (folder / "model.safetensors").read_bytes() == weights
