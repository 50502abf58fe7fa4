"""Running rewards: the columns they get, every way to fail, time limits, the sum, the gate and the figures."""

import math
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from covo_rl.algo.advantage import advantages
from covo_rl.config import LossConfig, RewardConfig
from covo_rl.records.steps import StepShare, rollout_rows, step_metrics
from covo_rl.rewards import RewardError, available_rewards, components, load_reward, score
from covo_rl.rewards.columns import TrainerState, example_from_row, group_from_completions
from covo_rl.rewards.judge import JudgeError
from covo_rl.rewards.scoring import FailureWindow, weighted_sum, wrong_outranks_right
from covo_rl.rewards.worker import close

NAN = math.nan
ROW = {
    "id": "r1",
    "question": "What rings?",
    "choices": ["bell", "knock"],
    "answer": "bell",
    "tempo": "slow",
    "think": "gold",
}
RIGHT, WRONG = "<think>So a bell.</think><answer>bell</answer>", "<think>So a knock.</think><answer>knock</answer>"
PLUGINS = '''
import asyncio, os, re, sys, time
def constant(completions, **kwargs): return [0.5] * len(completions)
async def slow_async(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)
def raises(completions, answer, **kwargs):
    if any("knock" in c for c in completions): raise ValueError("no knocking")
    return [1.0] * len(completions)
def short(completions, **kwargs): return [1.0]
def not_a_list(completions, **kwargs): return 1.0
def nan(completions, **kwargs): return [float("nan"), float("inf"), "x", None][: len(completions)]
def sleeps(completions, **kwargs): time.sleep(3600)
def holds_the_lock(completions, **kwargs): return [float(bool(re.match("(a+)+$", "a" * 40 + "b")))]
def ends_its_thread(completions, **kwargs): sys.exit(3)
def ends_its_process(completions, **kwargs): os._exit(3)
def prints(completions, **kwargs):
    print("hello"); return [1.0] * len(completions)
calls = 0
def counts(completions, **kwargs):
    global calls; calls += 1
    return [float(calls)] * len(completions)
def clip_seconds(completions, clips, **kwargs): return [sum(c.duration for c in row) for row in clips]
def make(level): return Level(level)
class Level:
    def __init__(self, level): self.level = level
    def __call__(self, completions, **kwargs): return [self.level] * len(completions)
number = 3
'''  # fmt: skip


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugins") / "plugins.py"
    file.write_text(PLUGINS)
    yield lambda name: f"{file}:{name}"
    close()


def group(*completions, row=ROW):
    return group_from_completions(example_from_row(row), completions)


def config(**options):
    return RewardConfig(**{"reward_timeout": 20.0, **options})


def test_a_function_gets_every_column():
    seen = {}

    def look(completions, **columns):
        seen.update(columns, completions=completions)
        columns["log_extra"]("length", [len(c) for c in completions])
        columns["log_metric"]("longest", 7)
        return [1.0, 0.0]

    table = score([group(RIGHT, "oops")], config(), rewards={look: 1.0}, trainer_state={"step": 5})
    assert seen["completions"] == [RIGHT, "oops"] and seen["prompts"] == ["What rings?"] * 2
    assert seen["answer"] == ["bell"] * 2 and seen["predicted_answer"] == ["bell", None]
    assert seen["tempo"] == ["slow"] * 2 and seen["choices"] == [["bell", "knock"]] * 2
    assert seen["think"] == ["So a bell.", None] and seen["row_think"] == ["gold"] * 2
    assert [p.ok for p in seen["parsed"]] == [True, False] and seen["stop_reason"] == ["stop"] * 2
    assert seen["trainer_state"].step == seen["trainer_state"]["global_step"] == 5 and "clips" not in seen
    assert table.extras == {"length": [len(RIGHT), 4]} and table.metrics["longest"] == 7 and table.names == ("look",)


def test_sync_async_file_and_import_plugins(plugin):
    specs = [plugin("constant"), plugin("slow_async"), plugin("prints"), plugin("make") + "(level=0.25)"]
    table = score([group(RIGHT, WRONG)], config(), rewards=[*specs, "covo_rl.rewards.scoring:components"][:4])
    assert table.rewards_PGR[0].tolist() == [[0.5, 1.0, 1.0, 0.25]] * 2 and table.missing == {}
    assert load_reward("covo_rl.rewards.scoring:figures").source.place == "import"


