"""Finding 30: what a user wrote into a file or on the command line is read as it stands or refused in one message."""

import json

import pytest
import yaml

from covo_rl.config import LIMITS, ConfigError, Options, RewardConfig, option_names, option_problems, parse_options
from covo_rl.data.files import RecordError, read_record
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError, load_set
from covo_rl.resolve import read_yaml
from covo_rl.rewards import RewardError, components
from covo_rl.supervised import load_config
from covo_rl.train.ranks import Ranks

BROKEN = [
    (b"max_steps: [1\nseed: 3\n", "line 2"),
    (b"max_steps: 3\n  seed: 3\n", "line 2, column 7: mapping values are not allowed here"),
    (b"max_steps: 3\n\tseed: 3\n", "line 2, column 1"),
    (b"seed: !!python/object/apply:os.system ['ls']\n", "line 1, column 7.*no tags"),
    (b"seed: !!python/name:os.system\n", "no tags"),
    (b"seed: !mine 3\n", "no tags"),
    (b"output: caf\xe9\n", "not UTF-8 at byte 11; save it as UTF-8"),
    ("seed: 3\n".encode("utf-16"), "not UTF-8"),
    (b"seed: 1\nmax_steps: 3\nseed: 2\n", "line 3, column 1: the key 'seed' is there twice"),
    (b"seed: 1\nrewards: {format: 1, format: 2}\n", "line 2, column 22: the key 'format' is there twice"),
    (b"- seed\n", "expected a mapping of option: value, found list"),
    (b"7\n", "found int"),
    (b"", "found nothing"),
    (b"# seed: 3\n", "found nothing"),
    (b"seed: *no\n", "undefined alias"),
    (b"rewards: &a [*a]\n", "inside what it names"),
    (b"seed: 1\n---\nseed: 2\n", "another document"),
    (b"[a, b]: 1\n", "unhashable key"),
    (b"output: 2024-13-45\n", "month must be in 1..12"),
    (b"seed: \x00\n", "#x0000"),
    (b"[" * 5000, "recursion"),
]


