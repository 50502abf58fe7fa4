"""One grammar: what is wrong is said precisely; a row becomes a prompt with exactly its audio slots."""

import numpy as np
import pytest

from covo_rl.config import PromptConfig
from covo_rl.prompt import PromptError, build_prompt, messages, option_letter, parse, reference_completion
from covo_rl.types import Clip, Example

GOOD = "<think>It rings.</think><answer>bell</answer>"


@pytest.mark.parametrize(
    "text", [GOOD, f"  {GOOD}\n", GOOD.replace("><answer", ">\n\n<answer"), GOOD.replace("bell", "b < c")]
)
def test_the_grammar_is_accepted(text):
    assert parse(text).ok


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <think> block"),
        ("<answer>bell</answer>", "no <think> block"),
        ("<think>It rings.</think>", "no <answer> block"),
        (f"{GOOD}<answer>bell</answer>", "<answer> is repeated: 2 times"),
        (f"<think>a</think>{GOOD}", "<think> is repeated: 2 times"),
        ("<think>a<think>b</think></think><answer>c</answer>", "<think> is nested in <think>"),
        ("<think>a <answer>c</answer></think>", "<answer> is nested in <think>"),
        ("<answer>a <think>c</think></answer>", "<think> is nested in <answer>"),
        ("<answer>bell</answer><think>It rings.</think>", "out of order: <answer> comes before <think>"),
        (f"Well. {GOOD}", "text outside the blocks: 'Well.'"),
        (f"{GOOD} Done.", "text outside the blocks: 'Done.'"),
        ("<think>a</think> so <answer>b</answer>", "text outside the blocks: 'so'"),
        ("<think>It rings.<answer>bell</answer>", "<think> is not closed"),
        ("<think>It rings.</think><answer>bell", "<answer> is not closed"),
        ("It rings.</think><answer>bell</answer>", "</think> comes without <think> before it"),
        ("</think><think><answer>bell</answer>", "</think> comes without <think> before it"),
        ("<think> </think><answer>bell</answer>", "the <think> block is empty"),
        ("<think>a</think><answer>\n</answer>", "the <answer> block is empty"),
        ("<THINK>a</THINK><answer>b</answer>", "no <think> block"),
    ],
)
def test_what_is_wrong_is_named(text, problem):
    assert problem in parse(text).problems


def test_a_completion_cut_by_length_says_so():
    cut = parse("<think>It ri", stop_reason="length")
    assert set(cut.problems) == {"no <answer> block", "<think> is not closed", "cut by the length limit"}
    assert parse(GOOD, "length").problems == ("cut by the length limit",)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>bell</answer>", "bell"),  # graded although its form is broken
        (f"Well. {GOOD}", "bell"),
        (f"{GOOD}<answer>bell</answer>", None),  # two answers are none
        ("<think>a <answer>c</answer></think>", None),  # an answer in the reasoning is none
        ("<think>a <answer>c</answer>", None),
        ("<answer>bell", None),
    ],
)
def test_which_answer_is_read(text, answer):
    assert parse(text).answer == answer


def test_reference_completion_is_the_inverse_of_parse():
    parsed = parse(reference_completion("a\nb", "c, d"))
    assert (parsed.think, parsed.answer, parsed.ok) == ("a\nb", "c, d", True)
    with pytest.raises(ValueError, match="think=''"):
        reference_completion("", "c")
    with pytest.raises(ValueError, match="repeated"):
        reference_completion("a</think><think>", "c")


def test_option_letters_go_on_after_z():
    assert [option_letter(i) for i in (0, 3, 25, 26, 27, 51, 52)] == ["A", "D", "Z", "AA", "AB", "AZ", "BA"]


def row(clips=1, question="What rings?"):
    clip = Clip(array=np.zeros(4), sampling_rate=4)
    return Example("r7", (clip,) * clips, question, ("bell", "knock"), "bell")


def test_messages_hold_one_audio_part_per_clip_then_the_text():
    config = PromptConfig(system_prompt="Listen.", instruction="Think.")
    system, user = messages(row(clips=2), config)
    assert system["content"][0]["text"] == "Listen."
    assert [part["type"] for part in user["content"]] == ["audio", "audio", "text"]
    assert user["content"][2]["text"] == "What rings?\nA. bell\nB. knock\nThink."
    config.choice_style, config.system_prompt = "inline", None
    assert messages(row(clips=0), config)[0]["content"][0]["text"] == "What rings?\nChoose one of: bell; knock.\nThink."
    config.choice_style = "circles"
    with pytest.raises(PromptError, match="letters, lines, inline"):
        messages(row(), config)


class Family:
    """Three slots per clip; ids are character codes, 0 is the audio id."""

    audio_token_id = 0
    wrong = 0

    def __init__(self):
        self.counted = 0

    def clip_slots(self, waveform, sampling_rate):
        self.counted += 1
        return 3

    def render(self, chat):
        return "".join("#" if part["type"] == "audio" else part["text"] for part in chat[-1]["content"])

    def tokenize(self, text, slots):
        ids, left = [], list(slots)
        for ch in text:
            ids += [0] * (left.pop(0) + self.wrong) if ch == "#" and left else [ord(ch)]
        return ids


class Clips:
    def key(self, clip):
        return "k"

    def waveform(self, key):
        return np.zeros(4, np.float32), 4


def test_build_expands_the_slots_and_measures_a_clip_once():
    family = Family()
    prompt = build_prompt(row(clips=2), family, Clips(), PromptConfig())
    assert prompt.slots == (3, 3) and prompt.input_ids.count(0) == 6 and prompt.clip_keys == ("k", "k")
    build_prompt(row(), family, Clips(), PromptConfig())
    assert family.counted == 1


def test_a_prompt_with_other_slots_than_features_names_the_row():
    family = Family()
    family.wrong = 1
    with pytest.raises(PromptError, match="row r7: the prompt has 4 audio positions, its 1 clips need 3"):
        build_prompt(row(), family, Clips(), PromptConfig())
