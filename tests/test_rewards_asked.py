"""majority, length and wer: figures that a reader can check by hand."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from covo_rl.config import RewardConfig
from covo_rl.rewards import RewardError, lint, load_reward, score
from covo_rl.rewards.cli import app
from covo_rl.rewards.columns import example_from_row, group_from_completions
from tests.own_time import seconds

OPTIONS = ["dog", "cat", "cow"]


def said(*answers):
    return [f"<think>I hear it.</think><answer>{answer}</answer>" for answer in answers]


def majority(answers, **columns):
    columns = {"choices": [OPTIONS] * len(answers), **columns}
    return load_reward("majority")(said(*answers), **columns)


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        (["B", "(B) cat", "cat", "dog"], [1, 1, 1, 0]),  # 3 of 4 say cat
        (["B", "cat", "A", "dog"], [None] * 4),  # 2 and 2: a tie
        (["cat", "dog", "cow"], [None] * 3),  # one vote each
        (["cat", "drum", "?"], [None] * 3),  # one vote is no agreement
        (["cat", "cat", "drum", "drum", "drum"], [1, 1, 0, 0, 0]),  # what names no option does not vote
        (["drum", "drum"], [None] * 2),
        (["cat"], [None]),  # alone
        (["dog", "dog", "cat", "cat", "cow", "cow", "cow"], [0, 0, 0, 0, 1, 1, 1]),  # plurality, as in the paper
    ],
)
def test_the_majority_of_options(answers, scores):
    assert majority(answers) == scores


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        (["120 Hz", "0.12 kHz", "120 kHz"], [1, 1, 0]),
        (["1/2", "0.5", "2"], [1, 1, 0]),
        (["A bell.", "bell", "a drum"], [1, 1, 0]),
        (["bell", "drum"], [None, None]),
    ],
)
def test_open_answers_agree_as_accuracy_would_have_it(answers, scores):
    assert majority(answers, choices=None) == scores


def test_rambling_answers_are_compared_in_no_time():
    """64 different answers of 9,000 characters, as of a policy that has lost its way; two pairs agree."""
    texts = [f"bell {i // 2 if i < 4 else i} " * 1_000 for i in range(64)]
    scores = []
    assert seconds(lambda: scores.extend(load_reward("majority")(said(*texts)))) < 3
    assert scores == [None] * 64
    assert load_reward("majority")(said(*texts[1:9])) == [0, 1, 1] + [0] * 5


def test_the_key_is_never_looked_at():
    metrics = {}
    for key, right in (("cat", 1.0), ("dog", 0.0)):
        columns = {"answer": [key] * 3, "log_metric": metrics.__setitem__}
        assert majority(["cat", "cat", "dog"], **columns) == [1, 1, 0]
        assert metrics == {"majority_answers": 2, "majority_unanimous": 0, "majority_right": right}
    assert majority(["cat"] * 3, log_metric=metrics.__setitem__) == [1, 1, 1]
    assert metrics["majority_unanimous"] == 1 and metrics["majority_answers"] == 1


@pytest.mark.parametrize("conversational", [False, True])
def test_groups_in_trl_are_adjacent_rows_of_one_prompt(conversational):
    """TRL repeats each row `num_generations` times; equal questions of other rows are told apart by their id."""
    prompts = ["p", "p", "p", "p", "q", "q"]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    columns = {"prompts": prompts, "id": ["1", "1", "2", "2", "3", "3"]}
    assert majority(["cat", "cat", "dog", "cow", "A", "dog"], **columns) == [1, 1, None, None, 1, 1]
    blocks = load_reward("majority(num_generations=3)")
    assert blocks(said("cat", "cat", "dog", "cow", "A", "dog"), prompts=["p"] * 6, choices=[OPTIONS] * 6) == [
        1, 1, 0, 0, 1, 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="4 completions are no whole groups of num_generations=3"):
        blocks(said("cat", "cat", "dog", "cow"), prompts=["p"] * 4)


def test_majority_runs_in_grpo_trainer(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "bell": 2}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    shape = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                        max_position_embeddings=64)  # fmt: skip
    options = GRPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, report_to=[],
                         max_completion_length=4, use_cpu=True, save_strategy="no", disable_tqdm=True)  # fmt: skip
    rows = [{"prompt": "bell", "question": "?", "choices": OPTIONS, "id": i} for i in "ab"]
    trainer = GRPOTrainer(LlamaForCausalLM(shape), [load_reward("majority"), load_reward("format")], options,
                          Dataset.from_list(rows), processing_class=tokenizer)  # fmt: skip
    trainer.train()  # nothing readable is written: no majority
    logged = next(log for log in trainer.state.log_history if "rewards/majority/mean" in log)
    assert logged["rewards/majority/mean"] is None
    doubled = [row for row in rows for _ in range(2)]
    rewards = trainer._calculate_rewards(doubled, ["bell"] * 4, said("cat", "B", "cat", "dog"), [[1]] * 4)
    assert rewards[:, 0].tolist()[:2] == [1.0, 1.0] and rewards[2:, 0].isnan().all()


def test_a_trainer_s_groups_are_kept_apart_and_a_tie_moves_nothing():
    row = {"question": "?", "choices": OPTIONS, "answer": "dog"}
    votes = [("cat", "B", "dog"), ("dog", "cat", "cow"), ("A", "A", "A")]
    groups = [group_from_completions(example_from_row({**row, "id": i % 2}), said(*v)) for i, v in enumerate(votes)]
    table = score(groups, RewardConfig(rewards="majority,format"))
    assert table.rewards_PG.tolist() == [[2, 2, 1], [1, 1, 1], [2, 2, 2]]
    assert table.metrics["majority_right"] == 0.5 and table.metrics["majority_unanimous"] == 1 / 3
    assert table.extras["majority_reason"][0] == "2 of 3 votes for 'cat'"
    assert table.missing[1, 0, "majority"] == "no majority: 3 answers have 1 of 3 votes"


@pytest.mark.parametrize(
    ("words", "scores"),
    [
        ("length", {0: 0, 1: 0.05, 10: 0.5, 20: 1, 120: 1, 210: 0.5, 299: 1 / 180, 300: 0, 5000: 0}),
        ("length(floor=0,target=4,max=8)", {0: 0, 1: 1, 4: 1, 6: 0.5, 8: 0}),
    ],
)
def test_length_has_a_floor(words, scores):
    texts = [f"<think>{'word ' * n}</think><answer>x</answer>" for n in scores]
    assert load_reward(words)(texts) == pytest.approx(list(scores.values()))


def test_length_counts_chinese_characters_and_nothing_but_the_reasoning():
    logged = {}
    texts = ["<think>我听到三声钟响。 Bell!</think><answer>钟</answer>", "<answer>ten words</answer>"]
    assert load_reward("length")(texts, log_extra=logged.__setitem__) == [8 / 20, 0]
    assert logged == {"length_words": [8, 0]}


def test_a_length_that_cannot_be_is_said_before_training():
    (finding, *_) = lint("length(floor=50,target=20)")
    assert "write 0 <= floor <= target < max" in str(finding)


@pytest.mark.parametrize(
    ("spec", "answer", "truth", "expected"),
    [
        ("wer", "the cat sat", "The cat sat down.", 0.75),
        ("wer", "THE CAT, SAT!", "the cat sat", 1),
        ("wer", "don\u2019t  stop", "don't stop", 1),
        ("wer", "\uff43\uff41\uff54", "cat", 1),
        ("wer", "3.5 meters", "3.5 metres", 0.5),
        ("wer", "21", "twenty-one", 0),  # numbers are left as they are
        ("wer", "twenty-one o'clock", "twenty one oclock", 1),
        ("wer", "cat " * 50, "cat", 0),  # insertions cost the whole mark and no more
        ("wer", "a b c d", "a b", 0),
        ("wer", "我喜欢猫", "我喜欢狗。", 0.75),  # three of four characters
        ("wer", "我用Python", "我用 Python 。", 1),
        ("wer", "안녕하세요", "안녕하세오", 0.8),
        ("wer(unit='char')", "cat", "cut", 2 / 3),
        ("wer", "hello", ["goodbye", "hello"], 1),
        ("wer", "3", 3, 1),  # of a file that a reward alone reads
        ("wer", "hello", "", None),
        ("wer", "hello", "...", None),
        ("wer", "hello", None, None),
    ],
)
def test_wer(spec, answer, truth, expected):
    pytest.importorskip("jiwer")
    scores = load_reward(spec)([f"<answer>{answer}</answer>"], answer=[truth])
    assert scores == [None if expected is None else pytest.approx(expected)]


def test_wer_of_no_answer_is_nothing():
    pytest.importorskip("jiwer")
    missing = {}
    scores = load_reward("wer")(["the cat sat", "<answer>a</answer>"], answer=["the cat sat", " "],
                                log_missing=missing.__setitem__)  # fmt: skip
    assert scores == [0.0, None] and missing == {1: "the row's transcript ' ' holds no word"}


def test_without_jiwer_the_line_to_type_is_said_before_anything_else():
    code = "import sys; sys.modules['jiwer'] = None; from covo_rl.rewards import components; components('wer')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "needs jiwer: pip install 'covo-rl[wer]'" in result.stderr


@pytest.mark.parametrize("spec", ["majority", "length", "wer"])
def test_the_linter_knows_them_and_the_list_names_them(spec):
    if spec == "wer":
        pytest.importorskip("jiwer")
    assert lint(spec, full=True) == []
    assert spec in CliRunner().invoke(app, ["list"]).output


REWARDS = "accuracy,format,consistency=0.5,thinking,majority,length(floor=5)=0.3"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of the built-in model, sampled."""
    from covo_rl.config import parse_options
    from covo_rl.run.session import Session

    folder = tmp_path_factory.mktemp("run") / "out"
    words = ["--instruction", "", "--choice_style", "inline", "--max_steps", 2, "--prompts_per_step", 6, "--limit", 40,
             "--num_generations", 4, "--max_completion_length", 48, "--evaluate", "false", "--rewards", REWARDS,
             "--reward_gate", "format", "--output", folder]  # fmt: skip
    session = Session(parse_options([str(word) for word in words]))
    session.train()
    session.run.lock.release()
    return folder