def refused(tmp_path, line, message):
    """A configuration of this one line is no configuration, and the message says so."""
    path = tmp_path / "c.yaml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        parse_options(["--config", str(path)])


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_file_that_cannot_be_read_is_one_message(tmp_path, content, message):
    """finding 30: with the file's name, and the place where there is one; for every kind of YAML file that is read."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for read, error in (
        (lambda: parse_options(["--config", str(path)]), ConfigError),
        (lambda: load_config(path), ConfigError),
        (lambda: load_set(str(path)), EvalInputError),
        (lambda: read_record(path), RecordError),
    ):
        with pytest.raises(error, match=message) as caught:
            read()
        assert "mine.yaml" in str(caught.value) and len(str(caught.value)) < 400


def test_prompt_yaml_of_a_checkpoint_is_checked_before_the_model_is_loaded(tmp_path):
    """finding 30: wording that cannot be read, unknown or of another type names the file."""
    request = Request(model=str(tmp_path))
    for content, message in (
        ("instruction: [a]", "expected text"), ("instructions: a", "did you mean instruction"), ("a: [", "line 1"),
        ("choice_style: circles", "choose letters, lines or inline"),
    ):  # fmt: skip
        (tmp_path / "prompt.yaml").write_text(content)
        with pytest.raises(ConfigError, match=rf"prompt\.yaml.*{message}"):
            request.prompt_config()
    (tmp_path / "prompt.yaml").write_text("choice_style: lines\n")
    assert request.prompt_config().choice_style == "lines"


def test_json_is_held_to_the_same(tmp_path):
    """finding 30: equal keys, half a file, a list."""
    path = tmp_path / "export.json"
    for content, message in (('{"a": 1, "a": 2}', "'a' is there twice"), ('{"a": ', "line 1"), ("[]", "found list")):
        path.write_text(content)
        with pytest.raises(RecordError, match=message):
            read_record(path)
    path.write_text(json.dumps({"a": "\ud83d"}))
    assert read_record(path) == {"a": "\ud83d"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: ten", "max_steps 'ten': expected a whole number"),
        ("max_steps: 1.5", "expected a whole number"),
        ("max_steps: true", "expected a whole number"),
        ("max_steps:", "it has no value"),
        ("learning_rate: .nan", "expected a finite number"),
        ("learning_rate: .inf", "expected a finite number"),
        ("learning_rate: nan", "expected a finite number"),
        ("learning_rate: [1]", "expected a finite number"),
        ("learning_rate: 0", "learning_rate 0.0: must be above 0"),
        ("reward_timeout: -3", r"must be in \(0, 1e9\]"),
        ("lora_alpha: 0", "must be above 0"),
        ("keep_last: 0", "must be at least 1"),
        ("eval_fraction: 1", r"must be in \[0, 1\)"),
        ("top_p: 0", r"must be in \(0, 1\]"),
        ("reward_failure_limit: 1.2", r"must be in \[0, 1\]"),
        ("warmup_steps: -1", "must not be negative"),
        ("limit: 0", "must be at least 1"),
        ("lora: nope", "expected true or false"),
        ("lora: 1", "expected true or false"),
        ("instruction: no", "expected text; put it in quotes"),
        ("output: 2024-01-02", "expected text; put it in quotes"),
        ("train_parts: llm", r"expected a list such as \[a, b\]"),
        ("train_parts: [1]", "expected a list"),
        ("dtype: float8", "choose auto, float32 or bfloat16"),
        ("lr_scheduler_type: foo", "choose one of linear"),
        ("rewards: {accuracy: .nan}", "accuracy=nan"),
        ("rewards: {accuracy: yes}", "accuracy=True"),
        ("rewards: accuracy=inf", "accuracy=inf"),
        ("rewards: thinking(use_gold=False)=nan", "use_gold"),
        ("rewards: 3", "expected text"),
        ("part_learning_rates: {llm: .nan}", "llm=nan"),
        ("env: 3", "env 3: expected a mapping"),
        ("max-steps: 3", "did you mean max_steps?"),
        ("1: 2", "unknown option 1"),
        ("null: 2", "unknown option None"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(tmp_path, line, message):
    """finding 30: in a file; what is given, and what is expected."""
    refused(tmp_path, line, message)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-steps", "ten"], ["--max-steps", "1.5"], ["--temperature", "nan"], ["--keep-last", "0"], ["--lora", "x"],
        ["--dtype", "float8"], ["--max-steps"], ["--config"], ["stray"], ["--rewards", "accuracy=nan"],
        ["--reward-timeout=-1"], ["--learning-rate=inf"], ["--train-parts"], ["--config", "."],
        ["--config", "a", "--config=b"],
    ],
)  # fmt: skip
def test_so_is_one_on_the_command_line(words):
    """finding 30: an error of ours, not a page of usage."""
    with pytest.raises(ConfigError):
        parse_options(words)


def test_every_problem_of_values_comes_at_once(tmp_path):
    """finding 30: as for unknown names."""
    path = tmp_path / "c.yaml"
    path.write_text("max_steps: ten\nlearnin_rate: 1\nlora: perhaps\n")
    with pytest.raises(ConfigError) as error:
        parse_options(["--config", str(path), "--sed", "3"])
    assert len(error.value.problems) == 4


def test_what_is_right_is_read_as_its_type(tmp_path):
    """finding 30: BOM, YAML's text for 1e-5, quoted numbers, whole floats, env, --config=FILE."""
    path = tmp_path / "c.yaml"
    text = (
        "\ufeffmax_steps: 60.0\nlearning_rate: 1e-5\nseed: '7'\nlora: 'false'\noutput: caf\u00e9\nenv: {COVO_TEST: 1}\n"
    )
    path.write_text(text, encoding="utf-8")
    options = parse_options([f"--config={path}"])
    train = options.train
    assert (train.max_steps, train.learning_rate, train.seed, train.output) == (60, 1e-5, 7, "caf\u00e9")
    assert type(train.max_steps) is int and options.adapter.lora is False


