"""The run folder: plain JSON, whole files, nothing a model wrote reaches a page unescaped."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import policy_cases as cases
import pytest
from report_pages import packed

from covo_rl.algo.advantage import Advantages, advantages
from covo_rl.config import LossConfig, RewardConfig
from covo_rl.data.files import file_sha256, json_line, json_lines, plain, read_json_lines
from covo_rl.engines.base import TextDecoder
from covo_rl.records.folder import Run, environment
from covo_rl.records.steps import StepShare, rollout_rows, step_metrics
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.run.report.page import report_page
from covo_rl.run.session import Session
from covo_rl.types import Example, Group, Prompt, RewardTable, Rollout


def test_plain_turns_numbers_into_json_and_nan_into_null():
    value = {"a": np.float64(1.5), "b": float("nan"), 3: (1, np.arange(2)), "c": float("inf"), "d": True}
    assert plain(value) == {"a": 1.5, "b": None, "3": [1, [0, 1]], "c": None, "d": True}


def test_functions_have_the_same_name_in_every_process():
    assert plain({"rewards": {report_page: 1.0}, "f": report_page}) == {
        "rewards": {"covo_rl.run.report.page.report_page": 1.0}, "f": "covo_rl.run.report.page.report_page"
    }  # fmt: skip


def test_metrics_come_back_in_order(tmp_path):
    run = Run(tmp_path)
    run.log_metrics({"step": 1, "reward_total": 0.5})
    run.log_metrics({"step": 2, "reward_total": float("nan")})
    assert run.metrics() == [{"step": 1, "reward_total": 0.5}, {"step": 2, "reward_total": None}]


def test_only_the_main_process_writes(tmp_path):
    run = Run(tmp_path / "run", active=False)
    run.log_metrics({"step": 1})
    run.write_config({"seed": 1})
    run.write_json("result.json", {})
    assert not (tmp_path / "run").exists()


def test_json_is_replaced_as_a_whole(tmp_path):
    run = Run(tmp_path)
    run.write_json("result.json", {"a": 1})
    run.write_json("result.json", {"a": 2})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 2}
    assert not list(tmp_path.glob("*.partial"))


def test_environment_names_versions_and_file_hashes(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    record = environment({"data": tmp_path / "rows.json"})
    assert record["packages"]["numpy"] == np.__version__
    # sha256 of the two bytes []
    assert record["sha256"]["data"] == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    assert record["sha256"]["data"] == file_sha256(tmp_path / "rows.json")


def test_report_escapes_what_the_model_wrote(tmp_path):
    run = Run(tmp_path)
    run.write_config({"seed": 1})
    evil = "<script>alert(1)</script>"
    metrics = {"step": 1, "reward_total": 1.0, "completion_length": 3, "zero_variance_groups": 0, "truncated": 0}
    run.log_metrics({**metrics, "reward_accuracy": 1.0})
    row = {"id": "a", "completion": evil, "answer": "x", "reward_total": 1.0, "advantage": 0.0}
    run.log_rollouts(1, [row])
    text = report_page(tmp_path)
    assert evil not in text
    content = packed(text)  # what its own scripts show as text: tests/test_report_browser.py
    assert content["groups"][0]["rollouts"][0]["completion"] == evil
    assert content["runs"][0]["metrics"][0]["reward_accuracy"] == 1.0


def test_json_lines_name_a_damaged_line_and_give_those_before_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "\u2028"}\n\n[1]\n'.encode() + b'\xff{"a"\n')
    lines = list(json_lines(path))
    assert [number for number, _, _ in lines] == [1, 3, 4]
    assert lines[0][1] == {"a": "\u2028"} and lines[1][1:] == (None, "expected an object, found list")
    assert lines[2][1] is None and lines[2][2].startswith("not JSON: 'utf-8' codec")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: expected an object"):
        list(read_json_lines(path))


def test_a_metric_that_a_reward_logs_is_averaged_over_ranks_by_their_rollouts():
    def share(rollouts, value):
        rewards_PG = np.ones((1, rollouts))
        table = RewardTable(("a",), np.ones(1), rewards_PG[..., None], rewards_PG, metrics={"speech": value})
        zeros, fives = np.zeros(rollouts), np.full(rollouts, 5.0)
        return StepShare(table, fives, zeros, zeros, fives, fives, np.ones(1), zeros)

    metrics = step_metrics([share(3, 1.0), share(3, 4.0)])
    assert metrics["speech"] == 2.5 and metrics["completion_length"] == 5.0
    assert metrics["reward_a"] == metrics["reward_total"] == 1.0 and metrics["zero_variance_groups"] == 0.0


# -- rows of rollouts --------------------------------------------------------------------------------------------


def _scored_groups(count=2, columns=None):
    example = {"id": "r", "question": "What?", "choices": ["bell", "dog"], "answer": "bell", **(columns or {})}
    texts = ["<think>It rings.</think><answer>bell</answer>", "dog"]
    groups = [group_from_completions(example_from_row(example), texts) for _ in range(count)]
    table = score(groups, RewardConfig())
    return groups, table, advantages(table, LossConfig())


def test_groups_are_numbered_over_the_ranks_of_a_step():
    """Rank 1 of three, of which rank 0 holds three groups: its own two are 3 and 4."""
    groups, table, shares = _scored_groups()
    seen = []
    observer = SimpleNamespace(measure=lambda metrics: None, record=seen.append)
    ranks = SimpleNamespace(rank=1, main=True, gathered=lambda value: [3, value, 1], joined=list)
    session: Any = SimpleNamespace(observers=[observer], ranks=ranks, decoder=None, record_seconds=0.0)
    session.rollout_rows = partial(Session.rollout_rows, session)
    batch: Any = SimpleNamespace(groups=groups, table=table, advantages=shares, version=0)
    Session._after_step(session, {"step": 7, "seconds": {}}, batch)
    rows = seen[0].rollouts
    assert [(row["group"], row["rollout"]) for row in rows] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert (
        rows[1]["rewards"]["consistency"] == 0.0
        and rows[1]["missing"] == {}
        and json_line(rows) == json_line(plain(rows))
    )


def test_a_column_with_a_name_of_ours_is_kept_and_scored_under_its_own(tmp_path):
    def by_length(completions, length, **columns):
        return [float(value == "long") for value in length]

    groups, _, _ = _scored_groups(1, {"length": "long", "group": "strings"})
    table = score(groups, rewards={by_length: 1.0})
    rows = rollout_rows(groups, table, advantages(table, LossConfig()))
    assert rows[0]["length"] == 0 and rows[0]["row/length"] == "long" and rows[0]["group"] == 0
    again = example_from_row(rows[0])
    assert again.columns["length"] == "long" and again.columns["group"] == "strings"
    group = group_from_completions(again, [row["completion"] for row in rows])
    assert score([group], rewards={by_length: 1.0}).rewards_PG.tolist() == table.rewards_PG.tolist() == [[1.0, 1.0]]


def test_log_probs_stand_beside_the_characters_that_their_tokens_wrote():
    """Of the tiny tokenizer a Chinese character is three tokens, each a byte: the last one has written it."""
    family = cases.family()
    decoder = TextDecoder(family)
    text = "<think>" + "the 你 \U0001f514" + "</think>"
    ids = (*family.tokenizer(text, add_special_tokens=False)["input_ids"], family.eos_token_ids[0], 10**6)
    counts = decoder.characters(ids, decoder(ids))
    assert decoder(ids) == text and counts and sum(counts) == len(text) and len(counts) == len(ids)
    assert counts[0] == len("<think>") and counts[-2:] == [0, 0]  # an end and an audio code have no text
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    bell = text.index("\U0001f514")  # four bytes: three times nothing, then the character
    assert ends.count(bell) == 4 and [counts[i] for i in range(len(ids)) if ends[i] == bell + 1] == [1]

    def row(logps):
        rollout = Rollout(ids, logps, text, "stop", answer="bell")
        group = Group(Prompt(Example("r", (), "What?"), (), "", ()), (rollout,))
        table = RewardTable((), np.ones(0), np.ones((1, 1, 0)), np.ones((1, 1)))
        shares = Advantages(np.zeros((1, 1)), np.zeros(1, dtype=bool), table.rewards_PG, {})
        return rollout_rows([group], table, shares, decoder=decoder)[0]

    assert row((-0.126,) * len(ids))["token_logps"] == [counts, [-13] * len(ids)]
    assert row((float("-inf"),) * len(ids))["token_logps"] is None
    assert row((0.0,) * len(ids))["length"] == len(ids) and row((0.0,) * len(ids))["parsed_answer"] == "bell"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_ids_a_policy_draws_their_characters_are_the_text(seed):
    family = cases.family()
    decoder, draws = TextDecoder(family), np.random.default_rng(seed)
    for _ in range(100):
        ids = draws.integers(0, len(family.tokenizer) + 5, size=40).tolist()
        counts = decoder.characters(ids, decoder(ids))
        assert counts is not None and sum(counts) == len(decoder(ids)) and len(counts) == 40 and min(counts) >= 0
    assert decoder.characters([ids[0]] * 3, "something else") is None
