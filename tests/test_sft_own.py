"""Cold start on rows of one's own: files of a folder, facts, evidence; what is wrong is said before training."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from covo_rl.audio import ClipStore
from covo_rl.supervised import load_config, stages
from covo_rl.supervised.checks import fact_problems
from covo_rl.supervised.config import Stage
from covo_rl.supervised.held_out import split_held_out
from covo_rl.supervised.rows import TeacherError, completions
from covo_rl.types import Clip, Example

ROOT = Path(__file__).parent.parent
SMALL = {"vocab_size": 400, "encoder_width": 16, "decoder_width": 16, "decoder_layers": 1, "encoder_layers": 1,
         "decoder_heads": 2, "encoder_heads": 2, "mel_bins": 20, "adapter_hidden": 16}  # fmt: skip
PITCH = {"low": 220.0, "high": 1760.0}


def recipe(*words):
    """The recipe in this process: its exit message, or None."""
    main = runpy.run_path(str(ROOT / "recipes" / "sft_cot.py"))["main"]
    main([str(word) for word in words])


@pytest.fixture
def mine(tmp_path):
    """Twelve wavs of half a second with evidence, facts and a completion; and a configuration for them."""
    rows = []
    for i in range(12):
        pitch = "low" if i % 2 else "high"
        t = np.arange(8000) / 16000
        soundfile.write(tmp_path / f"{i}.wav", 0.2 * np.sin(2 * np.pi * (PITCH[pitch] + 5 * i) * t), 16000)
        rows.append({
            "id": f"tone-{i}", "audio": f"{i}.wav", "question": "Is the tone low or high?", "choices": ["low", "high"],
            "answer": pitch, "evidence": f"I hear a {pitch} tone.", "facts": {"pitch.class": pitch},
            "fact_lexicon": {"pitch.class": ["low", "high"]},
            "completion": f"<think>I hear a {pitch} tone.</think><answer>{pitch}</answer>",
        })  # fmt: skip
    config = {
        "output": str(tmp_path / "out"), "data": str(tmp_path / "rows.json"), "tiny": SMALL, "held_out": 0.25,
        "prompt": {"instruction": "", "choice_style": "inline"},
        "stages": [{"kind": "tagging", "steps": 2, "batch_size": 4}, {"kind": "sft", "steps": 2, "batch_size": 4},
                   {"kind": "sft", "teacher": "column", "steps": 2, "batch_size": 4}],
    }  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def change(folder, edit):
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows[:3]:
        edit(row)
    (folder / "rows.json").write_text(json.dumps(rows))


def test_a_tiny_model_is_cold_started_on_wav_files_of_ones_own(mine, capsys):
    """finding 42: rows from files have a path, and ended in "clip: array of dtype object"."""
    recipe("--config", mine / "c.yaml")
    said = capsys.readouterr().out
    assert said.startswith("loading torch")
    assert said.index("reading") < said.index("9 rows, 3 held out") < said.index("held out: 3 rows")
    log = json.loads((mine / "out" / "training_log.json").read_text())
    assert [stage.get("kind") for stage in log] == ["tagging", "sft", "sft", None]
    assert log[-1]["held_out"]["rows"] == 3 and 0 <= log[-1]["held_out"]["accuracy"] <= 1
    from covo_rl.models import load_family

    assert load_family(str(mine / "out")).model_type == "covo_audio"


def test_every_stage_is_measured_on_rows_of_another_file(mine, capsys):
    """Speakers that no row of `data` has are a file of their own; facts after tagging, answers after each sft stage."""
    rows = json.loads((mine / "rows.json").read_text())
    (mine / "rows.json").write_text(json.dumps(rows[:8]))
    (mine / "others.json").write_text(json.dumps(rows[8:]))
    config = yaml.safe_load((mine / "c.yaml").read_text())
    (mine / "c.yaml").write_text(yaml.safe_dump({**config, "held_out": None}))
    recipe("--config", mine / "c.yaml", "--eval-data", mine / "others.json")
    said = capsys.readouterr().out
    order = ["stage 0 (tagging): 8 rows, 2 steps", "stage 0, held out: facts named", "stage 1, held out: 4 rows",
             "stage 2, held out: 4 rows"]  # fmt: skip
    assert [said.index(line) for line in order] == sorted(said.index(line) for line in order)
    log = json.loads((mine / "out" / "training_log.json").read_text())
    facts = log[0]["log"][-1]["held_out"]
    assert facts["rows"] == 4 and facts["by_fact"].keys() == {"pitch.class"}
    assert facts["by_fact"]["pitch.class"] == max(facts["fact_accuracy"], facts["pooled_accuracy"])
    assert log[1]["held_out"]["rows"] == 4 and log[2]["held_out"] == log[3]["held_out"]


def test_a_stage_that_was_measured_trains_on_as_if_it_had_not_been(mine):
    """Measuring sets evaluation mode and the policy's attention; the stage after it is trained as without."""
    from safetensors.torch import load_file

    recipe("--config", mine / "c.yaml")
    config = yaml.safe_load((mine / "c.yaml").read_text())
    rows, held_out = stages.stage_rows.stage_examples(load_config(mine / "c.yaml"))
    taught = {row.id for row in rows}
    own = [row for row in json.loads((mine / "rows.json").read_text()) if row["id"] in taught]
    assert len(own) == 9 and len(held_out) == 3
    (mine / "taught.json").write_text(json.dumps(own))
    alone = {**config, "data": str(mine / "taught.json"), "held_out": 0.0, "output": str(mine / "alone")}
    (mine / "c.yaml").write_text(yaml.safe_dump(alone))
    recipe("--config", mine / "c.yaml")
    measured, plain = (load_file(mine / name / "model.safetensors") for name in ("out", "alone"))
    assert all((measured[name] == plain[name]).all() for name in plain)