def test_a_worker_keeps_its_state_between_steps(plugin):
    scores = [score([group(RIGHT)], config(), rewards=[plugin("counts")]).rewards_PG[0, 0] for _ in range(2)]
    assert scores[1] == scores[0] + 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", r"raised ValueError: no knocking for row r1, completion '<think>So a knock"),
        ("short", "returned 1 scores for 2 completions"),
        ("not_a_list", "returned float, not a list of 2 numbers"),
        ("nan", "returned nan for row r1, completion '<think>So a bell"),
        ("ends_its_thread", "raised SystemExit: 3"),
        ("ends_its_process", "its process ended \\(exit code 3\\)"),
    ],
)
def test_a_failing_plugin_is_none_with_a_reason_or_stops(plugin, name, why):
    table = score([group(RIGHT, WRONG)], config(), rewards={"format": 1.0, plugin(name): 1.0})
    assert np.isnan(table.rewards_PGR[0, 0, 1]) and table.rewards_PG.tolist() == [[1.0, 1.0]]
    assert re.search(why, table.missing[0, 0, plugin(name)])
    assert table.missing[0, 0, plugin(name)].startswith("failed: ")
    with pytest.raises(RewardError, match=why):
        score([group(RIGHT, WRONG)], config(reward_failure="stop"), rewards={"format": 1.0, plugin(name): 1.0})


@pytest.mark.parametrize("name", ["sleeps", "holds_the_lock"])
def test_a_hanging_plugin_is_killed_and_the_others_are_kept(plugin, name):
    score([group(RIGHT)], config(), rewards=["format", plugin("constant")])  # processes start outside the clock
    start = time.perf_counter()
    table = score([group(RIGHT)], config(reward_timeout=0.3), rewards=["format", plugin("constant"), plugin(name)])
    assert time.perf_counter() - start < 15  # loading a process on a busy machine, then 0.3 s
    assert table.rewards_PGR[0, 0, 0] == 1 and "was stopped after 0.3 s" in table.missing[0, 0, plugin(name)]


def test_a_hanging_thread_is_left_behind():
    table = score([group(RIGHT)], config(reward_timeout=0.1), rewards={lambda completions, **kw: time.sleep(1): 1.0})
    assert "was stopped after 0.1 s" in next(iter(table.missing.values())) and np.isnan(table.rewards_PG).all()


def test_components_run_at_the_same_time():
    def nap(completions, **columns):
        time.sleep(0.2)
        return [1.0]

    def nap_too(completions, **columns):
        return nap(completions)

    start = time.perf_counter()
    table = score([group(RIGHT)], config(), rewards={nap: 1.0, nap_too: 1.0})
    assert time.perf_counter() - start < 0.38 and all(s >= 0.2 for s in table.seconds.values())


def test_the_clip_is_there_for_functions_that_name_it(plugin):
    from covo_rl.types import Clip, Example

    row = Example("c", (Clip(array=np.zeros(8000, np.float32), sampling_rate=16000),), "?", (), "x")
    assert (
        score([group_from_completions(row, ["a"])], config(), rewards=[plugin("clip_seconds")]).rewards_PG[0, 0] == 0.5
    )


