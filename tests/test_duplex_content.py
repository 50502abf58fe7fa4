"""What is said after a stop: decoded as without a cache, as a session says it, once per stop, and what it earns."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from duplex_cases import FixedFeatures, duplex_family

from covo_rl.config import ConfigError
from covo_rl.data.files import read_record
from covo_rl.duplex.config import duplex_options
from covo_rl.duplex.content import ReplyReader, decode_replies, later_features
from covo_rl.duplex.features import FUNCTION_WORD, draw_streams
from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.machine import Legal, legal_masks
from covo_rl.duplex.questions import FeatureWorld, TimingQuestion
from covo_rl.duplex.recording import spoken_replies
from covo_rl.duplex.records import timing_rows
from covo_rl.duplex.rollout import StopRewards, TimingStream, greedy_stop
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.supervised import supervised_loss
from covo_rl.duplex.training import TimingTrainer, question_logits
from covo_rl.duplex.trunk import listening_trunk, path_states
from covo_rl.policy import Policy
from covo_rl.resolve import find
from covo_rl.rewards import components, lint, load_reward
from covo_rl.rewards.duplex_lint import check_timing, policy_shares
from covo_rl.rewards.rules.turns import stop_columns
from covo_rl.rewards.specs import RewardError
from covo_rl.run.timing import run_timing
from covo_rl.supervised.duplex_stage import new_duplex_family
from covo_rl.synth.speech import DIGITS
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import TrainingStopped
from covo_rl.types import UserError

CONFIG = find("recipes", "configs/tiny_duplex.yaml")
TIMED = "early_response,turn_taking,response_delay,barge_in,back_channel,hold_floor"
SMALL = {"prompts_per_step": 6, "micro_batch_prompts": 4, "max_steps": 4, "duplex_width": 32, "rl_streams": 12,
         "test_streams": 12, "sft_streams": 40, "sft_steps": 3, "sft_batch": 4, "num_generations": 4,
         "rewards": f"{TIMED},content", "timing_estimator": "sampled", "reply_seconds": 0.5}  # fmt: skip
FAMILY, IDS = duplex_family()


def small(**more):
    return duplex_options({str(CONFIG): yaml.safe_load(CONFIG.read_text()), "test": {**SMALL, **more}})


def question(chunks, seed, turn_end=0.3, prefix=(40, 41, 42), features=None):
    stream = TimingStream(id=f"q{seed}", kind="single", first_chunk=0, decisions=chunks, turn_end=turn_end)
    if features is None:
        features = torch.randn(chunks, 48, generator=torch.Generator().manual_seed(seed))
    return TimingQuestion(stream, listening_trunk(prefix, chunks, IDS), features)


# -- decoding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def without_a_cache(ids, asked, stop, chunks):
    """Ids of text, and the logits of every id that is chosen, each from a forward over all ids before it."""
    path, text, chosen_from = [*asked.trunk.ids[: asked.trunk.due[stop] + 1], ids.shift], [], []
    heard_UD = torch.cat([asked.features_UD[: stop + 1], later_features(asked, stop, chunks)])

    def choose(legal):
        places = [place for place, token in enumerate(path) if token == ids.placeholder]
        hidden_D = path_states(FAMILY, [path], [places], [heard_UD[: len(places)]])[0, -1]
        chosen_from.append(FAMILY.lm_head(hidden_D))
        masks = legal_masks(ids, len(chosen_from[-1]), torch.device("cpu"))
        path.append(int(masks.masked(chosen_from[-1][None], [legal]).argmax()))
        return path[-1]

    for _ in range(chunks):
        path.append(ids.placeholder)
        if (token := choose(Legal.OPEN)) in (ids.text_pad, ids.break_):
            break
        text.append(token)
        for _ in range(4):
            choose(Legal.CODE)
    return text, chosen_from


@pytest.fixture
def head_logits():
    """Logits (R, V) of every call of the head while replies are decoded."""
    calls = []
    handle = FAMILY.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output))
    yield calls
    handle.remove()


def test_replies_are_those_of_decoding_each_without_a_cache(head_logits):
    """Rows of two streams, of which one ends early: what the first stop says third is made the pad."""
    questions, stops, chunks = [question(6, 0), question(4, 1)], [[5, 1, 4, 1], [2]], 4
    third = without_a_cache(IDS, questions[0], 1, 3)[0][2]
    ids = replace(IDS, text_pad=third)
    head_logits.clear()
    replies = decode_replies(FAMILY, questions, stops, ids, chunks)
    batched = list(head_logits)
    assert [sorted(each) for each in replies] == [[1, 4, 5], [2]] and batched[0].shape[0] == 4  # a row per stop
    rows = [(0, 1), (0, 4), (0, 5), (1, 2)]
    plain = [without_a_cache(ids, questions[number], stop, chunks) for number, stop in rows]
    assert len(plain[0][0]) == 2 and max(len(text) for text, _ in plain) == chunks
    for (number, stop), (text, chosen_from) in zip(rows, plain, strict=True):
        said = replies[number][stop]
        assert said.text == FAMILY.tokenizer.decode(text) and said.cut == (len(chosen_from) == 5 * chunks)
    for call, logits_RV in enumerate(batched):
        alive = [chosen_from[call] for _, chosen_from in plain if call < len(chosen_from)]
        assert (logits_RV - torch.stack(alive)).abs().max() < 1e-5
    assert len(batched) == 5 * chunks


def test_a_reply_is_what_a_session_says_that_is_led_to_the_stop():
    """It hears the same chunks; its turn is as long as the limit."""
    live = DuplexSession(FAMILY, FixedFeatures(), system="Hi", max_turn_seconds=8 * 0.16)
    live.follow([*[ChunkDecision(IDS.think)] * 3, ChunkDecision(IDS.shift)])
    live.push(np.zeros(20 * CHUNK_SAMPLES, np.float32))
    (spoken,) = spoken_replies(live.decisions[:13], IDS)
    asked = question(18, 0, prefix=live.system_ids, features=FixedFeatures().features_CD[:18])
    said = decode_replies(FAMILY, [asked], [[3]], IDS, 8)[0][3]
    assert said.text == FAMILY.tokenizer.decode(list(spoken.text_ids)) and len(spoken.text_ids) > 0


def test_beyond_the_stream_the_silence_after_the_turn_is_heard_again():
    """The turn ends in chunk 3 of 7; a stop in chunk 4 hears 5 and 6, and then 4, 5, 6 again and again."""
    asked = question(7, 0, turn_end=0.6, features=torch.arange(7.0)[:, None])
    assert later_features(asked, 4, 7)[:, 0].tolist() == [5, 6, 4, 5, 6, 4, 5]
    assert later_features(asked, 6, 2)[:, 0].tolist() == [4, 5]
    assert later_features(question(4, 0, turn_end=0.6, features=torch.arange(4.0)[:, None]), 0, 5)[:, 0].tolist() == [
        1, 2, 3, 3, 3,
    ]  # fmt: skip


# -- the reward ----------------------------------------------------------------------------------------------------


def columns(kind, chunks, replies, expected="three five"):
    return stop_columns(kind, chunks, turn_end=2.0) | {"reply": replies, "expected": [expected] * len(chunks)}


def test_content_by_hand():
    content = load_reward("content")
    said = [" Three, five.", " three five", " three", "", None]
    assert content(completions=[""] * 5, **columns("single", [3, 14, 14, 14, None], said)) == [1, 1, 0, 0, 0]
    assert content(completions=[""], **columns("hold", [3], [None])) == [None]
    assert content(completions=[""], **columns("pause", [3], [" three"], None)) == [None]


def test_a_judge_is_asked_of_what_is_said_and_nothing_else():
    asked = []

    class Judge:
        def ask(self, prompts):
            asked.extend(prompts)
            verdicts = ["yes" if "3 and 5" in prompt else "no" for prompt in prompts]
            nonces = [re.findall(r'"nonce": "(\w+)"', prompt)[-1] for prompt in prompts]
            return [
                json.dumps({"nonce": n, "rationale": f"it is {v}", "same": v})
                for n, v in zip(nonces, verdicts, strict=True)
            ]

    given = columns("single", [3, 14, 14, None], ["3 and 5", " two", " ", None])
    extra: dict[str, list[str]] = {}
    given["log_extra"] = extra.__setitem__
    assert load_reward("content")(completions=[""] * 4, judge=Judge(), **given) == [1, 0, 0, 0]
    assert extra["content_reason"][:2] == ["it is yes", "it is no"]
    assert len(asked) == 2 and all("three five" in prompt for prompt in asked)


def test_the_linter_asks_it_and_counts_it_for_no_policy():
    assert lint(["content"], full=True) == [] == lint([*TIMED.split(","), "content"], full=True)
    assert policy_shares(components(f"{TIMED},content=9")) == policy_shares(components(TIMED))
    assert policy_shares(components("content")) == {}
    with pytest.raises(RewardError, match="content: judges when a full-duplex rollout stops"):
        check_timing(components("content"))


def test_digits_are_expected_as_they_were_said():
    (stream,) = draw_streams("rl", {"pause": 1}, seed=0)
    digits = [sound.word for sound in stream.sounds if sound.word < FUNCTION_WORD]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert stream.answer == " ".join(names[digit] for digit in digits)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught():
    """A model that has learnt one lesson by heart, and the question that ends where it begins to speak."""
    family = new_duplex_family(32, 2, seed=0)
    world = FeatureWorld.of(family, DuplexIds.of(family))
    streams = draw_streams("sft", {"hold": 60}, seed=4)
    spoken = min((stream for stream in streams if len(stream.reply) == 3), key=lambda stream: stream.chunks)
    chunks = spoken.shift_chunk + 4
    heard = replace(
        spoken, kind="single", first_chunk=0, decisions=chunks, chunks=chunks, reply=(),
        turn_end=spoken.sounds[-1].end, answer=" ".join(DIGITS[word] for word in spoken.reply),
    )  # fmt: skip
    trained = [*family.decoder.parameters(), *family.lm_head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(60):
        loss, _ = supervised_loss(family, world.lessons([spoken]), world.ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return family, world, world.questions([heard])[0]


def test_a_model_that_knows_the_words_is_paid_for_them_where_it_learnt_to_say_them(taught):
    family, world, asked = taught
    options = small(reply_seconds=4.0)
    terms = components(options.reward.rewards)
    reader = ReplyReader.of(options, family, world.ids, terms)
    stop, never = asked.stream.shift_chunk, asked.stream.decisions
    nothing = StopRewards(np.zeros(never + 1), {}, {})
    (scored,) = reader.read([asked], [nothing], [np.array([stop, 2, never, stop])])
    assert scored.replies[stop].text.split() == asked.stream.answer.split() and not scored.replies[stop].cut
    assert [*scored.replies] == [2, stop] and scored.parts["content"][[stop, 2, never]].tolist() == [1, 0, 0]
    assert scored.total_S[stop] == 1 and scored.total_S.sum() == 1 and np.isnan(scored.parts["content"][3])
    z_K = question_logits(family, [asked], world.ids)[0]
    assert greedy_stop(z_K) == stop and reader.figures([asked], [z_K]) == {"content": 1.0}
    stops_PG = np.array([[stop, 2, never]])
    rows = timing_rows([asked.stream], [z_K], [scored.total_S], stops_PG, np.zeros((1, 3)), [scored.parts],
                       replies=[scored.replies])  # fmt: skip
    assert rows[0]["completion"].endswith(f"s: {asked.stream.answer}") and rows[2]["completion"] == "no SHIFT"
    given = {name: [row[name] for row in rows] for name in ("kind", "shift_time", "reply", "expected")}
    assert load_reward("content")(completions=[""] * 3, **given) == [row["rewards"]["content"] for row in rows]


def trainer_of(options, family, questions=None):
    for parameter in family.decoder.parameters():
        parameter.requires_grad_(True)
    world = FeatureWorld.of(family, DuplexIds.of(family))
    if questions is None:
        questions = world.questions(draw_streams("rl", options.duplex.rl_streams, options.train.seed))
    return TimingTrainer(options, options.timing, Policy(family, keep_reference=True), questions, world.ids)


def test_a_step_pays_for_content_and_learns_from_it(taught, tmp_path, monkeypatch):
    """Among stops of one stream of which timing says the same, what is said makes the advantage."""
    family, _, asked = taught
    decoded = []
    monkeypatch.setattr("covo_rl.duplex.content.decode_replies",
                        lambda *given: decoded.append(given[2]) or decode_replies(*given))  # fmt: skip
    options = small(output=str(tmp_path), rewards="early_response=0.001,content", reply_seconds=4.0, num_generations=16,
                    prompts_per_step=1)  # fmt: skip
    trainer = trainer_of(options, family, [asked])
    stops = np.array([asked.stream.shift_chunk] * 3 + [asked.stream.shift_chunk + 1, 1] + [2] * 11)
    monkeypatch.setattr(trainer.learner, "_stops", lambda *given: stops)
    metrics, batch = trainer.train_step()
    assert decoded == [[sorted({*stops.tolist()})]]
    content_S = batch.rewards[0].parts["content"]
    assert metrics["reward_content"] == pytest.approx(content_S[stops].mean()) and content_S[stops[0]] == 1
    assert (batch.advantages_PG[0] > 0).tolist() == (content_S[stops] == 1).tolist() and metrics["grad_norm"] > 0
    assert metrics["timing/reward"] < 0.002 and metrics["reward_total"] > 0.15  # of timing alone; of all


def test_a_resumed_run_with_content_is_the_run_bit_for_bit(tmp_path):
    def run(folder, steps, resume=None):
        family = new_duplex_family(32, 2, seed=0)
        options = small(output=str(folder), checkpoint_every=1, max_steps=2, prompts_per_step=3)
        trainer = trainer_of(options, family)
        saver = Saver(options, folder)
        saver.resume(trainer, resume)
        said = []
        while trainer.step < steps:
            _, batch = trainer.train_step()
            said.append([scored.replies for scored in batch.rewards])
            saver.after_step(trainer)
        return torch.cat([p.flatten() for p in family.decoder.parameters()]).detach(), said[-1]

    whole, said = run(tmp_path / "a", 2)
    run(tmp_path / "b", 1)
    resumed, again = run(tmp_path / "b", 2, resume="auto")
    assert torch.equal(whole, resumed) and said == again and any(said)


def test_a_judge_that_fails_leaves_the_sum_and_stops_the_run(tmp_path, monkeypatch):
    class Broken:
        def ask(self, prompts):
            return [RuntimeError("out of order")] * len(prompts)

    trainer = trainer_of(small(output=str(tmp_path), reward_failure_limit=0.0), new_duplex_family(32, 2, seed=0))
    monkeypatch.setattr(trainer.learner, "reader", replace(trainer.learner.reader, judge=Broken()))
    with pytest.raises(TrainingStopped, match=r"reward content: .* scores failed"):
        trainer.train_step()


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path):
    """Of three streams a step one rank has two, in two passes."""
    worker = Path(__file__).parent / "duplex_ranks_worker.py"
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, command in (("one", [sys.executable]), ("two", ranks)):
        done = subprocess.run(
            [*command, str(worker), str(tmp_path / name)], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
    (one, said), (two, also) = (torch.load(tmp_path / name / "trained.pt") for name in ("one", "two"))
    assert (one - two).abs().max() < 1e-5 and said == also and any(said.values())


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "more"),
    [("timing_estimator mix asks what every stop earns", {"timing_estimator": "mix"}),
     ("control shuffled", {"control": "shuffled"}), ("control gold", {"control": "gold"}),
     ("none asks it", {"rewards": TIMED, "judge": "openai:gpt@http://localhost:1/v1"}),
     ("write openai:MODEL@URL", {"judge": "somebody"}),
     ("content says nothing of when to speak", {"rewards": "content"}),
     ("judges all of its stops", {"rewards": "content,barge_in,back_channel,hold_floor"})],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, said, more):
    with pytest.raises(UserError, match=said):
        run_timing(small(output=str(tmp_path / "run"), **more))
    assert not (tmp_path / "run").exists()


def test_the_limit_of_a_reply_is_checked():
    with pytest.raises(ConfigError, match=r"reply_seconds 0\.1"):
        small(reply_seconds=0.1)


@pytest.mark.slow
def test_a_run_has_content_before_and_after(tmp_path):
    result = read_record(run_timing(small(output=str(tmp_path / "run"), max_steps=2, eval_every=1)))
    assert result["before"]["content"] is not None and result["after"]["content"] is not None
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all("reward_content" in line and "eval_content" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step_00001.jsonl").read_text().splitlines()]
    assert any(": " in row["completion"] and row["reply"] for row in rows)
