"""A model that speaks: where codes stand in a reply, what of it is taught, the rows, the recipes, the shipped model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from covo_rl.config import ConfigError, PromptConfig, RewardConfig
from covo_rl.data import DataError, load_examples
from covo_rl.evaluate.answer import IN_PROCESS
from covo_rl.evaluate.records import group_from_text, judge_groups
from covo_rl.models.covo_audio.processing import IGNORE, interleave, make_labels
from covo_rl.prompt import PromptError, messages
from covo_rl.resolve import find
from covo_rl.rewards.rules.transcript import error_rate, spoken_words
from covo_rl.rewards.specs import load_reward
from covo_rl.supervised import Stage, load_config
from covo_rl.supervised.rows import TeacherError, completions, prepare_rows, reply_codes
from covo_rl.supervised.trainer import Collator
from covo_rl.synth.dialogue import dialogue, write_dialogues
from covo_rl.types import Clip, Example

G_TEXT, G_CODES = [*range(21, 28)], [*range(100, 140)]


def row(name, codes, **columns):
    return Example(name, (), "Say it again.", answer="one two", columns={"codes": codes, **columns})


@pytest.mark.parametrize(
    "text, codes, ids",
    [
        (G_TEXT, G_CODES, [*range(21, 26), *range(200, 215), 26, 27, *range(215, 240)]),
        ([11], [*range(20)], [11, *range(100, 120)]),  # the text is out first: all codes that are left
        ([*range(1, 13)], [0, 1], [1, 2, 3, 4, 5, 100, 101, 6, 7, 8, 9, 10, 11, 12]),  # the codes are
        ([1, 2, 3, 4, 5], [*range(16)], [1, 2, 3, 4, 5, *range(100, 116)]),
        ([1, 2], [], [1, 2]),
    ],
)
def test_a_reply_has_five_text_ids_to_fifteen_codes_and_then_what_is_left(text, codes, ids):
    assert interleave(text, codes, 100) == ids


def test_spoken_labels_are_the_codes_and_the_end_and_no_other_gradient():
    end, ids = 2, [1, 9, 21, 22, 200, 201, 2]  # a prompt of two
    input_ids = torch.tensor([ids, [0, *ids[:-1]]])
    mask = torch.tensor([[1] * 7, [0] + [1] * 6])
    labels = make_labels(input_ids, [2, 2], 100, supervise="spoken", attention_mask=mask, end_id=end)
    assert labels.tolist() == [[IGNORE] * 4 + [200, 201, 2], [IGNORE] * 5 + [200, 201]]
    by_kind = [make_labels(input_ids[:1], [2], 100, supervise=kind)[0].tolist() for kind in ("all", "text", "codes")]
    assert [sum(label != IGNORE for label in kind) for kind in by_kind] == [5, 3, 2]
    logits = torch.randn(1, 7, 300, requires_grad=True)
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    rows = logits.grad[0].abs().sum(-1)
    assert (rows == 0).tolist() == [True] * 3 + [False] * 3 + [True]  # row t predicts id t + 1
    with pytest.raises(ValueError, match="give end_id"):
        make_labels(input_ids, [2, 2], 100, supervise="spoken")


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A tiny family with 256 codes, and four prepared rows whose replies have 20 codes."""
    from covo_rl.models import family_class
    from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer

    folder = tmp_path_factory.mktemp("dialogues")
    rows = load_examples(write_dialogues(folder, count=4, replies=False), folder)
    rows = [Example(r.id, r.clips, r.question, answer=r.answer, columns={
        "completion": r.answer, "codes": [*range(20)]}) for r in rows]  # fmt: skip
    tokenizer = tiny_tokenizer([r.answer or "" for r in rows], 300)
    model, processor = tiny_covo_audio(
        tokenizer, encoder_width=16, encoder_layers=1, decoder_width=16, decoder_layers=1, mel_bins=20,
        adapter_hidden=16, audio_codes=256,
    )  # fmt: skip
    family = family_class("covo_audio")(model, processor)
    config = load_config(None, {"model": "x", "data": "x", "prompt": {"instruction": ""}})
    return family, prepare_rows(rows, family, config)


@pytest.mark.parametrize("supervise", ["all", "text", "codes", "spoken"])
def test_a_stage_that_speaks_teaches_what_it_says(speaking, supervise):
    family, rows = speaking
    stage = Stage(teacher="column", speak=True, supervise=supervise)
    texts = completions([r.example for r in rows], stage, 0)
    batch = Collator(family, rows, texts, stage=stage)([{"row": i} for i in range(4)])
    for i, text in enumerate(texts):
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()[len(rows[i].prompt_ids) :]
        written, codes = family.processor.split(ids)
        assert codes == [*range(20)] and family.tokenizer.decode(written) == text + "<|im_end|>"
        taught = batch["labels"][i][batch["labels"][i] != IGNORE].tolist()
        text_ids = [j for j in ids[:-1] if j not in family.code_ids]
        code_ids = [j for j in ids if j in family.code_ids]
        expected = {"all": ids, "text": [*text_ids, ids[-1]], "codes": code_ids, "spoken": [*code_ids, ids[-1]]}
        assert taught == expected[supervise]