def test_weights_sum_gate_and_missing():
    """finding 19: what lacks a component that a sibling has is NaN; it used to sum as if it had a zero there."""
    raw = np.array([[[1.0, 1.0, np.nan], [0.0, 1.0, 0.5], [np.nan, 1.0, 0.5], [np.nan] * 3]])
    weights = np.array([1.0, 2.0, 4.0])
    np.testing.assert_equal(weighted_sum(raw, weights)[0], [np.nan, 4.0, np.nan, np.nan])
    # behind a gate that is closed nothing else counts, so nothing else is missed; the first two need not compare
    np.testing.assert_equal(weighted_sum(raw, weights, gate=0)[0], [3.0, 0.0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("raw", "weights", "sums"),
    [
        ([[1, 1, NAN, 1], [1, 1, 1, 1], [0, 1, 0, 1]], [1, 1, 1, 1], [NAN, 4, 2]),  # the case
        ([[1, 1, NAN, 1], [0, 1, NAN, 1]], [1, 1, 1, 1], [3, 2]),  # nobody has it: the component leaves the group
        ([[1, 1, NAN, 1]], [1, 1, 1, 1], [3]),
        ([[1, NAN], [1, 1], [0, 1]], [1, 0], [1, 1, 0]),  # a component of weight 0 may be missing
        ([[1, NAN], [1, 1], [0, 1]], [1, -1], [NAN, 0, -1]),
        ([[NAN, NAN], [1, 1]], [1, 1], [NAN, 2]),
        ([[NAN, 1], [1, NAN]], [1, 1], [NAN, NAN]),  # two that cannot be compared
    ],
)
def test_no_sibling_outranks_a_rollout_for_a_missing_component(raw, weights, sums):
    """finding 19: [1, 1, None, 1] summed to 3 beside 4."""
    np.testing.assert_equal(weighted_sum(np.array([raw], float), np.array(weights, float))[0], sums)


def test_a_missing_component_gives_no_advantage_against_it():
    """finding 19: by the sum and by component; an advantage of 0, none below it."""

    def third(completions, **columns):
        return [None, 1.0, 0.0]

    table = score([group(RIGHT, RIGHT, RIGHT)], config(), rewards={"format": 1.0, third: 1.0})
    assert table.metrics["rewards/total/none"] == pytest.approx(1 / 3)
    for by_component in (False, True):
        result = advantages(table, LossConfig(component_advantages=by_component))
        assert result.advantages_PG[0, 0] == 0 and result.advantages_PG[0, 1] > 0 > result.advantages_PG[0, 2]
        assert result.statistics["rewards_missing"] == 1


def test_a_gate_that_nobody_could_grade_leaves_no_sum():
    """finding 19"""
    table = score(
        [group(RIGHT, WRONG, row={**ROW, "answer": None})], config(rewards="accuracy,format", reward_gate="accuracy")
    )
    assert np.isnan(table.rewards_PG).all()


def always_fails(completions, **columns):
    raise ConnectionError("down")


def fails_at(*steps):
    def outage(completions, trainer_state, **columns):
        if trainer_state.step in steps:
            raise ConnectionError("down")
        return [1.0] * len(completions)

    return outage


@pytest.mark.parametrize(
    ("function", "limit", "steps", "stops"),
    [
        (always_fails, 0.2, 60, 3), (always_fails, 0.2, 2, 2), (always_fails, 0.0, 60, 1),
        (always_fails, 1.0, 60, None),
        (fails_at(1), 0.2, 60, None), (fails_at(1), 0.2, 3, None), (fails_at(4, 5), 0.2, 60, None),
        (fails_at(1, 12, 23), 0.2, 60, None), (fails_at(4, 6, 9), 0.2, 60, 9), (fails_at(7), 0.0, 60, 7),
    ],
)  # fmt: skip
def test_one_outage_goes_by_and_a_broken_component_stops_the_run(function, limit, steps, stops):
    """finding 14: one component out of four that failed once was 25 % of all scores, above the limit of 20 %."""
    window, stopped = FailureWindow(limit, steps), None
    for step in range(1, 31):
        state = {"step": step}
        table = score([group(RIGHT)], config(), rewards={"format": 1.0, function: 1.0}, trainer_state=state)
        problem = window.add([table, table])
        if problem and stopped is None:
            stopped = step
            assert "2 of 2 scores failed" in problem and "ConnectionError: down" in problem and "format" not in problem
    assert stopped == stops


def test_what_a_reward_logs_cannot_stand_for_our_own_figures():
    """finding 16: `log_metric("step", x)` crashed training, `reward_total` could be forged."""

    def forger(completions, log_metric, log_extra, **columns):
        for name in ("step", "reward_total", "reward_format", "seconds", "rewards/format/mean", "rewards/x", "mine"):
            log_metric(name, 99)
        for name in ("completion", "reward_total", "mine"):
            log_extra(name, ["forged"] * len(completions))
        return [0.0] * len(completions)

    def twin(completions, log_metric, **columns):
        log_metric("mine", 1)
        return [0.0] * len(completions)

    groups = [group(RIGHT, RIGHT)]
    table = score(groups, config(), rewards={"format": 1.0, forger: 1.0, twin: 1.0})
    share = advantages(table, LossConfig())
    metrics = step_metrics([StepShare.of(groups, table, share)], {"step": 3, "seconds": {"step": 1.0}})
    assert metrics["step"] == 3 and metrics["seconds"] == {"step": 1.0} and metrics["reward_total"] == 1.0
    assert metrics["reward_format"] == 1.0 and metrics["logged/step"] == metrics["logged/reward_total"] == 99
    assert metrics["rewards/x"] == metrics["mine"] == 99 and metrics["twin/mine"] == 1
    assert table.metrics["rewards/format/mean"] == 1.0
    row = rollout_rows(groups, table, share)[0]
    assert row["completion"] == RIGHT and row["reward_total"] == 1.0
    assert row["mine"] == row["logged/completion"] == row["logged/reward_total"] == "forged"


@pytest.mark.parametrize(
    ("rewards", "why"),
    [("accuracy,accuracy=2", "'accuracy' occurs twice"), (["format", "format"], "two rewards are named"),
     ({always_fails: 1.0, "format": math.nan}, "'format=nan'.*finite"), ("format=inf", "'format=inf'.*finite")],
)  # fmt: skip
def test_names_and_weights_that_cannot_stand_in_one_table_are_refused(rewards, why):
    """finding 16"""
    with pytest.raises(RewardError, match=why):
        components(rewards)


def test_a_reward_named_total_is_refused():
    """finding 16: it was a KeyError after the first rollouts."""

    def total(completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match=r"cannot be named 'total'.*weighted sum"):
        score([group(RIGHT)], config(), rewards={total: 1.0})


@pytest.mark.parametrize(
    ("code", "why"),
    [("import time; time.sleep(60)", "did not load within 0.3 s"), ("while True: pass", "did not load within 0.3 s"),
     ("import sys; sys.exit(5)", "raises SystemExit while it is imported: 5")],
)  # fmt: skip
def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch, code, why):
    """finding 12: a file that hangs or exits while it is imported took the trainer with it."""
    monkeypatch.setattr("covo_rl.rewards.specs.LOAD_SECONDS", 0.3)
    (tmp_path / "slow.py").write_text(code)
    with pytest.raises(RewardError, match=why):
        load_reward(f"{tmp_path}/slow.py:f")
    (tmp_path / "make.py").write_text("def make(level): raise OSError('no level')")
    with pytest.raises(RewardError, match="raises OSError while it is loaded: no level"):
        load_reward(f"{tmp_path}/make.py:make(level=1)")


