"""GRPO and load from Python, before a model is loaded: options, rows and rewards."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from covo_rl import GRPO
from covo_rl.audio import content_key, decode
from covo_rl.config import ConfigError, option_names, parse_options
from covo_rl.data.files import plain
from covo_rl.data.memory import IN_MEMORY
from covo_rl.evaluate.inputs import read_inputs
from covo_rl.evaluate.sets import EvalInputError, EvalSet, load_set
from covo_rl.rewards import components
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.worker import run_components
from covo_rl.run.defaults import with_defaults
from covo_rl.run.python.calls import decoding_of, evaluation_options, rows_of
from covo_rl.run.python.keywords import ALIASES, HINTS
from covo_rl.run.questions import read_questions
from covo_rl.synth import builtin_questions
from covo_rl.train.checkpoint.identity import reward_fingerprint
from covo_rl.types import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows():
    """Twelve rows of the built-in set as a program has them, with absolute paths."""
    file = Path(builtin_questions()["train"])
    rows = json.loads(file.read_text(encoding="utf-8"))[:12]
    return [{**row, "audio_id": str(file.parent / row["audio_id"])} for row in rows]


def problems_of(**options):
    with pytest.raises(ConfigError) as caught:
        GRPO(**options)
    return caught.value.problems


def test_importing_pulls_in_no_torch_and_making_a_run_loads_no_model():
    code = (
        "import sys, covo_rl; assert not {'torch', 'numpy'} & set(sys.modules); covo_rl.GRPO('builtin:tiny', seed=3);"
        "assert 'torch' not in sys.modules; assert {'GRPO', 'load'} <= set(dir(covo_rl))\n"
        "try: covo_rl.nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "has no attribute 'nothing'" in done.stdout


# -- options ---------------------------------------------------------------------------------------------------------


def test_everything_wrong_with_the_options_is_said_at_once():
    problems = "\n".join(problems_of(max_step=3, temperature="hot", num_generations=1, per_device_train_batch_size=4))
    for words in (
        "unknown option 'max_step'; did you mean max_steps?",
        "temperature 'hot': expected a finite number",
        "num_generations 1: a group needs at least 2",
        "there is no per_device_train_batch_size; prompts_per_step counts",
    ):
        assert words in problems
    assert "model is a object: give the folder or hub name" in problems_of(model=object())[0]
    assert "on_step 'print' is no function" in problems_of(on_step=["print"])[0]


def test_values_of_another_kind_are_told_when_a_run_is_made(rows):
    class DataFrame:
        pass

    for wrong, words in (
        ({"model": rows, "data": "builtin:tiny"}, "model is rows, which are data=..."),
        ({"data": DataFrame()}, "data: a DataFrame is no list of rows; hand in frame.to_dict('records')"),
        ({"data": (row for row in rows)}, "data: a generator is no list of rows"),
        ({"eval_data": {"question": "q"}}, "eval_data: a dict is no list of rows"),
        ({"rewards": {"accuracy", "format"}}, "rewards is a set: give a name, a function"),
        ({"rewards": 3}, "rewards is a int"),
    ):
        assert words in "\n".join(problems_of(**wrong))
    assert GRPO("builtin:tiny", tuple(rows), on_step=None).callbacks == []


def test_without_a_configuration_a_model_takes_what_the_recipe_takes_for_it(tmp_path):
    assert GRPO().options == parse_options(with_defaults([]))
    assert GRPO("builtin:tiny_zero").options == parse_options(with_defaults(["--model", "builtin:tiny_zero"]))
    (tmp_path / "prompt.yaml").write_text("instruction: Listen.\n")
    own = GRPO(tmp_path, seed=7)
    assert own.options == parse_options(with_defaults(["--model", str(tmp_path), "--seed", "7"]))
    assert own.options.prompt.instruction == "Listen." and own.options.train.learning_rate == 1e-6
    assert GRPO(tmp_path, instruction="Now.").options.prompt.instruction == "Now.", "a keyword wins"


def test_a_file_of_options_lies_below_the_keywords(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: builtin:tiny\nseed: 3\nlearning_rate: 1e-4\noutput: there\n")
    options = GRPO(config=file, seed=4).options
    assert (options.train.seed, options.train.learning_rate, options.train.output) == (4, 1e-4, "there")
    file.write_text("sed: 3\n")
    problems = problems_of(config=file, max_step=1)
    assert "did you mean seed?" in problems[0] and "did you mean max_steps?" in problems[1]
    assert "nowhere.yaml" in problems_of(config="nowhere.yaml")[0]


def test_names_of_trl_mean_the_same_or_are_answered():
    from trl import GRPOConfig, GRPOTrainer

    theirs = {f.name for f in dataclasses.fields(GRPOConfig)} | set(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = set(option_names())
    assert set(ALIASES.values()) <= ours and not set(HINTS) & (ours | set(ALIASES))
    # of TRL's scripts, of other versions of transformers
    assert set(ALIASES) - theirs <= {"model_name_or_path", "torch_dtype", "overwrite_output_dir"}
    assert set(HINTS) - theirs <= {"max_prompt_length", "generation_kwargs", "warmup_ratio"}
    made = GRPO(reward_funcs="format", output_dir="x", save_total_limit=3, resume_from_checkpoint=True).options
    assert made == GRPO(rewards="format", output="x", keep_last=3, resume="auto").options
    assert GRPO(report_to=["tensorboard", "wandb"]).options == GRPO(report_to="tensorboard,wandb").options
    for name in HINTS:
        assert f"there is no {name}; " in problems_of(**{name: 1})[0]
    assert "are the same option" in problems_of(rewards="format", reward_funcs=["accuracy"])[0]


def test_the_page_of_python_names_every_alias_and_every_hint():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name, own in ALIASES.items():
        assert f"| `{name}` | `{own}` |" in page
    assert all(f"`{name}`" in page for name in HINTS)


# -- rows ------------------------------------------------------------------------------------------------------------


def read(**named):
    made = GRPO(evaluate="eval_data" in named, **named)
    return read_questions(made.options, memory=made.memory)


def test_rows_in_memory_are_those_of_the_file(rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    stored, memory = read(data=tmp_path / "rows.json", audio_dir="/"), read(data=rows)
    assert [row.id for row in memory.train] == [row["id"] for row in rows]
    assert memory.train == stored.train
    name = str(memory.files["data"])
    assert name.startswith(f"{IN_MEMORY}: 12, sha256 ") and str(read(data=rows[:11]).files["data"]) != name
    assert str(read(data=[{**rows[0], "answer": rows[0]["choices"][0]}, *rows[1:]]).files["data"]) != name


@pytest.mark.parametrize("change", ["shuffle", "filter", "select", "sort"])
def test_a_data_set_that_was_shuffled_or_filtered_keeps_each_sound_with_its_row(rows, change):
    datasets = pytest.importorskip("datasets")
    mine = datasets.Dataset.from_list([{**{k: row[k] for k in ("id", "question", "choices", "answer")},
                                        "audio": {"bytes": Path(row["audio_id"]).read_bytes(), "path": None}}
                                       for row in rows]).cast_column("audio", datasets.Audio())  # fmt: skip
    mine = {
        "shuffle": lambda: mine.shuffle(seed=1),
        "filter": lambda: mine.filter(lambda row_id: row_id[-1] in "147", input_columns="id"),
        "select": lambda: mine.select([7, 2, 9]),
        "sort": lambda: mine.sort("id", reverse=True),
    }[change]()
    of_id = {row["id"]: row for row in rows}
    examples = read(data=mine).train
    assert len(examples) == len(mine) and [e.id for e in examples] != [row["id"] for row in rows]
    for example in examples:
        assert example.clips[0].data == Path(of_id[example.id]["audio_id"]).read_bytes()
        assert example.question == of_id[example.id]["question"]


def test_rows_of_another_program_are_asked_for(rows):
    named = str(read(data=rows).files["data"])
    with pytest.raises(ConfigError, match=r"were in the memory of a Python program: hand\s+the same to GRPO"):
        read_questions(GRPO(data=named).options)


def test_broken_rows_in_memory_are_named_by_place(rows):
    with pytest.raises(UserError) as caught:
        read(data=[rows[0], {"id": "b", "question": "?"}, {**rows[2], "audio_id": "/nowhere.wav"}])
    assert "row 3" in str(caught.value) and "/nowhere.wav" in str(caught.value)


def test_an_evaluation_takes_rows_in_memory(rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    mmau = load_set("mmau-test-mini")
    memory, stored = read_inputs(mmau, rows, None), read_inputs(mmau, tmp_path / "rows.json", "/")
    assert [(e.id, e.question, e.choices, e.answer) for e in memory.examples] == [
        (e.id, e.question, e.choices, e.answer) for e in stored.examples
    ]
    assert memory.meta["data"] == IN_MEMORY and memory.meta["answer_key_sha256"] == stored.meta["answer_key_sha256"]
    with pytest.raises(EvalInputError, match="duplicate ids"):
        read_inputs(mmau, [rows[0], rows[0]], None)
    with pytest.raises(EvalInputError, match="in the form of its own file"):
        read_inputs(EvalSet("x", "x", submission=True), rows, None)


# -- functions as rewards --------------------------------------------------------------------------------------------


def outcome_of(function, timeout=20.0, count=2):
    terms = components([function])
    group = group_from_completions(example_from_row({"id": "a", "question": "?", "choices": ["x"], "answer": "x"}),
                                   [f"<answer>{'x' * n}</answer>" for n in range(1, count + 1)])  # fmt: skip
    return run_components([terms[0].reward], reward_columns([group]), timeout)[0]


def test_closures_lambdas_and_objects_are_rewards_and_keep_their_state():
    seen = []

    def counting(completions, **_):
        seen.append(len(completions))
        return [float(len(seen))] * len(completions)

    class Ready:
        def __call__(self, completions, **_):
            return [0.25 for _ in completions]

    assert outcome_of(counting).scores == [1, 1] and outcome_of(counting).scores == [2, 2] and seen == [2, 2]
    assert outcome_of(lambda completions, **_: [0.5] * len(completions)).scores == [0.5, 0.5]
    assert outcome_of(Ready()).scores == [0.25, 0.25]
    assert outcome_of(functools.partial(lambda completions, x, **_: [x] * len(completions), x=3)).scores == [3, 3]
    weighted = components({"accuracy": 1.0, counting: 0.5})
    assert [(term.name, term.weight) for term in weighted] == [("accuracy", 1.0), ("counting", 0.5)]
    assert GRPO(rewards=counting).options.reward.rewards == [counting]
    assert GRPO(rewards={counting: 0.5, "format": 1}).options.reward.rewards == {counting: 0.5, "format": 1}


def test_a_function_that_never_ends_is_timed_out_and_its_loop_ends():
    def endless(completions, **_):
        while True:
            time.sleep(0.001)

    start = time.monotonic()
    outcome = outcome_of(endless, timeout=0.3)
    assert "was stopped after 0.3 s" in outcome.failures[0] and time.monotonic() - start < 5
    deadline = time.monotonic() + 10
    while any(t.name == "reward endless" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(t.name == "reward endless" for t in threading.enumerate()), "it would burn a core"


def test_what_a_function_was_stands_in_the_record_and_a_changed_one_is_told_apart():
    def half(completions, **_):
        return [0.5] * len(completions)

    (term,) = components([half])
    assert term.reward.code.startswith("def half(completions") and len(term.reward.sha256) == 64
    before = reward_fingerprint([half])

    def half(completions, **_):
        return [0.75] * len(completions)

    assert reward_fingerprint([half]).keys() == before.keys() and reward_fingerprint([half]) != before
    scope = {}
    exec("def typed(completions, **_): return [1.0] * len(completions)", scope)
    (typed,) = components([scope["typed"]])
    assert typed.reward.code is None and len(typed.reward.sha256) == 64, "no source: its instructions"
    assert components([functools.partial(half)])[0].reward.sha256 == components([half])[0].reward.sha256


def test_a_callable_object_has_no_address_in_a_record():
    assert plain([Odd(), len]) == [f"{__name__}.Odd", "builtins.len"]


class Odd:
    def __call__(self, completions, **_):
        return [1.0] * len(completions)


# -- what a model is asked with --------------------------------------------------------------------------------------


def test_each_question_of_a_list_has_its_own_sounds_and_options(rows):
    a, b = (row["audio_id"] for row in rows[:2])
    both = rows_of(["p", "q"], [a, [a, b]], [["x"], ["y", "z"]])
    assert [[clip.path for clip in row.clips] for row in both] == [[a], [a, b]]
    assert [row.choices for row in both] == [("x",), ("y", "z")]
    assert [row.choices for row in rows_of(["p", "q"], a, ["x", "y"])] == [("x", "y")] * 2
    (one,) = rows_of("p", [a, Path(b).read_bytes(), ([0.0, 0.1], 8000), {"array": [0.0], "sampling_rate": 16000}])
    assert [clip.name for clip in one.clips] == [a, "<bytes>", "<array>", "<array>"]
    assert content_key(one.clips[1]) == content_key(rows_of("p", b)[0].clips[0])
    for wrong, words in (
        ((["p", "q"], [a]), "1 sounds for 2 questions"),
        ((["p", "q"], a, [["x"]]), "1 lists of choices for 2 questions"),
        (("p", a, "xy"), "the choices of question 1 are 'xy'"),
        (("p", 3), "audio is 3: give a path, bytes, or"),
        (("p", ([0.0], None)), "give a path, bytes"),
        (("", a), "question 1 is ''"),
        ((3, a), "question is a int"),
        ((b"p", a), "question is a bytes"),
        (("p", a, {"x", "y"}), "choices are a set"),  # without an order
        (("p", a, (name for name in "xy")), "choices are a generator"),  # checked, it would be empty
        ((["p"], a, [{"x": 1}]), "the choices of question 1 are {'x': 1}"),
        (("p", ""), "audio is ''"),
        (("p", "https://host/a.wav"), "is an address: fetch it"),
        (("p", ([0.0], 8000.5)), "audio is a tuple"),
        (("p", {"bytes": None, "path": None}), "audio is None"),
    ):
        with pytest.raises(ConfigError, match=words):
            rows_of(*wrong)


def test_a_waveform_keeps_its_type_and_may_be_a_tensor_with_its_channels_first():
    import torch

    stereo = np.array([[0, 16384], [-32768, 0], [8192, 8192]], dtype=np.int16).repeat(200, axis=0)
    scaled = torch.tensor(stereo / 32768)
    kinds = {
        "samples": stereo, "channels first": stereo.T, "tensor": torch.from_numpy(stereo.T.copy()),
        "gradient": scaled.clone().requires_grad_(), "half": scaled.bfloat16(),
    }  # fmt: skip
    for name, waveform in kinds.items():
        (row,) = rows_of("p", (waveform, 8000.0))
        samples, rate = decode(row.clips[0])
        mono = samples if samples.ndim == 1 else samples.mean(axis=1)
        np.testing.assert_allclose(mono[[0, 200, 400]], [0.25, -0.5, 0.25], atol=1e-3, err_msg=name)
        assert rate == 8000


def test_decoding_options_that_contradict_each_other_are_refused():
    assert decoding_of(None, None, 1, 8, {})[1] is True and decoding_of(None, 0.7, 2, 8, {})[1] is False
    assert decoding_of(False, None, 2, 8, {"top_p": 0.9})[0].top_p == 0.9
    config, _ = decoding_of(None, 0.7, 2, 8, {"top_k": 5.0})
    assert type(config.top_k) is int, "as torch takes it"
    for given, words in (
        ((True, 0.7, 1, 8, {}), "temperature would have no effect"),
        ((None, None, 3, 8, {}), "greedy replies are equal"),
        ((None, None, 1, 8, {"top_k": 3}), "top_k would have no effect"),
        ((None, 0.7, 1, 0, {}), "max_completion_length 0: must be at least 1"),
        ((None, 0.7, 1, 8, {"topp": 1}), "did you mean top_p"),
        ((None, 0.0, 1, 8, {}), "temperature 0.0: sampling needs at least 0.001; greedy is without one"),
        (("no", None, 1, 8, {}), "greedy 'no': expected true or false"),
        ((None, 0.7, 1, 8, {"top_k": 2.5}), "top_k 2.5: expected a whole number"),
        ((None, 0.7, 1, 8, {"max_new_tokens": 5}), "no max_new_tokens; write max_completion_length"),
        ((None, 0.7, 1, 8, {}, "1"), "seed '1': expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=words):
            decoding_of(*given)


def test_options_of_an_evaluation_are_held_to_the_limits_of_the_command():
    assert evaluation_options({"limit": 3, "listen": True}) == {"plots": False, "limit": 3, "listen": True}
    for given, words in (({"limi": 3}, "did you mean limit"), ({"limit": 0}, r"limit 0: must be in \[1"),
                         ({"top_p": 2.0}, "top_p 2.0"), ({"greedy": "maybe"}, "expected true or false"),
                         ({"model": "x"}, "unknown option 'model'")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            evaluation_options(given)


def test_a_path_object_is_a_path(tmp_path):
    made = GRPO("builtin:tiny", data=tmp_path / "rows.json", output=tmp_path / "run", audio_dir=tmp_path)
    assert made.options.data.data == os.fspath(tmp_path / "rows.json") and not made.memory