def test_rows_with_other_names_are_mapped_as_in_grpo(mine, capsys):
    names = {"question": "ask", "answer": "gold"}
    rows = [{names.get(key, key): value for key, value in row.items()}
            for row in json.loads((mine / "rows.json").read_text())]  # fmt: skip
    (mine / "rows.json").write_text(json.dumps(rows))
    recipe("--config", mine / "c.yaml", "--columns", "question=ask,answer=gold", "--dry-run")
    assert "9 rows, 3 held out" in capsys.readouterr().out


def test_held_out_rows_that_are_also_taught_are_named(mine, capsys):
    (mine / "others.json").write_text((mine / "rows.json").read_text())
    config = yaml.safe_load((mine / "c.yaml").read_text())
    (mine / "c.yaml").write_text(yaml.safe_dump({**config, "held_out": None}))
    with pytest.raises(SystemExit):
        recipe("--config", mine / "c.yaml", "--eval-data", mine / "others.json")
    said = capsys.readouterr().err
    assert "others.json" in said and "tone-3: its sound is also taught, as tone-3" in said
    assert not (mine / "out").exists()


def test_rows_of_the_same_sound_in_any_order_are_on_one_side():
    """finding 42: [A, B] was taught and [B, A] held out; GRPO's split and this one ask the same function."""
    a, b, c = (Clip(data=bytes([n])) for n in range(3))
    rows = [Example(name, clips, "?") for name, clips in (("ab", (a, b)), ("ba", (b, a)), ("c", (c,)), ("none", ()))]
    for seed in range(8):
        sides = [{row.id for row in side} for side in split_held_out(rows, 0.4, seed, ClipStore())]
        assert {"ab", "ba"} <= sides[0] or {"ab", "ba"} <= sides[1]
        assert all(sides) and not sides[0] & sides[1]


def test_a_held_out_clip_that_changes_while_it_trains_is_said(mine, capsys, monkeypatch):
    """finding 35: the held-out figures came from whatever lay there at the end."""
    original = stages.save_checkpoint

    def replaced(*arguments):
        for n in range(12):
            soundfile.write(mine / f"{n}.wav", np.zeros(8000), 16000)
        original(*arguments)

    monkeypatch.setattr(stages, "save_checkpoint", replaced)
    recipe("--config", mine / "c.yaml")
    assert "held out: not measured" in capsys.readouterr().out
    log = json.loads((mine / "out" / "training_log.json").read_text())
    assert "the file has changed" in log[-1]["held_out"]["error"]


def test_a_dry_run_checks_everything_and_writes_nothing(mine, capsys):
    """finding 42: there was no --dry-run."""
    recipe("--config", mine / "c.yaml", "--dry-run")
    said = capsys.readouterr().out
    assert "stage 0 (tagging): 9 rows, 2 steps" in said and "dry run" in said
    assert not (mine / "out").exists()