def test_a_run_s_rollouts_score_as_the_run_scored_them(run, tmp_path):
    """To the digit: components, sums with weights and gate, and the groups of `majority`."""
    for step in (1, 2):
        source, target = run / "rollouts" / f"step_{step:05d}.jsonl", tmp_path / f"{step}.jsonl"
        command = ["score", "--rewards", REWARDS, "--reward-gate", "format", "--input", str(source)]
        result = CliRunner().invoke(app, [*command, "--output", str(target)])
        assert result.exit_code == 0, result.output
        before, after = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in (source, target))
        assert [{**row, "rescored_rewards": row["rewards"], "rescored_reward_total": row["reward_total"]}
                for row in before] == after  # fmt: skip
        assert [row["rollout"] for row in before] == [0, 1, 2, 3] * 6
    graded = [row["rewards"]["majority"] for row in before]
    assert len(set(graded)) > 1 and len({row["reward_total"] for row in before}) > 3, "something to tell apart"


def scored(rows, tmp_path, *words):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["score", "--input", str(path), "--output", str(out), *words])
    return result, [json.loads(line) for line in out.open()] if out.exists() else []


def test_no_column_of_the_input_is_overwritten(tmp_path):
    row = {"completion": "<answer>A</answer>", "choices": OPTIONS, "answer": "dog"}
    taken = [{**row, "rewards": 1, "rescored_rewards": "mine"}, {**row, "rescored_2_reward_total": 2}]
    result, rows = scored(taken, tmp_path, "--rewards", "accuracy")
    assert result.exit_code == 0 and "rescored_3_rewards" in result.output
    assert [{k: v for k, v in new.items() if k in old} for new, old in zip(rows, taken, strict=True)] == taken
    assert [new["rescored_3_reward_total"] for new in rows] == [1.0, 1.0]


