"""Whole runs on servers that fail: they train what a run without faults trains, and every row is accounted for."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import policy_cases
import pytest
import torch
import train_cases as cases
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer, Refused, hurry

from covo_rl.audio import ClipStore
from covo_rl.cli import main
from covo_rl.config import AdapterConfig, ModelConfig
from covo_rl.engines.vllm_server import VLLMServer
from covo_rl.policy import Policy
from covo_rl.policy.loading import trainable_policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.records.folder import Run
from covo_rl.train.loop import Trainer

FAULTS = ["500", "drop", "half", "cut", "hang", "", "", "", "", ""]
#: figures of a process and of the servers, not of what was trained
OF_THE_PROCESS = ("time/", "engine/tokens_per_s", "engine/retries", "engine/probe_abs", "engine/clips_prepared",
                  "engine/prefix_hit_rate", "engine/servers_up")  # fmt: skip


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def start():
    made = []

    def begin(policy):
        made.append(FakeServer(policy))
        return made[-1]

    yield begin
    for server in made:
        server.die()
        assert server.errors == []


def trained(folder, fakes, on_step=lambda step: None, **changes):
    """Three steps of four rows in front of these servers: (metrics, weights, ids of the rows of each step)."""
    settings = cases.options(
        folder, use_vllm=True, vllm_mode="server", vllm_server_base_url=",".join(fake.url for fake in fakes),
        vllm_server_timeout=1.0, engine_patience=20.0, max_steps=3, **changes,
    )  # fmt: skip
    torch.manual_seed(settings.train.seed)
    modes = make_trainable(policy_cases.family(), AdapterConfig(lora_r=4, lora_alpha=8.0))
    policy = Policy(modes.family, modes.peft_model, clips=ClipStore())
    engine = VLLMServer(policy, modes, settings, max_model_len=200, probe_prompt=policy_cases.prompts(policy)[0])
    trainer = Trainer(settings, policy, policy.clips, cases.rows(), Accelerator(cpu=True), engine)
    rows = []

    def note(metrics, batch):
        Run(folder).log_metrics(metrics)
        rows.append([group.prompt.example.id for group in batch.groups])
        on_step(metrics["step"])

    try:
        trainer.run(note)
    finally:
        engine.close()
    lines = [{name: value for name, value in line.items() if not name.startswith(OF_THE_PROCESS)}
             for line in cases.metrics(folder)]  # fmt: skip
    return lines, {name: p.detach().clone() for name, p in policy.named_parameters()}, rows


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_among_faults_ends_in_the_bits_of_one_without(tmp_path, start, ahead):
    """Two servers, faults in half of all answers, one gone at step 1 and back at step 2."""
    calm = trained(tmp_path / "a", [start(policy_cases.policy())], rollout_ahead=ahead)
    fakes = [start(policy_cases.policy()) for _ in range(2)]
    numbers = random.Random(ahead)

    def disturb(step):
        for fake in fakes:
            fake.faults = [numbers.choice(FAULTS) for _ in range(6)]
        if step == 1:
            fakes[0].die()
        if step == 2:
            fakes[0].revive()

    wild = trained(tmp_path / "b", fakes, disturb, rollout_ahead=ahead)
    retries = [
        json.loads(line)["engine/retries"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(retries) > 0, "nothing was disturbed"
    assert wild[0] == calm[0] and wild[2] == calm[2] and len(wild[0]) == 3
    assert all(torch.equal(wild[1][name], calm[1][name]) for name in calm[1])


def test_a_row_that_no_server_can_answer_is_missing_where_it_is_counted_and_nowhere_else(tmp_path, start, monkeypatch):
    fakes = [start(policy_cases.policy()) for _ in range(2)]
    for fake in fakes:
        generate = fake._generate

        def refuse(asked, fault, generate=generate):
            if len(asked.get("content_parts") or ()) == 2:  # row2, the only one with two clips
                raise Refused(400, "this clip is not for me")
            return generate(asked, fault)

        monkeypatch.setattr(fake, "_generate", refuse)
    lines, _, rows = trained(tmp_path, fakes, failed_groups_limit=0.3)
    sampler = cases.trainer(cases.options(tmp_path / "x")).sampler
    expected = [[row.id for row in sampler.take(4)] for _ in range(3)]
    assert sum("row2" in step for step in expected) >= 2
    assert rows == [[row for row in step if row != "row2"] for step in expected]
    assert [line["engine/failed_groups"] for line in lines] == [step.count("row2") for step in expected]


# -- by the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_survives_a_server_and_goes_on_where_all_were_gone(tmp_path, start, monkeypatch, capsys):
    """Two servers: one gone at step 1, the other at step 2; exit code 75, then all are back and it is resumed."""
    monkeypatch.chdir(Path(__file__).parents[1])

    def tiny():
        return trainable_policy(ModelConfig("builtin:tiny", "float32"), AdapterConfig(), clips=ClipStore(),
                                device=torch.device("cpu"), learning_rate=1e-3)[0]  # fmt: skip

    log = Run.log_metrics

    def command(folder, fakes, at=lambda step: None, *words):
        def log_metrics(self, metrics):
            log(self, metrics)
            at(metrics["step"])

        monkeypatch.setattr(Run, "log_metrics", log_metrics)
        with pytest.raises(SystemExit) as ended:
            main(["train", "--config", "recipes/configs/tiny.yaml", "--limit", "8", "--max_steps", "4",
                  "--prompts_per_step", "4", "--num_generations", "4", "--max_completion_length", "24", "--evaluate",
                  "false", "--checkpoint_every", "4", "--use_vllm", "true", "--vllm_mode",
                  "server", "--vllm_server_base_url", ",".join(fake.url for fake in fakes), "--rollout_ahead", "1",
                  "--engine_patience", "0.5", "--output", str(folder), *words])  # fmt: skip
        return ended.value.code or 0

    def rollouts(folder):
        files = sorted((folder / "rollouts").glob("step_*.jsonl"))
        steps = [map(json.loads, file.read_text(encoding="utf-8").splitlines()) for file in files]
        return [[(row["id"], row["rollout"]) for row in step] for step in steps]

    calm = [start(tiny())]
    assert command(tmp_path / "a", calm) == 0
    fakes = [start(tiny()), start(tiny())]
    gone = {1: fakes[0], 2: fakes[1]}
    assert command(tmp_path / "b", fakes, lambda step: gone[step].die() if step in gone else None) == 75
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by the loss of the engine (no rollout server has answered for engine_patience = 0.5 s" in said
    for fake in fakes:
        fake.revive()
    assert command(tmp_path / "b", fakes, lambda step: None, "--resume", "auto") == 0
    whole = rollouts(tmp_path / "a")
    assert rollouts(tmp_path / "b") == whole and len(whole) == 4
    assert all(set(Counter(row for row, _ in step).values()) == {4} and len(step) == 16 for step in whole)
    # what nobody had answered when the run ended was asked for anew, of the policy as it was by then
    lags = [[line["engine/lag"] for line in cases.metrics(tmp_path / name)] for name in "ab"]
    assert lags == [[0, 1, 1, 1], [0, 1, 0, 1]]