BROKEN = {
    "no lexicon": (lambda row: row.pop("fact_lexicon"), "tone-0: no column 'fact_lexicon'"),
    "no facts": (lambda row: row.pop("facts"), "tone-0: no column 'facts'"),
    "empty facts": (lambda row: row.update(facts={}), "tone-0: no mapping in {} for column 'facts'"),
    "a list of facts": (lambda row: row.update(facts=["low"]), "column 'facts'"),
    "outside the lexicon": (
        lambda row: row.update(facts={"pitch.class": "middle"}),
        "tone-0: fact 'pitch.class' is 'middle', which is not in its lexicon ['low', 'high']",
    ),
    "a fact without values": (lambda row: row.update(facts={"colour": "red"}), "fact 'colour' has no list of values"),
    "None": (lambda row: row.update(facts={"pitch.class": None}), "fact 'pitch.class' has no value: leave it out"),
    "no evidence": (
        lambda row: row.pop("evidence"),
        "tone-0: the evidence teacher needs an answer and a text",
    ),
    "evidence with a tag": (lambda row: row.update(evidence="a </think> b"), "tone-0"),
    "no completion": (lambda row: row.pop("completion"), "tone-0: no text in column 'completion'; it has evidence"),
    "a missing clip": (lambda row: row.update(audio="nowhere.wav"), "tone-0"),
    "a clip that is none": (lambda row: row.update(audio="rows.json"), "tone-0"),
    "another answer": (lambda row: row.update(answer="loud"), "tone-0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_a_stage_cannot_use_are_named_together_before_training(mine, capsys, name):
    """finding 42: raw KeyError, ValueError, TypeError without a row id."""
    edit, message = BROKEN[name]
    change(mine, edit)
    with pytest.raises(SystemExit) as error:
        recipe("--config", mine / "c.yaml")
    said = capsys.readouterr()
    assert error.value.code == 1
    assert message in said.err and "tone-2" in said.err, said.err
    assert "stage 0" not in said.out and not (mine / "out").exists()


def test_a_family_of_ones_own_is_named_on_the_command_line(mine, capsys, monkeypatch):
    monkeypatch.setattr("covo_rl.models.registry._CHOSEN", {})
    code = "from covo_rl.models.qwen3_asr import Qwen3Asr\n\n\nclass Mine(Qwen3Asr):\n    max_clip_seconds = 0.25\n"
    (mine / "mine.py").write_text(code)
    (mine / "c.yaml").write_text(yaml.safe_dump(yaml.safe_load((mine / "c.yaml").read_text()) | {"tiny": None}))
    words = ["--config", mine / "c.yaml", "--model", "builtin:tiny_qwen3_asr", "--trust-remote-code", "--dry-run"]
    with pytest.raises(SystemExit):
        recipe(*words, "--family", f"{mine}/mine.py:Mine")
    assert "row tone-0: a clip of 0.50 s: Qwen3-ASR takes 0.25 s" in capsys.readouterr().err


OPTIONS = {
    "sft_tiny's rows": ({"stages": [{"rows": 6000}]}, "stages[0]: rows 0 to 5999: the data has 9 rows"),
    "first row": ({"stages": [{"first_row": 50}]}, "stages[0]: first_row 50: the data has 9 rows"),
    "text for a number": (
        {"stages": [{"batch_size": "many"}]},
        "batch_size 'many': expected a whole number",
    ),
    "one stage": ({"stages": {"kind": "sft"}}, "stages: expected a list, found dict"),
    "a size": ({"tiny": {"decoder_witdh": 3}}, "tiny: unknown option 'decoder_witdh'; did you mean decoder_width?"),
    "a size in words": ({"tiny": {"decoder_width": "wide"}}, "tiny: decoder_width 'wide': expected a number"),
    "a small vocabulary": ({"tiny": {"vocab_size": 20}}, "tiny: vocab_size=20 is too small"),
    "held out": ({"held_out": 2}, "held_out 2.0: must be in [0, 1)"),
    "held out twice": ({"eval_data": "others.json"}, "held_out 0.25 and eval_data 'others.json': give one of them"),
    "clips of no rows": ({"eval_audio_dir": "clips"}, "eval_audio_dir needs eval_data"),
    "no such model": ({"tiny": None, "model": "./nowhere"}, "model './nowhere': no such folder"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit_the_rows_are_one_message(mine, capsys, name):
    """finding 42: before any row is decoded or anything trains."""
    values, message = OPTIONS[name]
    config = yaml.safe_load((mine / "c.yaml").read_text()) | values
    (mine / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        recipe("--config", mine / "c.yaml")
    assert message in capsys.readouterr().err
    assert not (mine / "out").exists()


def test_facts_may_have_dots_and_rows_may_know_different_values():
    """finding 42: a name with a dot was a KeyError of torch, another row's lexicon a ValueError."""
    from types import SimpleNamespace

    import torch

    from covo_rl.supervised.tagging import FactHeads

    def row(value, values):
        columns = {"facts": {"a.b": value}, "fact_lexicon": {"a.b": values}}
        return Example("r", (Clip(path="x.wav"),), "?", columns=columns)

    examples = [row("low", ["low", "high"]), row("middle", ["middle", "low"])]
    assert fact_problems(examples) == []
    heads = FactHeads([SimpleNamespace(example=e, slots=(2,)) for e in examples], 4)
    assert heads.values == {"a.b": ["low", "high", "middle"]}
    loss, _ = heads([torch.randn(2, 4), torch.randn(2, 4)], [dict(e.columns["facts"]) for e in examples])
    assert torch.isfinite(loss)


def test_a_wrong_conclusion_needs_another_choice():
    """finding 42: an open question under a weak teacher was an IndexError."""
    row = Example("open", (), "What is it?", (), "a bell", {"evidence": "It rings."})
    assert "a bell" in completions([row], Stage(), 0)[0]
    with pytest.raises(TeacherError, match="open: a wrong conclusion needs another choice"):
        completions([row], Stage(right=0.0), 0)


def test_numbers_as_yaml_writes_them_are_read(tmp_path):
    """finding 42: `learning_rate: 1e-3` is text to YAML."""
    (tmp_path / "c.yaml").write_text("rows: 5\ntiny: {}\nstages: [{learning_rate: 1e-3, kind: sft}]\n")
    assert load_config(tmp_path / "c.yaml").stages[0].learning_rate == 0.001


def test_the_example_of_the_documentation_runs(mine, capsys, monkeypatch):
    """finding 42: `teacher: evidence` with own rows was documented nowhere."""
    page = (ROOT / "docs" / "supervised.md").read_text(encoding="utf-8")
    row = json.loads(re.search(r"<!-- own-rows -->\n```json\n(.*?)```", page, re.DOTALL)[1])
    config = yaml.safe_load(re.search(r"<!-- own-config -->\n```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert [stage.get("teacher") for stage in config["stages"]] == [None, "evidence", "column"]
    clips = [f"{i}.wav" for i in range(8)]
    rows = [{**row, "id": f"bell-{i}", "audio": clip} for i, clip in enumerate(clips)]
    (mine / "rows.json").write_text(json.dumps(rows))
    stages = [{**stage, "steps": 1, "batch_size": 4, "warmup_steps": 0} for stage in config["stages"]]
    small = {"tiny": {**SMALL, **{k: v for k, v in config["tiny"].items() if k == "initializer_range"}}}
    (mine / "d.yaml").write_text(yaml.safe_dump({**config, **small, "stages": stages, "audio_dir": str(mine)}))
    monkeypatch.chdir(mine)
    recipe("--config", "d.yaml")
    assert "held out: 1 rows" in capsys.readouterr().out
    assert (mine / config["output"] / "prompt.yaml").is_file()


def test_masks_hide_at_most_a_band_and_a_span_of_each_row_and_leave_the_features_alone():
    import torch

    from covo_rl.models.base import ClipFeatures
    from covo_rl.supervised.masks import MaskError, Masks

    features = torch.arange(2 * 20 * 50, dtype=torch.float32).reshape(2, 20, 50)
    clip = ClipFeatures({"input_features": features.clone(), "lengths": torch.tensor([50, 50])}, 4)
    masks, widest = Masks(Stage(mask_bins=4, mask_frames=10), seed=0), [0, 0]
    for _ in range(100):
        hidden = masks(clip).tensors["input_features"] != features
        bins, frames = hidden.all(2).sum(1), hidden.all(1).sum(1)
        widest = [max(widest[0], int(bins.max())), max(widest[1], int(frames.max()))]
        assert (hidden.sum((1, 2)) == bins * 50 + frames * 20 - bins * frames).all()
    assert widest == [4, 10] and torch.equal(clip.tensors["input_features"], features)
    assert Masks(Stage(), seed=0)(clip) is clip
    again = [Masks(Stage(mask_bins=4), seed=1)(clip).tensors["input_features"] for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(MaskError, match="this family has codes"):
        masks(ClipFeatures({"codes": features}, 4))
