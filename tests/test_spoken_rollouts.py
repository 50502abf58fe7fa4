"""Rollouts that hold text and audio codes: what is text, what are codes, and who gets which."""

import dataclasses
import json

import policy_cases as cases
import pytest

from covo_rl.config import RewardConfig
from covo_rl.engines.base import TextDecoder, rollout_of
from covo_rl.engines.own import sample
from covo_rl.models.text import text_ids
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.rows import score_rows
from covo_rl.rewards.scoring import components
from covo_rl.rewards.specs import RewardError

CODES = 16


@pytest.fixture(scope="module")
def speaker():
    """A policy whose family has 16 audio codes."""
    return cases.policy(sizes={"audio_codes": CODES})


def spoken_ids(family, text: str, codes: list[int]) -> list[int]:
    """The ids of a text with the codes in its middle, and an end."""
    first, ids = family.code_ids.start, text_ids(family.tokenizer, text)
    return [*ids[:2], *(first + code for code in codes), *ids[2:], family.eos_token_ids[0]]


def test_a_family_without_codes_has_none_and_one_with_codes_counts_from_0(speaker):
    assert speaker.family.code_ids == range(300, 316)
    assert not cases.family().code_ids and not cases.family("qwen2_audio").code_ids


def test_text_is_what_stands_without_the_codes_and_codes_what_stands_without_the_text(speaker):
    text = "<think>the bell</think><answer>bell</answer>"
    ids = spoken_ids(speaker.family, text, [0, 15, 7])
    rollout = rollout_of(ids, [-1.0] * len(ids), "stop", TextDecoder(speaker.family), 2)
    assert (rollout.text, rollout.codes, rollout.answer) == (text, (0, 15, 7), "bell")
    assert sum(TextDecoder(speaker.family).characters(ids, text) or ()) == len(text)


def test_codes_that_the_tokenizer_knows_too_are_codes(monkeypatch):
    """Some checkpoints give their codes names in the tokenizer: `<|audio_17|>` is no text of a reply."""
    family = cases.family()
    text = text_ids(family.tokenizer, "a dog")
    monkeypatch.setattr(type(family), "code_ids", range(290, 300))
    decoder = TextDecoder(family)
    assert decoder([*text, 290, 299]) == "a dog" and decoder.codes([*text, 290, 299]) == (0, 9)
    assert decoder.characters([*text, 290, 299], "a dog")[-2:] == [0, 0]


def test_sampled_replies_carry_their_codes(speaker):
    prompts = cases.prompts(speaker, seconds=((0.6,), ()))
    config = dataclasses.replace(cases.SMALL, max_completion_length=40)
    groups = sample(speaker, prompts, speaker.features(prompts), config, seed=3)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        assert rollout.codes == tuple(i - 300 for i in rollout.completion_ids if i >= 300)
    assert any(rollout.codes for rollout in rollouts)
    assert reward_columns(groups)["completion_codes"] == [list(rollout.codes) for rollout in rollouts]


def test_a_row_of_that_name_arrives_under_another_and_codes_of_a_file_are_checked(tmp_path):
    example = example_from_row({"id": "a", "choices": [], "completion": "x", "completion_codes": [1, 2]})
    assert "completion_codes" not in example.columns
    own = dataclasses.replace(example, columns={"completion_codes": "mine"})
    columns = reward_columns([group_from_completions(own, ["x"], completion_codes=[1, 2])])
    assert (columns["completion_codes"], columns["row_completion_codes"]) == ([[1, 2]], ["mine"])

    plugin = tmp_path / "p.py"
    plugin.write_text(
        "def f(completions, completion_codes, **kw):\n    return [sum(c) / 10 for c in completion_codes]\n"
    )
    spec = f"{plugin}:f"
    row = {"id": "a", "choices": [], "completion": "x"}

    def scored(**more):
        return score_rows(
            [{**row, **more}], RewardConfig(rewards=spec), components(spec), tmp_path / "rows.jsonl"
        ).totals

    assert scored(completion_codes=[1, 2]) == [0.3]
    with pytest.raises(RewardError, match="row 1: .* hears the reply, and the row has no list `completion_codes`"):
        scored()
    for wrong in ("12", [1, -2], [True], [1.0], 7):
        with pytest.raises(RewardError, match="not a list of numbers from 0 on"):
            scored(completion_codes=json.loads(json.dumps(wrong)))
