"""Groups of a run that learns when to speak, in the report: what its rows say of times, checked, beside its sound."""

import json

import numpy as np
import pytest
import report_contract
import torch
from report_pages import harmful, packed, payload, timed

from covo_rl.duplex.features import FeatureStream, Sound
from covo_rl.duplex.records import TimingSounds, timing_rows
from covo_rl.records.folder import Run
from covo_rl.run.report.page import render, report_page
from covo_rl.run.report.payload import report_payload

STREAM = FeatureStream(
    id="one", kind="pause", first_chunk=0, decisions=12, chunks=12, turn_end=1.0, pauses=((0.3, 0.7),), cue="word",
    sounds=(Sound(0.1, 0.3, 10), Sound(0.7, 1.0, 5)), shift_chunk=9, gold_stop=9,
)  # fmt: skip
TOTALS = np.array([0.0] * 6 + [2.0] * 6 + [0.0])


def step_rows(sounds=None):
    """SHIFT in chunks 3 (early), 7, 7, never."""
    stops_PG, parts = np.array([[3, 7, 7, 12]]), [{"early_response": TOTALS / 2, "turn_taking": TOTALS / 2}]
    return timing_rows([STREAM], [torch.zeros(12)], [TOTALS], stops_PG, np.zeros((1, 4)), parts, sounds=sounds)


def made_run(folder, rows, **result):
    folder.mkdir(exist_ok=True)
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    (folder / "result.json").write_text(json.dumps(result))
    Run(folder).log_rollouts(1, rows)
    return folder


def payload_of(folder):
    content = report_payload([folder])
    assert report_contract.problems(content) == []
    return content


def notes_of(content):
    return [*content["notes"], *content["runs"][0]["notes"]]


def test_a_step_of_stops_is_there_with_its_times_its_flags_and_its_sound(tmp_path):
    sounds = {"one": TimingSounds(tmp_path / "run").keep(STREAM, 7)}
    content = payload_of(made_run(tmp_path / "run", step_rows(sounds), after={"early_long_pause": 0.3}))
    (group,), (clip,) = content["groups"], content["clips"].values()
    assert group["timing"]["hazards"] == [0.5] * 12 and group["timing"]["pauses"] == [[0.3, 0.7]]
    assert [turn["text"] for turn in group["timing"]["turns"]] == ["and", "five"]
    assert [rollout["time"] for rollout in group["rollouts"]] == [0.64, 1.28, 1.28, None]
    assert [rollout["flags"] for rollout in group["rollouts"]] == [["early_answer"], [], [], ["no_answer", "longest"]]
    assert group["rollouts"][1]["speech"] == pytest.approx([9 * 0.16 + 0.0128, None], abs=1e-4)
    assert group["columns"] == {"cue": "word"} and group["answer"] == "SHIFT after 1.00 s"
    assert clip["name"] == "one, SHIFT at 1.28 s" and clip["src"] and clip["seconds"] == 1.92
    assert content["runs"][0]["result"] == {"after": {"early_long_pause": 0.3}}
    assert not any("evaluated" in note for note in notes_of(content))


@pytest.mark.parametrize(
    "timing",
    [7, {}, {"seconds": 3}, {"seconds": -1, "hazards": [], "turns": [], "pauses": [], "first_chunk": 0},
     {"seconds": 3, "hazards": [0.5] * 30_000, "turns": [], "pauses": [], "first_chunk": 0}],
)  # fmt: skip
def test_a_timing_that_cannot_be_drawn_is_said_and_its_rollouts_are_shown(timing, tmp_path):
    content = payload_of(made_run(tmp_path / "run", [{**row, "timing": timing} for row in step_rows()]))
    assert "timing" not in content["groups"][0] and len(content["groups"][0]["rollouts"]) == 4
    assert "1 groups have a `timing` that cannot be drawn" in notes_of(content)


def test_parts_that_cannot_be_drawn_are_counted_and_the_others_stay(tmp_path):
    whole = step_rows()[0]["timing"]
    broken = {"hazards": [0.5, "x", 3.0], "pauses": [[1, 2], [2, 1], 5, [1, None]], "turns": [{"channel": "dog"}]}
    content = payload_of(made_run(tmp_path / "run", [{**row, "timing": whole | broken} for row in step_rows()]))
    timing = content["groups"][0]["timing"]
    assert (timing["hazards"], timing["pauses"], timing["turns"]) == ([0.5, None, None], [[1, 2]], [])
    assert any(note.startswith("6 parts of timelines cannot be drawn") for note in notes_of(content))


def test_the_page_holds_it_as_it_is(tmp_path):
    content = timed(harmful(payload(steps=1, groups=2, rollouts=4)))
    assert report_contract.problems(content) == [] and packed(render(content)) == content
    folder = made_run(tmp_path / "run", step_rows())
    assert packed(report_page(folder))["groups"][0]["timing"] == payload_of(folder)["groups"][0]["timing"]