def test_the_locale_does_not_change_what_a_configuration_says(tmp_path):
    """finding 30: a file is UTF-8, whatever the terminal is."""
    import os
    import subprocess
    import sys

    path = tmp_path / "c.yaml"
    path.write_text("output: caf\u00e9\n", encoding="utf-8")
    words = ["--config", str(path)]
    code = f"from covo_rl.config import parse_options; print(ascii(parse_options({words!r}).train.output))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == r"'caf\xe9'", done.stderr


def test_limits_name_options_that_exist_and_defaults_lie_inside():
    """finding 30: each number once."""
    names = [name for names in LIMITS.values() for name in names.split()]
    assert len(names) == len(set(names)) and set(names) <= set(option_names())
    assert option_problems(Options()) == []


def test_options_made_in_python_are_checked_too():
    """finding 30: NaN, text for a number, None."""
    options = Options()
    options.train.learning_rate, options.train.max_steps, options.reward.rewards = float("nan"), "7", {"accuracy": None}  # type: ignore[assignment]
    assert len(option_problems(options)) == 3


@pytest.mark.parametrize("rewards", ["accuracy=nan", {"accuracy": float("inf")}, {"accuracy": "much"}, "format(a=1)=x"])
def test_a_weight_that_is_no_finite_number_is_refused_wherever_rewards_are_read(rewards):
    """finding 30: also without a run."""
    with pytest.raises(RewardError, match="write name=number"):
        components(rewards)
    assert [c.weight for c in components({"accuracy": 2, "format": 0.5})] == [2.0, 0.5]
    assert RewardConfig().rewards.count(",") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 3}, "stages: expected a list, found int"),
        ({"stages": [7]}, r"stages\[0\]: expected a mapping, found int"),
        ({"stages": [{"learning_rate": float("nan")}]}, "expected a finite number"),
        ({"stages": [{"batch_size": 0}]}, "batch_size 0: must be at least 1"),
        ({"stages": [{"steps": "many"}]}, "expected a whole number"),
        ({"stages": [{"right": -0.1}]}, "is a probability"),
        ({"stages": [{"train_parts": "llm"}]}, "expected a list"),
        ({"stages": [{"lr_scheduler_type": "foo"}]}, "there are linear"),
        ({"save_dtype": "float8"}, "save_dtype 'float8': choose one of"),
        ({"prompt": ["a"]}, "prompt: expected a mapping"),
        ({"prompt": {"choice_style": "x"}}, "choose letters"),
        ({"tiny": {"decoder_layers": "two"}}, "tiny: decoder_layers 'two': expected a number"),
        ({"rows": -1}, "must not be negative"),
        ({"seed": None}, "it has no value"),
    ],
)
def test_the_cold_start_is_held_to_the_same(tmp_path, change, message):
    """finding 30: stages, prompt and sizes of a new model."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"rows": 5, "tiny": {}, "stages": [{"kind": "sft"}], **change}))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"breakdown": "task"}, "breakdown 'task': expected a list"), ({"fields": [1]}, "expected a mapping"),
        ({"rows": "all"}, "expected a whole number"), ({"prompts": {"a": {"temlate": "x"}}}, "did you mean template"),
        ({"prompts": {"a": 3}}, "expected text"), ({"name": 3}, "expected text"),
        ({"prompts": {"a": {}}}, "no template"),
    ],
)  # fmt: skip
def test_so_is_a_manifest(tmp_path, change, message):
    """finding 30: a set of the user's own."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **change}))
    with pytest.raises(EvalInputError, match=message):
        load_set(str(path))


def test_merge_keys_of_yaml_may_be_overridden(tmp_path):
    """finding 30: `<<` is no key that is there twice."""
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


