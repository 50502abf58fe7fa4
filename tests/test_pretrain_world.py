"""The tiny world: a language whose next line can be known, voices apart, and what its chain of trainings must show."""

import json
from itertools import pairwise

import numpy as np
import pytest

from covo_rl.data.files import read_json_lines
from covo_rl.synth.counting import (
    COUNTED,
    NAMES,
    NEW,
    NEW_MELODY,
    UTTERANCES,
    counting_lines,
    dull_line,
    hesitant,
    new_talker,
    number_line,
    questions,
    talkers,
    text_line,
    written_digits,
)
from covo_rl.synth.speech import DIGITS

DIGIT = {word: value for value, word in enumerate(DIGITS)}


def digits_of(line: str) -> list[int]:
    return [DIGIT[word.strip(",.")] for word in line.split()]


def test_lines_count_on_from_one_to_the_next():
    for seed in range(20):
        lines = counting_lines(np.random.default_rng(seed))
        digits = [digit for line in lines for digit in digits_of(line)]
        assert len(lines) == UTTERANCES and len(digits) == UTTERANCES * COUNTED
        assert len({(b - a) % 10 for a, b in pairwise(digits)}) == 1
        assert len(set(digits)) >= COUNTED  # five digits say where it goes on: none comes twice in them


def test_every_question_has_the_answer_that_arithmetic_gives():
    answers = dict(questions())
    assert len(answers) == len(questions()) == 100
    assert answers["What comes after nine?"] == "zero." and answers["What comes before zero?"] == "nine."
    assert answers["Count from three by four."] == written_digits([3, 7, 1, 5, 9]) == "three seven one, five nine."


def test_what_is_hesitant_says_the_same():
    line = "three three one, nine."
    said = hesitant(line, np.random.default_rng(3)).split()
    kept = [word for word in said if word != "um"]
    assert len(kept) >= 4 and [word for i, word in enumerate(kept) if i == 0 or word != kept[i - 1]] == [
        "three", "one", "nine",
    ]  # fmt: skip


def test_a_talker_has_one_melody_and_pauses_where_a_phrase_ends():
    anna = talkers("train", 3, NAMES)[0]
    said = anna.say("two four six, eight.", np.random.default_rng(0))
    assert anna.name == "anna" and set(said.tones) == {anna.melody} and said.text == "two four six, eight."
    assert [word for word, _, _ in said.words] == ["two", "four", "six,", "eight."]
    pauses = [b[1] - a[2] for a, b in pairwise(said.words)]
    assert max(pauses[:2]) <= 0.12 and 0.25 <= pauses[2] <= 0.4


def test_nobody_else_has_the_new_voice_or_its_melody():
    new = new_talker(0)
    others = [*talkers("train", 0, NAMES), *talkers("test", 0)]
    assert new.melody == NEW_MELODY not in {talker.melody for talker in others}
    assert new.name == NEW not in {talker.name for talker in others}
    assert len({talker.speaker.f0_hz for talker in [new, *others]}) == len(others) + 1


def test_lines_are_as_long_as_they_should_be():
    rng = np.random.default_rng(0)
    assert {len(digits_of(dull_line(rng))) for _ in range(20)} == {COUNTED}
    assert {len(digits_of(number_line(rng))) for _ in range(100)} == {2, 3, 4}
    kinds = [text_line(rng) for _ in range(200)]
    assert any("um" in text for text in kinds) and any("What comes" in text for text in kinds)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from covo_rl.speech.tokenizer import SpeechTokenizer
    from covo_rl.supervised.pretrain.world import WorldSizes, write_world

    folder = tmp_path_factory.mktemp("world")
    ones = (
        "text",
        "numbers",
        "counting",
        "recordings",
        "voices_lines",
        "test_numbers",
        "test_counting",
        "test_dialogues",
    )
    sizes = WorldSizes(**dict.fromkeys((*ones, "asked_words", "asked_voices"), 1), dialogues=2, voices=9)
    return write_world(folder, SpeechTokenizer.from_pretrained("builtin:speech_tokenizer"), 5, sizes)


