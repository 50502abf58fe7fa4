"""Stories with written endings and `--model`: log-probs of each ending, against sampling's own."""

import json

import pytest
from speech_layouts import write_layout

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig, RolloutConfig
from covo_rl.data.files import read_record
from covo_rl.evaluate.answer import PolicyAnswerer
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.endings import EndingScorer
from covo_rl.evaluate.speech.generate import AS_WRITTEN
from covo_rl.evaluate.speech.rows import SpeechItem, SpokenRound
from covo_rl.models import load_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy import Policy
from covo_rl.types import Example


@pytest.fixture(scope="module")
def answerer():
    clips = ClipStore()
    policy = Policy(load_family(resolve_model("builtin:tiny"), dtype="float32"), clips=clips)
    return PolicyAnswerer(
        policy, clips, PromptConfig(instruction=""), RolloutConfig(max_completion_length=6), AS_WRITTEN
    )


def test_the_log_probs_of_an_ending_are_those_with_which_it_is_sampled(answerer):
    example = Example("tsc-t2t/s", (), "a bell and a dog")
    (group,) = answerer.answer([example], greedy=True, num_generations=1, seed=0)
    said = group.rollouts[0]
    text, ids = said.text, said.completion_ids[: -(said.stop_reason == "stop") or None]
    rounds = (SpokenRound(text="a bell and a dog"), SpokenRound(text=text), SpokenRound(text="zq zq zq"))
    row = SpeechItem("s", "0000", "tsc-t2t", "tsc", rounds, "en")
    scorer = EndingScorer(answerer, {example.id: row})
    assert scorer._endings(example)[0] == ids, "or the test compares other ids"
    (record,) = scorer.examine([example], [0.0])
    assert record["logps"][0] == pytest.approx(said.logps[: len(ids)], abs=1e-4)
    right, wrong = (sum(logps) / len(logps) for logps in record["logps"])
    assert right > wrong and not scorer.length_problems([example])


def test_a_story_is_scored_and_candidates_in_audio_are_not(tmp_path, answerer):
    data = write_layout("spoken-lm", tmp_path / "data")
    request = Request(set_="spoken-lm", data=data, model="builtin:tiny", output=tmp_path / "out")
    run_request(request, answerer=answerer, quiet=True)
    report = read_record(tmp_path / "out/report.json")
    assert list(report["subsets"]) == ["tsc-a2t", "tsc-t2t"]
    for row in map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines()):
        right, wrong = (sum(logps) / len(logps) for logps in row["logps"])
        block = report["subsets"][row["id"].split("/")[0]]
        assert (block["score"], block["missing"]) == (100 if right > wrong else 0, 0)
    assert {row["not_comparable"] for row in report["published"] if row["ours"] is not None} <= {
        "chat format",
        "partial",
    }
    text = " ".join(report["problems"])
    assert "swuggy was not asked, as it is scored by log-probs of audio codes" in text and "chat format" in text
    with pytest.raises(EvalInputError, match="log-probs, which has no use for --sample, --num-generations, --voice"):
        run_request(Request(set_="spoken-lm", data=data, model="builtin:tiny", output=tmp_path / "b", voice="v",
                            greedy=False, num_generations=2))  # fmt: skip