def test_records_of_an_evaluation_that_are_damaged_are_named(tmp_path):
    """finding 30: run.json of a folder to go on in, report.json of two to compare."""
    from covo_rl.evaluate.folder import check_folder
    from covo_rl.evaluate.report import compare_runs

    for name in ("run.json", "report.json", "rows.jsonl"):
        (tmp_path / name).write_text('{"a": ')
    with pytest.raises(EvalInputError, match=r"run\.json.*(?s:.)*choose another --output"):
        check_folder(tmp_path, {"a": 1}, Ranks())
    with pytest.raises(EvalInputError, match=r"report\.json"):
        compare_runs(tmp_path, tmp_path)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"a": \n{}\n')
    with pytest.raises(EvalInputError, match=r"rows\.jsonl, line 1"):
        compare_runs(tmp_path, tmp_path)


@pytest.mark.parametrize("value", ["ten", "-1", "nan", "inf", "0"])
def test_variables_of_the_judge_are_checked(value, monkeypatch):
    """finding 30: limits that come from the environment."""
    from covo_rl.rewards.judge import judge_from_spec

    monkeypatch.setenv("COVO_RL_JUDGE_TIMEOUT", value)
    judge_from_spec.cache_clear()
    with pytest.raises(RewardError, match="COVO_RL_JUDGE_TIMEOUT is"):
        judge_from_spec("openai:m@http://nowhere/v1")


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "line 5.*its aliases make more than 100000 values"),
        (MERGES, "its aliases make more than 100000 values"),
        ("max_steps: 010", "line 1, column 12: YAML reads 010 in base 8"),
        ("checkpoint_minutes: 1:30", "YAML reads 1:30 in base 60"),
        ("output: 007", "a text in quotes"),
        ("lora: !!bool maybe", "does not fit its tag"),
        ("output: !!timestamp nope", "does not fit its tag"),
    ],
)
def test_yaml_that_grows_or_reads_otherwise_than_it_looks_is_refused(tmp_path, content, message):
    """finding 30: aliases of aliases (9 to the 11th values), octal and base 60, tags that do not fit."""
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_yaml_as_people_write_it_is_read(tmp_path):
    """finding 30: CRLF, comments, quotes, blocks, hexadecimal, 0 and 0.5, yes and no, paths of any language."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(
        "# mine\r\nmax_steps: 0x10 # sixteen\r\nbeta: 0\r\nskipped_rows_limit: 0.5\r\nlearning_rate: 1e-6\r\n"
        "lora: no\r\nevaluate: on\r\noutput: 'my runs/\u00dcbung # 2/\u5feb'\r\nlr_scheduler_type: !!str linear\r\n"
        "instruction: |\r\n  Think.\r\n  Answer.\r\nseed: 20241126123456\r\nlimit: ~\r\n".encode()
    )
    options = parse_options(["--config", str(path)])
    train = options.train
    assert (train.max_steps, train.learning_rate, train.seed, options.loss.beta) == (16, 1e-6, 20241126123456, 0.0)
    assert (options.adapter.lora, options.eval.evaluate, options.data.limit) == (False, True, None)
    assert train.output == "my runs/\u00dcbung # 2/\u5feb" and options.prompt.instruction == "Think.\nAnswer.\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('output: "a\\0b"', "no file name and no prompt can hold"),
        ('instruction: "\\ud83d"', "no file name and no prompt can hold"),
        ("output: ''", "output '': it is empty"),
        ("resume: ''", "resume '': it is empty"),
        ("audio_dir: ''", "it is empty"),
        ("judge: ''", "it is empty"),
        ("output: ~/runs", "only a shell knows ~"),
        ("max_steps: 1e300", "expected a whole number"),
        ("learning_rate: 1e39", "expected a finite number"),
        ("rewards: accuracy=1e308", "expected a finite number"),
        ("rewards: [{accuracy: 1}]", "expected names or functions"),
        ("rewards: !!omap [accuracy: 1]", "expected names or functions"),
        ("part_learning_rates: {llm: -1}", "each rate must be above 0"),
        ("part_learning_rates: llm=0", "each rate must be above 0"),
        ("temperature: 1e-40", "at least 0.001"),
        ("lora_r: 99999999", r"must be in \[1, 100000\]"),
        ("checkpoint_minutes: 1e30", r"must be in \[0, 1e9\]"),
        ("overlong_buffer: 2000", "max_completion_length 1024 is shorter"),
        ("env: {A: true}", "env: 'A' True: write NAME: text or number"),
        ("env: {A: [1]}", "write NAME"),
        ("env: {A: }", "write NAME"),
        ("env: {'A=B': 1}", "write NAME"),
        ("env: {'': 1}", "write NAME"),
        ('env: {A: "x\\0"}', "write NAME"),
    ],
)
def test_a_value_that_would_fail_later_or_mean_something_else_is_refused(tmp_path, line, message):
    """finding 30: no file name, nothing, a shell's ~, numbers beyond torch, variables of the environment."""
    refused(tmp_path, line, message)