def test_stages_that_do_not_speak_have_no_codes(speaking):
    family, rows = speaking
    batch = Collator(family, rows, ["one"] * 4)([{"row": 0}])
    assert int(batch["input_ids"].max()) < family.code_ids.start


def test_codes_that_a_reply_cannot_have_are_named_by_row_all_at_once():
    rows = [row("a", [0, 255]), row("b", [3, 256]), row("c", None), row("d", [-1]), row("e", [1.5]), row("f", [])]
    with pytest.raises(DataError) as error:
        reply_codes(rows, 256)
    text = str(error.value)
    for part in ("b: its code 256 at position 1", "c: it has no codes", "d: its code -1 at position 0", "e: ", "f: "):
        assert part in text
    assert "a: " not in text
    assert reply_codes(rows[:1], 256) == [[0, 255]]
    with pytest.raises(TeacherError, match="2 tokenizers"):
        reply_codes([row("a", [0], tokenizer="x"), row("b", [0], tokenizer="y")], 256)
    with pytest.raises(TeacherError, match="no codes to speak in"):
        reply_codes(rows, 0)


def test_a_stage_says_what_does_not_go_together():
    stages = [{"supervise": "codes"}, {"kind": "tagging", "speak": True}, {"supervise": "voice"}]
    with pytest.raises(ConfigError) as error:
        load_config(None, {"rows": 3, "tiny": {}, "stages": stages})
    text = str(error.value)
    for part in ("stages[0]: supervise codes needs speak", "stages[1]: speak has no meaning for kind tagging",
                 "stages[2]: supervise 'voice'; there are all, text, codes, spoken"):  # fmt: skip
        assert part in text


def test_a_dialogue_says_the_same_digits_in_two_voices_whatever_else_is_rendered(tmp_path):
    question, reply = dialogue("train", 3, seed=5)
    assert question.text == reply.text and question.speaker.name != reply.speaker.name
    assert 2 <= len(question.text.split()) <= 6
    examples = load_examples(write_dialogues(tmp_path, count=4, seed=5), tmp_path)
    assert examples[3].answer == question.text and examples[3].columns["reply"] == "train/train-5-00003-reply.wav"
    again = next(dialogue("train", 3, seed=5))
    np.testing.assert_array_equal(question.wave, again.wave)
    with pytest.raises(ValueError, match="no split is called 'dev'"):
        next(dialogue("dev", 0))


def test_a_voice_alone_can_ask_where_the_question_is_not_to_be_written():
    clip = Clip(array=np.zeros(2400, np.float32), sampling_rate=24000)
    asked = Example("a", (clip,), "Say it again.", ("yes", "no"))
    config = PromptConfig(instruction="", written_question=False)
    assert messages(asked, config) == [{"role": "user", "content": [{"type": "audio"}]}]
    with_words = messages(asked, replace(config, instruction="Be short."))[0]["content"]
    assert with_words == [{"type": "audio"}, {"type": "text", "text": "Be short."}]
    with pytest.raises(PromptError, match="row a: it has no audio"):
        messages(replace(asked, clips=()), config)