def test_the_output_is_never_the_input(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"completion": "x"}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl", tmp_path / "." / "in.jsonl"):
        result = CliRunner().invoke(app, ["score", "--input", str(path), "--output", str(output)])
        assert result.exit_code == 2 and "is the input: write to another file" in result.stderr
    assert path.read_text() == '{"completion": "x"}\n'


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("rows.jsonl", "none/out.jsonl", "none does not exist"),
        ("rows.jsonl", ".", "is a folder: name a file"),
        (".", "out.jsonl", "is a folder: name one of its files"),
    ],
)
def test_a_path_that_cannot_be_is_said_before_a_reward_is_asked(tmp_path, source, target, says):
    plugin = tmp_path / "p.py"
    plugin.write_text(f"def f(completions, **kw):\n    open({str(tmp_path / 'asked')!r}, 'w')\n    return [1.0]\n")
    (tmp_path / "rows.jsonl").write_text('{"completion": "x"}\n')
    arguments = ["--rewards", f"{plugin}:f", "--input", str(tmp_path / source), "--output", str(tmp_path / target)]
    result = CliRunner().invoke(app, ["score", *arguments])
    assert result.exit_code == 2 and says in result.stderr and not (tmp_path / "asked").exists()


def test_groups_of_a_file_are_rows_of_one_id_wherever_they_stand(tmp_path, monkeypatch):
    """Three passes over two rows, and a batch that is smaller than a group."""
    monkeypatch.setattr("covo_rl.rewards.rows.BATCH", 2)
    answers = [("cat", "dog"), ("cat", "dog"), ("dog", "cow")]
    rows = [{"id": i, "completion": text, "choices": OPTIONS} for pair in answers for i, text in enumerate(said(*pair))]
    result, rows = scored(rows, tmp_path, "--rewards", "majority")
    assert result.exit_code == 0 and [row["rewards"]["majority"] for row in rows] == [1, 1, 1, 1, 0, 0]
    assert "majority_answers: 2.0000" in result.output