def test_the_gate_counts_other_components_only_behind_it():
    open_sum = score([group(RIGHT, WRONG)], config(rewards="accuracy,format=0.5")).rewards_PG
    gated = score([group(RIGHT, WRONG)], config(rewards="accuracy,format=0.5", reward_gate="accuracy")).rewards_PG
    assert open_sum.tolist() == [[1.5, 0.5]] and gated.tolist() == [[1.5, 0.0]]
    with pytest.raises(RewardError, match="not among the rewards"):
        score([group(RIGHT)], config(rewards="format", reward_gate="accuracy"))


def test_figures_are_exact():
    table = score([group(RIGHT, WRONG, "x", RIGHT)], config(rewards="accuracy,consistency"))
    assert table.rewards_PGR[0].tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]
    assert table.metrics["rewards/accuracy/mean"] == 0.5 and table.metrics["rewards/accuracy/std"] == 0.5
    assert table.metrics["rewards/total/mean"] == 1.25 and table.metrics["rewards/accuracy/none"] == 0.0
    assert set(table.seconds) == {"accuracy", "consistency"}
    none = score([group("<think>A sound.</think><answer>bell</answer>", RIGHT)], config(rewards="consistency"))
    assert none.metrics["rewards/consistency/none"] == 0.5 and none.metrics["rewards/consistency/mean"] == 1.0


def test_how_often_a_wrong_answer_outranks_a_right_one():
    assert wrong_outranks_right(np.array([[1.0, 0.0, 0.0]]), np.array([[2.0, 3.0, 1.0]])) == 0.5
    assert wrong_outranks_right(np.array([[1.0, 1.0]]), np.array([[2.0, 3.0]])) == 0.0


def test_specs_with_weights_and_arguments():
    terms = components("accuracy, format(pattern='loose')=0.5, thinking(min_words=2, max_words=9)")
    assert [(t.name, t.weight) for t in terms] == [
        ("accuracy", 1.0), ("format(pattern='loose')", 0.5), ("thinking(min_words=2, max_words=9)", 1.0)
    ]  # fmt: skip
    assert terms[1].reward([f"Well. {RIGHT}"]) == [1.0] and load_reward("format")([f"Well. {RIGHT}"]) == [0.0]
    for wrong in ("accuracy=much", "format(1)", "format(pattern=open('x'))", ""):
        with pytest.raises(RewardError):
            components(wrong)