def test_accuracy_reads_a_whole_reply_where_asked():
    whole = load_reward("accuracy(part='text')")
    said = ["three five", "Three, five.", "three five six", "five three", ""]
    assert whole(completions=said, answer=["three five"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert load_reward("accuracy")(completions=said, answer=["three five"] * 5) == [0.0] * 5
    with pytest.raises(ValueError, match="part 'x'"):
        load_reward("accuracy(part='x')")(completions=said, answer=["three five"] * 5)


def test_the_speaking_model_trains_on_spoken_questions_by_whatever_command(monkeypatch):
    from covo_rl.config import option_problems, parse_options
    from covo_rl.run import questions
    from covo_rl.run.defaults import with_defaults

    options = parse_options(with_defaults(["--model", "builtin:tiny_spoken"]))
    assert options.data.data == "builtin:spoken" and not options.prompt.written_question
    monkeypatch.setattr(questions, "spoken_questions", lambda: {"train": Path("a.jsonl"), "test": Path("b.jsonl")})
    monkeypatch.setattr(questions, "load_examples", lambda source, *rest, **more: [Example(str(source), (), "?")])
    rows = questions.read_questions(options)
    assert [row.id for row in (*rows.train, *rows.held_out)] == ["a.jsonl", "b.jsonl"]
    own = parse_options(with_defaults(["--model", "builtin:tiny_spoken", "--data", "mine.jsonl"]))
    assert not questions.rendered_set(own.data)
    options.data.data = "builtin:sopken"
    assert option_problems(options)[0].startswith("data 'builtin:sopken': there is builtin:spoken; without `data`")


def test_an_evaluation_reads_a_whole_reply_where_its_accuracy_does():
    row = Example("a", (), "Say it again.", answer="one two")
    group = group_from_text(row, ["one two", "one"])
    for rewards, answers, right in (("accuracy(part='text')", ["one two", "one"], [True, False]),
                                    ("accuracy", [None, None], [False, False])):  # fmt: skip
        (record,) = judge_groups([group], [None], IN_PROCESS, RewardConfig(rewards=rewards))
        assert record["answers"] == answers and record["verdicts"]["strict"] == right
        assert next(iter(record["rewards"].values())) == list(map(float, right))


def test_the_control_differs_in_what_it_pays_for_alone():
    from covo_rl.resolve import read_yaml

    run, control = (read_yaml(find("recipes", f"configs/{name}.yaml")) for name in ("spoken", "spoken_control"))
    assert {name for name in run if run[name] != control[name]} == {"rewards", "output"}
    assert control["rewards"] == {**run["rewards"], "spoken": 0.0}


def test_the_shipped_model_says_in_codes_what_it_hears_from_voices_that_it_never_heard(tmp_path):
    """Greedy; the words that the shipped tokenizer reads from the codes, against what was asked."""
    from covo_rl.audio import ClipStore
    from covo_rl.config import RolloutConfig, taught_prompt
    from covo_rl.engines import own
    from covo_rl.models import load_family
    from covo_rl.models.builtin import resolve_model
    from covo_rl.policy import Policy
    from covo_rl.prompt import build_prompt
    from covo_rl.speech.tokenizer import SpeechTokenizer

    folder = resolve_model("builtin:tiny_spoken")
    tokenizer = SpeechTokenizer.from_pretrained(resolve_model("builtin:speech_tokenizer"))
    rows = load_examples(write_dialogues(tmp_path, split="test", count=16, seed=77, replies=False), tmp_path)
    clips, family = ClipStore(), load_family(folder, dtype="float32")
    policy = Policy(family, None, clips=clips).eval()
    wording = taught_prompt(find("checkpoints", "tiny_spoken/prompt.yaml"))
    prompts = [build_prompt(r, family, clips, wording) for r in rows]
    with torch.no_grad():
        config = RolloutConfig(num_generations=1, max_completion_length=112)
        groups = own.sample(policy, prompts, policy.features(prompts), config, seed=0, greedy=True, num_generations=1)
    replies = [group.rollouts[0] for group in groups]
    assert sum(reply.text == example.answer for reply, example in zip(replies, rows, strict=True)) >= 13

    def said(replies):
        """Mean share of the words that were asked for, as read from the codes."""
        heard = [spoken_words(tokenizer.transcribe(reply.codes)) for reply in replies]
        return np.mean([1 - error_rate(r.answer.split(), words) for r, words in zip(rows, heard, strict=True)])

    assert said(replies) > 0.6
    assert said(replies[1:] + replies[:1]) < 0.4  # those of other questions


def test_no_dialogue_to_render_is_refused_before_a_folder_is_made(tmp_path):
    words = ["--rows", "0", "--data", str(tmp_path / "rows"), "--output", str(tmp_path / "out")]
    command = [sys.executable, str(find("recipes", "sft_spoken.py")), *words]
    said = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 1 and "--rows 0: render at least one dialogue" in said.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_recipe_trains_on_what_codes_say(tmp_path):
    command = [sys.executable, str(find("recipes", "grpo_spoken.py")), "--output", str(tmp_path / "run")]
    sizes = ["--max_steps", "2", "--prompts_per_step", "4", "--limit", "8", "--eval_limit", "4"]
    subprocess.run([*command, *sizes], check=True, timeout=300, capture_output=True, cwd=tmp_path)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 2 and 0.3 < result["before"]["reward_spoken"] <= 1
    assert 0.3 < result["after"]["reward_accuracy(part='text')"] <= 1


@pytest.mark.slow
def test_the_recipe_makes_a_model_that_speaks(tmp_path):
    stages = [{"kind": "sft", "teacher": "column", "speak": True, "steps": 2, "batch_size": 4}]
    config = {"tiny": {"vocab_size": 320, "mel_bins": 20, "encoder_width": 16, "decoder_width": 16, "audio_codes": 256,
                       "decoder_layers": 1, "encoder_layers": 1}, "held_out": 0.0, "stages": stages,
              "prompt": {"instruction": "", "written_question": False}}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", "c.yaml", "--rows", "6", "--data", "rows", "--output", "out"]
    command = [sys.executable, str(find("recipes", "sft_spoken.py")), *words]
    subprocess.run(command, check=True, timeout=300, capture_output=True, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows/spoken.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len({r["tokenizer"] for r in rows}) == 1
    assert all(set(r["codes"]) <= set(range(256)) and r["completion"] == r["answer"] for r in rows)
    assert (tmp_path / "out/model.safetensors").is_file()
