"""Three stages, one chain: what each starts from, what is repeated and what is not, what is refused, what is said."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from covo_rl.config import ConfigError
from covo_rl.resolve import find, read_yaml
from covo_rl.run import chain as chains
from covo_rl.run.chain import Chain, links, table
from covo_rl.supervised import Stage, load_config
from covo_rl.supervised.rows import TeacherError, completion
from covo_rl.types import Example, UserError

STAGES = ("perception", "cot", "grpo")
ROW = Example(id="row-1", clips=(), question="Which?", choices=("ah", "ee", "oo", "eh"), answer="ee", columns={})
SIZES = {"vocab_size": 512, "encoder_width": 32, "decoder_width": 32, "decoder_layers": 2, "encoder_layers": 1,
         "mel_bins": 40, "initializer_range": 0.1}  # fmt: skip
SMALL = {
    "perception": {"tiny": SIZES, "rows": 24, "stages": [
        {"kind": "tagging", "steps": 2, "batch_size": 8},
        {"kind": "sft", "teacher": "answer", "steps": 2, "batch_size": 8}]},
    "cot": {"model": "x", "rows": 24, "stages": [{"kind": "sft", "steps": 2, "batch_size": 8, "right": 0.6}]},
    "grpo": {"model": "x", "max_steps": 2, "prompts_per_step": 2, "micro_batch_prompts": 2, "num_generations": 4,
             "max_completion_length": 12, "learning_rate": 1e-2, "check_rewards": False,
             "rewards": "accuracy,format,length"},
}  # fmt: skip


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, options in SMALL.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**options, "output": "x"}))
    return {name: folder / f"{name}.yaml" for name in STAGES}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[]")
    return path


@pytest.fixture
def world(monkeypatch):
    """Commands and measurements without a model: the words of every command in order, how often a stage was measured,
    and stages whose command is to fail."""
    told = {"commands": [], "measured": Counter(), "fail": set()}

    def command(words):
        folder = Path(words[words.index("--output") + 1])
        told["commands"].append(words)
        if folder.name in told["fail"]:
            raise UserError(f"covo-rl {words[0]} ended with 1")
        if words[0] == "sft":
            folder.mkdir(parents=True, exist_ok=True)
            log = [{"stage": 0, "kind": "sft", "rows": 24, "log": [1], "held_out": {"accuracy": 0.5}}, {"held_out": {}}]
            (folder / "training_log.json").write_text(json.dumps(log))
        else:
            (folder / "adapter").mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"step": i, "reward_total": float(i)}) for i in range(1, 13)]
            (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    def figures(self, link):
        told["measured"][link.name] += 1
        right = {"accuracy": 0.5, "ci95": [0.4, 0.6], "reward_format": 1.0, "reward_total": 2.5}
        return {"greedy": right, "sampled": right, "audio": {"real": 0.5, "silent": 0.25}}

    monkeypatch.setattr(chains, "run_command", command)
    monkeypatch.setattr(Chain, "_figures", figures)
    return told


def launched(told):
    """Stages that were launched since the last call, with the words that say how: fresh or going on."""
    names = [
        (Path(words[words.index("--output") + 1]).name, "resume" if "--resume" in words else "overwrite")
        for words in told["commands"]
    ]
    told["commands"].clear()
    return names


FRESH = [(name, "overwrite") for name in STAGES]


def test_each_stage_starts_from_the_model_of_the_one_before(configs, tmp_path):
    run = tmp_path / "run"
    perception, cot, grpo = links(run, configs, seed=7)
    assert perception.words == ["sft", "--config", str(configs["perception"]), "--output", str(run / "perception"),
                                "--seed", "7"]  # fmt: skip
    assert cot.words[cot.words.index("--model") + 1] == str(run / "perception")
    assert grpo.words[grpo.words.index("--model") + 1] == str(run / "cot") and grpo.words[0] == "train"
    assert (grpo.model, grpo.adapter) == (run / "cot", run / "grpo" / "adapter")
    configs["grpo"].write_text(json.dumps({**SMALL["grpo"], "lora": False, "train_parts": ["llm"]}))
    whole = links(run, configs, seed=None)[-1]
    assert (whole.model, whole.adapter) == (run / "grpo" / "model", None) and "--seed" not in whole.words


def test_what_is_wrong_with_any_configuration_is_said_at_once(configs, tmp_path):
    configs["perception"].write_text(json.dumps({**SMALL["perception"], "stages": [{"teacher": "parrot"}]}))
    configs["cot"].unlink()
    configs["grpo"].write_text(json.dumps({**SMALL["grpo"], "learning_rat": 1}))
    with pytest.raises(ConfigError) as error:
        links(tmp_path / "run", configs, None)
    text = str(error.value)
    assert "there are evidence, answer, column" in text and "cot.yaml: no such file" in text.replace(str(tmp_path), "")
    assert "did you mean learning_rate" in text


def test_the_chain_runs_once_and_its_figures_are_saved(configs, data, tmp_path, world):
    run = tmp_path / "run"
    record = Chain(run, links(run, configs, None), data).run()
    assert launched(world) == FRESH and world["measured"] == dict.fromkeys(STAGES, 1)
    saved = json.loads((run / "pipeline.json").read_text())
    assert saved == record and list(saved["stages"]) == list(STAGES)
    assert saved["environment"]["covo_rl"] and saved["questions"]["data"] == str(data)
    assert saved["stages"]["cot"]["training"]["log"] == [{"kind": "sft", "rows": 24, "held_out": {"accuracy": 0.5}}]
    assert saved["stages"]["grpo"]["training"]["reward_total"] == [3.0, 10.0], "steps 1 to 5, and 8 to 12"
    assert all(stage["training"]["cpu_seconds"] >= 0 and stage["launches"] == 1 for stage in saved["stages"].values())
    assert saved["cpu_seconds"] >= 0 and table(saved).row_count == 3

    Chain(run, links(run, configs, None), data).run()
    assert launched(world) == [] and world["measured"] == dict.fromkeys(STAGES, 1), "what is finished was repeated"
    Chain(run, links(run, configs, None), data, overwrite=True).run()
    assert launched(world) == FRESH and world["measured"] == dict.fromkeys(STAGES, 2)


def test_a_chain_goes_on_at_the_stage_that_was_cut_off(configs, data, tmp_path, world):
    run = tmp_path / "run"

    def launch():
        return Chain(run, links(run, configs, None), data).run()

    world["fail"] = {"cot"}
    with pytest.raises(UserError, match="ended with 1"):
        launch()
    assert launched(world) == FRESH[:2]
    world["fail"] = {"grpo"}
    with pytest.raises(UserError):
        launch()
    assert launched(world) == FRESH[1:]
    world["fail"] = set()
    record = launch()
    assert launched(world) == [("grpo", "resume")], "GRPO has checkpoints to go on from"
    assert [record["stages"][name]["launches"] for name in STAGES] == [1, 2, 2]


def test_what_was_made_from_a_model_that_is_gone_is_made_again(configs, data, tmp_path, world):
    run = tmp_path / "run"
    Chain(run, links(run, configs, None), data).run()
    launched(world)
    shutil.rmtree(run / "cot")
    Chain(run, links(run, configs, None), data).run()
    assert launched(world) == FRESH[1:]
    assert world["measured"] == {"perception": 1, "cot": 2, "grpo": 2}


def test_other_questions_are_measured_without_training(configs, data, tmp_path, world):
    run = tmp_path / "run"
    Chain(run, links(run, configs, None), data).run()
    launched(world)
    data.write_text("[ ]")
    Chain(run, links(run, configs, None), data).run()
    assert launched(world) == [] and world["measured"] == dict.fromkeys(STAGES, 2)


def test_other_settings_and_other_folders_are_refused(configs, data, tmp_path, world):
    run = tmp_path / "run"
    Chain(run, links(run, configs, None), data).run()
    launched(world)
    with pytest.raises(ConfigError, match=r"holds perception, cot, grpo with other settings: --overwrite"):
        Chain(run, links(run, configs, 3), data).run()
    configs["cot"].write_text(json.dumps({**SMALL["cot"], "rows": 25, "output": "x"}))
    with pytest.raises(ConfigError, match=r"holds cot with other settings"):
        Chain(run, links(run, configs, None), data).run()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds something else \(thesis.tex\): choose another --output"):
            Chain(other, links(other, configs, None), data, overwrite=overwrite).run()
    assert launched(world) == [] and [path.name for path in other.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_recipe_runs_every_command_and_saves_figures_of_each(tmp_path):
    """Two steps a part, in processes of their own, and measured by the real evaluation; 80 CPU seconds."""
    from covo_rl.synth import render_set

    own = tmp_path / "own.py"  # random weights say nothing that another reward tells apart
    own.write_text("def letters(completions, **columns):\n    return [len(set(text)) / 50 for text in completions]\n")
    rewards = {"rewards": f"accuracy,format,{own}:letters"}
    for name, options in SMALL.items():
        content = {**options, "output": "x", **(rewards if name == "grpo" else {"dtype": "float32"})}
        (tmp_path / f"pipeline_{name}.yaml").write_text(json.dumps(content))
    questions = render_set(tmp_path / "questions", seed=3, train=1, validation=1, test=11)["test"]
    words = [sys.executable, str(find("recipes", "pipeline.py")), "--configs", tmp_path, "--output", tmp_path / "run",
             "--eval-data", questions]  # fmt: skip
    first, second = (subprocess.run(words, capture_output=True, text=True, timeout=580) for _ in range(2))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    for stage in record["stages"].values():
        figures = stage["figures"]
        assert figures["greedy"]["n"] == figures["sampled"]["n"] == 11
        assert set(figures["audio"]) == {"real", "silent", "swapped", "none"}
        parts = [figures["sampled"][f"reward_{name}"] for name in ("accuracy", "format", "consistency", "thinking")]
        assert figures["sampled"]["reward_total"] == pytest.approx(sum(part or 0 for part in parts))
        assert stage["training"]["cpu_seconds"] > 1 and stage["measuring"]["cpu_seconds"] > 0
    assert record["stages"]["grpo"]["training"]["steps"] == 2
    assert len(record["stages"]["perception"]["training"]["log"]) == 2
    assert (tmp_path / "run" / "grpo" / "adapter" / "adapter_config.json").is_file()
    assert "perception" in first.stdout and "R_total" in first.stdout
    assert second.returncode == 0 and second.stdout.count("finished in an earlier launch") == 3


def test_the_answer_teacher_writes_no_reasoning():
    rng = random.Random(0)
    assert completion(ROW, Stage(teacher="answer"), rng) == "<answer>ee</answer>"
    texts = Counter(completion(ROW, Stage(teacher="answer", right=0.4), rng) for _ in range(2000))
    assert abs(texts["<answer>ee</answer>"] / 2000 - 0.4) < 0.04 and len(texts) == 4
    for answer in (None, "", "<answer>"):
        row = Example(id="row-2", clips=(), question="Which?", choices=(), answer=answer, columns={})
        with pytest.raises(TeacherError, match="row-2: the answer teacher needs an answer"):
            completion(row, Stage(teacher="answer"), rng)


def test_no_shipped_stage_trains_on_a_question_that_is_measured():
    """Clips of one split and seed are those of no other; the built-in set, which GRPO trains on, is seed 0."""
    files = {name: Path(find("recipes", f"configs/pipeline_{name}.yaml")) for name in STAGES}
    perception, cot = (load_config(files[name]) for name in STAGES[:2])
    assert len({0, perception.synth_seed, cot.synth_seed}) == 3, "rows of one stage are those of another"
    grpo = read_yaml(files["grpo"])
    assert "data" not in grpo and "eval_data" not in grpo
    assert {stage.teacher for stage in perception.stages if stage.kind == "sft"} == {"answer"}
    assert [stage.teacher for stage in cot.stages] == ["evidence"]
    assert (grpo["instruction"], grpo["choice_style"]) == (cot.prompt.instruction, cot.prompt.choice_style)
    assert cot.model == perception.output and grpo["model"] == cot.output, "the commands by themselves are no chain"
