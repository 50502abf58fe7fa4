"""The speech sets in eval_sets/: what each says of itself, its parts, its published scores; `covo-rl eval --list`."""

import pytest
from typer.testing import CliRunner

from covo_rl.evaluate.cli import app
from covo_rl.evaluate.sets import FILES, EvalInputError, EvalSet, letter_set, load_set
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet

SPEECH = [name for name in FILES if isinstance(load_set(name), SpeechSet)]


@pytest.mark.parametrize("name", SPEECH)
def test_every_speech_set_says_what_it_must(name):
    found = load_set(name)
    assert found.name == name
    for value in (found.title, found.source, found.licence, found.how_to_get, found.version, found.subsets):
        assert value
    names = [subset.name for subset in found.subsets]
    assert len(set(names)) == len(names)
    assert {subset.kind for subset in found.subsets} <= set(KINDS)
    assert all(subset.path for subset in found.subsets)
    scored = [*(subset.published for subset in found.subsets), *found.published.values()]
    assert {model for by_model in scored for model in by_model} == set(found.published_in), "a score without its source"


def test_uro_bench_has_forty_sets_in_twelve_cells():
    uro = load_set("uro-bench")
    assert len(uro.subsets) == 40
    cells = {subset.groups for subset in uro.subsets}
    assert len(cells) == 12
    assert {ability for ability, _, _ in cells} == {"understanding", "reasoning", "oral"}
    rows = {subset.name: subset.rows for subset in uro.subsets}
    assert (rows["GaokaoEval"], rows["Multilingual"], rows["SRT-zh"]) == (303, 1108, 25)
    kinds = {subset.name: subset.kind for subset in uro.subsets}
    assert kinds["Repeat-zh"] == "uro_wer"
    assert kinds["CodeSwitching-zh"] == "uro_semi_open"
    assert kinds["MuChoEval-en"] == "uro_qa"
    gaokao = next(subset for subset in uro.subsets if subset.name == "GaokaoEval")
    assert gaokao.published["Covo-Audio-Chat"] - gaokao.published["Covo-Audio-Chat-FD"] == pytest.approx(15.29)


def test_means_of_published_scores_are_the_published_means():
    """The board's overall score is the mean over the ten basic sets, so a misplaced number would show."""
    uro = load_set("uro-bench")
    for cell in ("en", "zh"):
        for model, mean in uro.published[f"basic_{cell}"].items():
            parts = [s.published for s in uro.subsets if set(s.groups) >= {"basic", cell}]
            scores = [by_model[model] for by_model in parts if model in by_model]
            if len(scores) == 10:
                assert sum(scores) / 10 == pytest.approx(mean, abs=0.006), (model, cell)
            else:  # the one that is left out would have to be 69, where the board says 96
                assert (model, cell, 10 * mean - sum(scores)) == ("GLM-4-Voice", "zh", pytest.approx(69, abs=0.06))
    air = load_set("air-bench").published
    assert sum(by_model["Covo-Audio"] for by_model in air.values()) / 5 == pytest.approx(80.86, abs=0.005)


def test_rows_of_a_set_are_those_of_its_parts_where_they_are_known():
    assert load_set("full-duplex-bench").row_count == 216 + 137 + 119 + 55 + 200 + 200 + 99 + 100 + 100
    assert load_set("mmau-pro").row_count == 5305
    assert load_set("vstyle").row_count is None


def test_a_name_or_a_group_asks_for_a_part():
    uro = {subset.name: subset for subset in load_set("uro-bench").subsets}
    assert uro["Repeat"].is_asked(())
    assert uro["Repeat"].is_asked(["basic"])
    assert not uro["Repeat"].is_asked(["pro", "GaokaoEval"])


def test_a_set_of_letters_is_not_one_of_speech():
    assert isinstance(letter_set("mmau-test-mini"), EvalSet)
    with pytest.raises(EvalInputError, match="URO-Bench is a set of speech"):
        letter_set("uro-bench")


def test_the_list_names_every_set_its_engines_and_its_scores():
    shown = CliRunner().invoke(app, ["--list"])
    assert shown.exit_code == 0
    lines = [line for line in shown.output.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert set(rows) >= set(FILES)
    assert "| 5,000 |" in rows["mmsu"]
    assert "letter" in rows["mmsu"]
    engines = ("--judge", "--audio-judge", "--transcriber", "[--scorer-model utmos]")
    assert all(flag in rows["uro-bench"] for flag in engines)
    assert rows["uro-bench"].endswith("| 105 |"), "ten sets in two languages of five models but one, and six means"


def test_the_list_of_one_set_names_its_parts():
    shown = CliRunner().invoke(app, ["--list", "--set", "uro-bench"]).output
    assert "GaokaoEval | uro_qa | 303 | en | understanding, basic, en" in shown
    assert "share of Yes x 100" in shown
    assert "wordings: covo, official" in CliRunner().invoke(app, ["--list", "--set", "mmar"]).output
    wrong = CliRunner().invoke(app, ["--list", "--set", "uro"])
    assert wrong.exit_code == 2
