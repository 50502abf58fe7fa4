"""Rollouts that hold text and audio codes: what is text, what are codes, and who gets which."""

import dataclasses
import json

import numpy as np
import policy_cases as cases
import pytest

from covo_rl.algo.advantage import Advantages
from covo_rl.config import RewardConfig
from covo_rl.engines import vllm_requests
from covo_rl.engines.base import TextDecoder, rollout_of
from covo_rl.engines.own import sample
from covo_rl.evaluate.records import judge_groups
from covo_rl.evaluate.sets import load_set
from covo_rl.models.text import text_ids
from covo_rl.records.steps import rollout_rows
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.rows import score_rows
from covo_rl.rewards.scoring import components
from covo_rl.rewards.specs import RewardError
from covo_rl.train.checkpoint.state import pack_groups, unpack_groups
from covo_rl.types import Group, RewardTable

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


@pytest.mark.parametrize("packable", [True, False])
def test_sampled_replies_carry_their_codes(speaker, packable, monkeypatch):
    monkeypatch.setattr(type(speaker.family), "packable", packable)
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
    with pytest.raises(RewardError, match="hears the reply, and the row has no list `completion_codes`"):
        scored()
    for wrong in ("12", [1, -2], [True], [1.0], 7):
        with pytest.raises(RewardError, match="not a list of numbers from 0 on"):
            scored(completion_codes=json.loads(json.dumps(wrong)))


def test_replies_of_vllm_carry_their_codes(speaker):
    prompt = cases.prompts(speaker, seconds=((0.6,),))[0]
    ids = tuple(spoken_ids(speaker.family, "a bell", [3, 4]))
    completions = [vllm_requests.Completion(ids, (-0.5,) * len(ids), "stop")]
    group = vllm_requests.group_of(
        prompt, prompt.input_ids, completions, limit=32, decoder=TextDecoder(speaker.family), version=0
    )
    assert (group.rollouts[0].text, group.rollouts[0].codes) == ("a bell", (3, 4))


def test_a_checkpoint_and_the_rollouts_file_hold_the_codes(speaker):
    prompt = cases.prompts(speaker, seconds=((0.6,),))[0]
    ids = spoken_ids(speaker.family, "a bell", [3, 4])
    spoken = rollout_of(ids, [-1.0] * len(ids), "stop", TextDecoder(speaker.family), 0)
    silent = rollout_of([*ids[:2], ids[-1]], [-1.0] * 3, "stop", TextDecoder(speaker.family), 0)
    group = Group(prompt, (spoken, silent))
    about = json.loads(json.dumps(pack_groups([group])))
    assert unpack_groups(about, lambda name: prompt) == [group]
    for rollout in about[0]["rollouts"]:
        del rollout["codes"]  # of an older version
    assert [r.codes for r in unpack_groups(about, lambda name: prompt)[0].rollouts] == [(), ()]
    table = RewardTable((), np.zeros(0), np.zeros((1, 2, 0)), np.zeros((1, 2)))
    rows = rollout_rows([group], table, Advantages(np.zeros((1, 2)), np.zeros(1, bool), np.zeros((1, 2)), {}))
    assert [row["completion_codes"] for row in rows] == [[3, 4], []]


def test_an_evaluation_keeps_the_codes_of_replies_that_have_any(speaker):
    ids = spoken_ids(speaker.family, "<think>a</think><answer>bell</answer>", [3, 4])
    reply = rollout_of(ids, [-1.0] * len(ids), "stop", TextDecoder(speaker.family), 0)
    for rollout, codes in ((reply, [[3, 4]]), (dataclasses.replace(reply, codes=()), None)):
        group = Group(cases.prompts(speaker, seconds=((),))[0], (rollout,))
        record = judge_groups([group], [None], load_set("builtin"), None)[0]
        assert record.get("completion_codes") == codes and record["answer_prediction"] == "bell"
