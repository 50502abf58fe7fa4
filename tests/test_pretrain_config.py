"""Options of pre-training: presets below the file, a section for each stage, everything wrong at once; the schedule."""

import math

import pytest
import torch

from covo_rl.resolve import ConfigError, find
from covo_rl.supervised.pretrain.config import FLOORED_COSINE, read_pretrain
from covo_rl.supervised.pretrain.stages import STAGE_2, WEIGHTS, planned_tasks
from covo_rl.train.schedule import schedule_of

TWO_STAGES = """
model: m
length: 512
data: rows.jsonl
audio_dir: clips
tasks: {asr: {data: asr.jsonl, weight: 3}, tts: {}}
stage_1: {steps: 100, warmup_steps: 10, tasks: {asr: {}}}
stage_2: {steps: 200, warmup_steps: 20, learning_rate: 1e-3}
"""


def problems(text, tmp_path, **overrides):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_pretrain(tmp_path / "c.yaml", overrides)
    return error.value.problems


def test_a_stage_is_what_was_published_below_what_is_given():
    one, two = (read_pretrain(None, {"model": "m", "stage": stage}) for stage in (1, 2))
    assert one.train_parts == ["audio_adapter"] and list(one.tasks) == ["asr"]
    assert (one.learning_rate, one.steps, one.warmup_steps) == (1e-4, 50_000, 40_000)
    assert two.train_parts == ["audio_adapter", "llm", "lm_head"] and list(two.tasks) == STAGE_2
    assert (two.learning_rate, two.steps, two.warmup_steps, two.length) == (3e-5, 500_000, 20_000, 8192)
    assert (two.adam_beta1, two.adam_beta2, two.weight_decay, two.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert sum(WEIGHTS.values()) == 1985  # 2015 thousand millions less 30 of stage 1
    assert set(WEIGHTS) - set(STAGE_2) == {"full_duplex"} and WEIGHTS["full_duplex"] == 5  # named by who has streams


def test_one_file_holds_both_stages(tmp_path):
    (tmp_path / "c.yaml").write_text(TWO_STAGES)
    one, two = (read_pretrain(tmp_path / "c.yaml", {"stage": stage}) for stage in (1, 2))
    assert one.tasks == {"asr": {"data": "asr.jsonl", "weight": 3}} and two.tasks.keys() == {"asr", "tts"}
    assert (one.steps, one.learning_rate) == (100, 1e-4) and (two.steps, two.learning_rate) == (200, 1e-3)
    assert read_pretrain(tmp_path / "c.yaml", {"stage": 2, "steps": 50, "train_parts": ["llm"]}).steps == 50
    plan = planned_tasks(two)
    assert (plan["asr"].weight, plan["asr"].data, plan["asr"].audio_dir) == (3, "asr.jsonl", None)
    assert (plan["tts"].weight, plan["tts"].data, plan["tts"].audio_dir) == (160, "rows.jsonl", "clips")


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    found = problems("modle: x\nsteps: many\ntasks: {asr: {wieght: 1}, tts: 3}\nstage_2: {stage: 1}", tmp_path)
    assert len(found) == 5 and "did you mean model?" in "\n".join(found)
    text = "model: m\ndata: d\ntasks: {asr: {}}\nsteps: 5\nwarmup_steps: 5\ntrain_parts: [llm, had]\nlength: 0"
    found = problems(text, tmp_path, resume=True, overwrite=True)
    text = "\n".join(found)
    assert len(found) == 4 and all(word in text for word in ("length", "warmup_steps 5 of steps 5", "'had'", "resume"))
    text = "model: m\nstage: 1\nsteps: 0\nwarmup_steps: 0\ndistill: {teacher: t, topk: 3, every: 0}"
    text = "\n".join(problems(text, tmp_path))
    assert all(word in text for word in ("steps", "top_k", "distill: every", "distill teaches text", "data: give one"))
    assert problems("stage: 3\nmodel: m", tmp_path) == ["stage 3: there are 1, 2, chat"]


def test_tasks_without_rows_and_unknown_tasks_are_named():
    config = read_pretrain(None, {"model": "m", "stage": 2})
    config.tasks = {"asr": {}, "text": {"weight": 0}, "tsr": {}, "tts": {"data": "x.jsonl"}}
    with pytest.raises(ConfigError) as error:
        planned_tasks(config)
    first, second = error.value.problems
    assert "asr has weight 80 and no rows: give data" in first and "'tsr'; did you mean" in second


def test_streams_have_data_of_their_own_and_hold_their_recordings():
    config = read_pretrain(None, {"model": "m", "stage": 2})
    config.tasks, config.audio_dir = {"full_duplex": {"audio_dir": "x"}}, "clips"
    with pytest.raises(ConfigError) as error:
        planned_tasks(config)
    said = "; ".join(error.value.problems)
    assert "has audio_dir" in said and "weight 5 and no rows: give duplex_data" in said
    config.tasks, config.duplex_data = {"full_duplex": {}}, "sft"
    plan = planned_tasks(config)["full_duplex"]
    assert (plan.weight, plan.data, plan.audio_dir) == (5, "sft", None)


@pytest.mark.parametrize("name", ["pretrain_tiny", "pretrain_7b_stage1", "pretrain_7b_stage2"])
def test_the_shipped_files_are_read(name):
    for stage in (1, 2) if name == "pretrain_tiny" else (int(name[-1]),):
        config = read_pretrain(find("recipes", f"configs/{name}.yaml"), {"stage": stage, "model": "m"})
        assert config.stage == stage and config.warmup_steps < config.steps


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = schedule_of(FLOORED_COSINE, optimizer, warmup_steps=3, steps=10, min_lr_rate=0.1)
    rates = []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 7)) / 2) for k in range(8)]
    assert rates[3:] == pytest.approx(expected) and rates[10] == pytest.approx(0.2)