def test_rows_whose_id_is_null_are_no_group(tmp_path):
    rows = [{"id": None, "completion": text, "choices": OPTIONS} for text in said("cat", "cat")]
    _, rows = scored(rows, tmp_path, "--rewards", "majority")
    assert [row["rewards"]["majority"] for row in rows] == [None, None]


def test_a_row_that_a_step_took_twice_is_two_groups(tmp_path):
    run_row = {"id": "r", "choices": OPTIONS, "advantage": 0.0}
    texts = said("cat", "cat", "dog", "dog")
    rows = [{**run_row, "rollout": i % 2, "completion": text} for i, text in enumerate(texts)]
    for order in (rows, [rows[i] for i in (1, 0, 3, 2)]):
        _, new = scored(order, tmp_path, "--rewards", "majority")
        assert [row["rewards"]["majority"] for row in new] == [1, 1, 1, 1]


def test_the_step_token_ids_and_columns_are_the_run_s(tmp_path):
    plugin = tmp_path / "p.py"
    plugin.write_text(
        "def f(completions, completion_ids, trainer_state, problems, **kw):\n"
        "    return [len(ids) + trainer_state.step / 10 + p for ids, p in zip(completion_ids, problems)]\n"
    )
    row = {"id": "r", "choices": [], "advantage": 0.0, "completion": "x", "problems": ["no block"], "row/problems": 0.5}
    words = ["--rewards", f"{plugin}:f", "--input"]
    path, out = tmp_path / "step_00003.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({**row, "completion_ids": [1, 2]}))
    result = CliRunner().invoke(app, ["score", *words, str(path), "--output", str(out)])
    assert result.exit_code == 0 and json.loads(out.read_text())["reward_total"] == 2.8, result.output
    path.write_text(json.dumps(row))
    result = CliRunner().invoke(app, ["score", *words, str(path), "--output", str(tmp_path / "other")])
    assert result.exit_code == 2 and "counts tokens, and the row has no list `completion_ids`" in result.stderr


def test_a_judge_s_audio_needs_an_endpoint():
    from covo_rl.config import Options, option_problems
    from covo_rl.rewards.judge import judge_from_spec

    for judge, fine in ((None, False), ("transformers:x", False), ("openai:m@http://localhost/v1", True)):
        options = Options()
        options.reward.judge, options.reward.judge_audio = judge, True
        assert any("judge_audio" in problem for problem in option_problems(options)) != fine
    with pytest.raises(RewardError, match="reads text only"):
        judge_from_spec("transformers:x", True)