def test_long_values_are_shown_by_their_beginning(tmp_path):
    """finding 30: a message can be read."""
    path = tmp_path / "c.yaml"
    path.write_text(f"dtype: {'x' * 100_000}\nrewards: accuracy={'9' * 5000}\n{'y' * 900}: 1\n")
    with pytest.raises(ConfigError) as error:
        parse_options(["--config", str(path)])
    assert len(error.value.problems) == 3 and len(str(error.value)) < 600


def test_unknown_names_types_limits_and_contradictions_come_in_one_message(tmp_path):
    """finding 30: one round. What depends on a value that could not be read is not judged."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "learnin_rate: 1\nmax_steps: ten\nkeep_last: 0\nnum_generations: 1\nenv: {A: true}\n"
        "loss_type: cispo\nepsilon_high: five\nlr_scheduler_type: foo\n"
    )
    with pytest.raises(ConfigError) as error:
        parse_options(["--config", str(path), "--prompts-per-step", "0"])
    text = "\n".join(error.value.problems)
    for part in ("did you mean learning_rate", "max_steps 'ten'", "epsilon_high 'five'", "env: 'A'", "keep_last 0",
                 "prompts_per_step 0", "at least 2 rollouts", "lr_scheduler_type 'foo'"):  # fmt: skip
        assert part in text
    assert len(error.value.problems) == 8


def test_the_environment_is_left_alone_where_the_rest_is_wrong(tmp_path, monkeypatch):
    """finding 30: nothing is set before a configuration is accepted."""
    import os

    monkeypatch.delenv("COVO_TEST", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("env: {COVO_TEST: 1}\nkeep_last: 0\n")
    with pytest.raises(ConfigError):
        parse_options(["--config", str(path)])
    assert "COVO_TEST" not in os.environ


def test_rewards_model_parts_and_pattern_are_judged_together_before_a_model_is_loaded():
    """finding 30: as many problems as there are, in one message."""
    from covo_rl.run.checks import check_before_loading

    options = Options()
    options.adapter.lora, options.adapter.train_parts = False, ["llmm"]
    options.reward.rewards, options.adapter.lora_target_modules = "acuracy", "("
    with pytest.raises(ConfigError, match=r"(?s)did you mean 'accuracy'.*'llmm' is not a part.*regular expression"):
        check_before_loading(options)


def test_the_same_weights_by_another_path_are_the_same_evaluation(tmp_path):
    """finding 40: an evaluation given again from another folder, or through a link, was refused as another one."""
    from covo_rl.evaluate.folder import check_folder
    from covo_rl.evaluate.sets import EvalInputError
    from covo_rl.train.ranks import Ranks

    first = {"model": "runs/m", "model_sha256": "ab", "adapter": None, "adapter_sha256": None}
    (tmp_path / "run.json").write_text(json.dumps(first))
    check_folder(tmp_path, first | {"model": "/data/runs/m"}, Ranks())
    for other in ({"model_sha256": "cd"}, {"model": "m2", "model_sha256": None}, {"adapter": "a"}):
        with pytest.raises(EvalInputError, match="holds another evaluation"):
            check_folder(tmp_path, first | other, Ranks())
