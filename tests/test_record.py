"""The run folder: plain JSON, whole files, nothing a model wrote reaches a page unescaped."""

import json

import numpy as np
import pytest

from covo_rl.data.files import file_sha256, json_lines, plain, read_json_lines
from covo_rl.records.folder import Run, environment
from covo_rl.records.steps import StepShare, step_metrics
from covo_rl.run.report.page import report_page
from covo_rl.types import RewardTable


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
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "data:image/png;base64," in text


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
        return StepShare(table, np.full(rollouts, 5.0), np.zeros(rollouts), np.zeros(rollouts), np.ones(1))

    metrics = step_metrics([share(3, 1.0), share(3, 4.0)])
    assert metrics["speech"] == 2.5 and metrics["completion_length"] == 5.0
    assert metrics["reward_a"] == metrics["reward_total"] == 1.0 and metrics["zero_variance_groups"] == 0.0