def test_loading_errors_say_what_exists(plugin, tmp_path):
    for spec, message in [
        ("acuracy", "did you mean 'accuracy'"),
        ("./none.py:f", "does not exist"),
        (plugin("absent"), "has no 'absent'; it has .*constant"),
        (plugin("number"), "is int, not a function"),
        ("no_such_package.x:f", "cannot import"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward(spec)
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(RewardError, match="raises ZeroDivisionError while it is imported"):
        load_reward(f"{broken}:f")


def test_entry_points_are_found(tmp_path, monkeypatch):
    (tmp_path / "speedy.py").write_text("def speech_rate(completions, **kwargs): return [0.5] * len(completions)")
    info = tmp_path / "speedy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: speedy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[covo_rl.rewards]\nspeech_rate = speedy:speech_rate\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        load_reward("speech_rate")(completions=["a"]) == [0.5]
        and load_reward("speech_rate").source.place == "entry point"
    )
    assert "speech_rate" in [source.name for source in available_rewards()]


def test_a_reward_pickles_as_its_name(plugin):
    again = pickle.loads(pickle.dumps(load_reward(plugin("constant"))))
    assert again(completions=["a"]) == [0.5] and again.__name__ == "constant"
    code = "import pickle,sys; print(pickle.load(sys.stdin.buffer)(completions=['a']))"
    out = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(load_reward(plugin("constant"))), capture_output=True
    )
    assert out.stdout == b"[0.5]\n", out.stderr


def test_groups_must_have_one_size():
    with pytest.raises(ValueError, match=r"different sizes \[1, 2\]"):
        score([group(RIGHT), group(RIGHT, WRONG)], config())


def test_the_trainer_state_is_plain():
    state = TrainerState(type("State", (), {})())
    assert state.step == 0 and pickle.loads(pickle.dumps(state)) == state
    with pytest.raises(AttributeError, match="has no 'epoch'"):
        _ = state.epoch


def test_a_loaded_reward_takes_completions_alone_or_trl_s_order():
    said, row = ["<think>It barks.</think><answer>dog</answer>"], {"choices": [["dog", "cat"]], "answer": ["dog"]}
    accuracy = load_reward("accuracy")
    assert accuracy(said, **row) == accuracy(["?"], said, **row) == accuracy(completions=said, **row) == [1.0]
    with pytest.raises(TypeError, match="by position"):
        accuracy(["?"], said, [["dog"]])


@pytest.mark.parametrize(("gate", "totals"), [("none", [None, 2.0]), ("accuracy", [0.0, 2.0])])
def test_an_outage_is_no_fall_in_the_figures(gate, totals):
    """finding 19: a judge that failed for a whole group took its points from `reward_total` of the step."""

    class Judge:
        name = "down"

        def ask(self, prompts):
            return [JudgeError("no answer") if "knock" in prompt else '{"odd": 1}' for prompt in prompts]

    settings = config(rewards="accuracy,consistency", reward_gate=gate)
    row = {**ROW, "answer": "bell" if gate == "none" else "knock"}
    failing = score([group(RIGHT, RIGHT, row=row)], settings, judge=Judge())
    graded = score([group(RIGHT, RIGHT)], settings)
    for table, total in zip((failing, graded), totals, strict=True):
        assert len(table.missing) == (2 if table is failing else 0)
        share = StepShare.of([group(RIGHT, RIGHT)], table, advantages(table, LossConfig()))
        metrics = step_metrics([share])
        assert metrics["reward_total"] == total and metrics["none_total"] == 0.0
        assert table.metrics.get("rewards/total/mean") == total
    assert failing.rewards_PG.tolist() == ([[1.0, 1.0]] if gate == "none" else [[0.0, 0.0]])  # to compare siblings by


@pytest.mark.parametrize("reward", [None, 5, ["accuracy"], dict, type("Judge", (), {"__call__": print})])
def test_what_is_no_function_is_refused_before_anything_is_scored(reward):
    """finding 40: a class, None or a number passed as a reward, and failed at every step."""
    with pytest.raises(RewardError, match="neither a name nor a function"):
        components([reward])