def test_rows_of_the_world_are_whole_and_voices_of_tests_apart(world):
    from covo_rl.speech.rows import read_speech_rows, recording_problems
    from covo_rl.supervised.pretrain.dialogue_rows import read_dialogues

    names = ("numbers", "counting", "recordings", "voices", "test_numbers", "test_counting")
    rows = {name: read_speech_rows(world[name], needs=("audio", "text", "words", "codes")) for name in names}
    assert not [problem for part in rows.values() for problem in recording_problems(part)]
    heard, unheard = ({row.speaker for name in names if name.startswith("test_") == test for row in rows[name]}
                      for test in (False, True))  # fmt: skip
    assert not heard & unheard and {row.speaker for row in rows["recordings"]} == {NEW}
    assert [row.position for row in rows["counting"]][:UTTERANCES] == list(range(UTTERANCES))
    dialogues = read_dialogues(world["dialogues"])
    assert [len(row.recordings) for row in dialogues] == [0, 1]
    assert all(row.speaker in NAMES for row in dialogues)


def test_a_row_depends_on_its_number_alone(world, tmp_path):
    from covo_rl.supervised.pretrain.world import _numbers

    voices = talkers("train", 5, NAMES)[:9]
    first = next(read_json_lines(world["numbers"]))
    row, said = next(_numbers("numbers", 1, voices, 5))
    assert (row["id"], row["speaker"], said.text) == (first["id"], first["speaker"], first["text"])


def test_a_control_changes_what_it_is_for_and_nothing_else(tmp_path):
    from covo_rl.supervised.pretrain.demo import CONTROLS, RUNS, configuration_of

    made = {name: configuration_of(run, tmp_path) for name, run in {**RUNS, **CONTROLS}.items()}
    with_voice, without = made["speaker"], made["speaker_no_voice"]
    assert [without["tasks"][name]["weight"] for name in ("general", "dialogue", "pseudo_dialogue")] == [0.5, 0.2, 0]
    assert without["steps"] == with_voice["steps"] * 7 / 10  # of dialogues as many tokens
    assert made["speaker_text_taught"] == with_voice and CONTROLS["speaker_text_taught"].options == {"text_loss": True}
    mixed, plain = (made[name]["stage_2"] for name in ("stage_2", "stage_2_plain"))
    assert mixed["tasks"].pop("interleave_1") and mixed["tasks"].pop("interleave_2")
    assert plain["tasks"].pop("interleave_1") == plain["tasks"].pop("interleave_2") == {"weight": 0}
    assert plain == mixed  # the task of going on stays, and the steps
    assert made["stage_1"]["tasks"]["asr"]["data"][0] == f"{tmp_path}/numbers.jsonl"


def test_what_has_no_voice_has_no_pitch():
    from covo_rl.supervised.pretrain.voice_figures import _voiced

    tone = 0.3 * np.sign(np.sin(2 * np.pi * 150 * np.arange(24_000) / 24_000)).astype(np.float32)
    assert _voiced([np.zeros(24_000, dtype=np.float32)]) == []
    assert _voiced([tone, np.zeros(24_000, dtype=np.float32)]) == [pytest.approx(150, rel=0.02)]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two minutes of a core that nothing else wants
def test_a_short_chain_learns_to_hear_while_the_decoder_stays_as_it_is(tmp_path):
    """Minutes: a small world, short trainings; the figures of the whole are in benchmarks/results."""
    from covo_rl.supervised.pretrain.demo import run_pretrain_demo
    from covo_rl.supervised.pretrain.world import WorldSizes

    sizes = WorldSizes(text=2000, numbers=120, counting=20, dialogues=24, recordings=12, voices_lines=6,
                       asked_words=1, asked_voices=1, test_numbers=20, test_counting=6, test_dialogues=6)  # fmt: skip
    steps = {"text_model": 120, "stage_1": 60, "stage_2": 60, "speaker": 10}
    figures = run_pretrain_demo(tmp_path / "demo", seed=3, sizes=sizes, steps=steps)
    before, after, then = (figures[f"measured/{name}"] for name in ("base", "stage_1", "stage_2"))
    assert after["asr_loss"] < before["asr_loss"] - 0.5
    assert figures["stage_1"]["frozen"] == ["encoder", "llm", "lm_head"]
    assert figures["stage_2"]["frozen"] == ["encoder"]
    assert then["tts_loss"] < after["tts_loss"] - 0.5  # codes, which stage 1 never wrote
    assert then["continued_text_loss"] < after["continued_text_loss"]
    assert set(json.loads((tmp_path / "demo" / "figures.json").read_text())) == set(figures)
    # what is finished is not repeated
    assert run_pretrain_demo(tmp_path / "demo", seed=3, sizes=sizes, steps=steps) == figures
