"""Cold start: the teacher's odds, the collator's masks and padding, stages that learn, the recipe end to end."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from covo_rl.config import ConfigError
from covo_rl.prompt import parse
from covo_rl.supervised import Stage, load_config
from covo_rl.supervised.rows import TeacherError, completion, completions
from covo_rl.types import Example

ROW = Example(
    id="row-1",
    clips=(),
    question="Which vowel is spoken?",
    choices=("ah", "ee", "oo", "eh"),
    answer="ee",
    columns={"evidence": "I hear the man say ee.", "completion": "<think>ee</think><answer>ee</answer>"},
)


def draws(count=2000, **odds):
    rng = random.Random(0)
    return [parse(completion(ROW, Stage(**odds), rng)) for _ in range(count)]


def test_a_clean_teacher_writes_evidence_conclusion_and_the_right_answer():
    text = completion(ROW, Stage(), random.Random(0))
    assert text == "<think>I hear the man say ee. So the answer is ee.</think><answer>ee</answer>"


def test_the_weak_teacher_keeps_the_evidence_and_spreads_its_mistakes_evenly():
    answers = Counter(parsed.answer for parsed in draws(right=0.3))
    assert abs(answers["ee"] / 2000 - 0.3) < 0.04
    assert all(abs(answers[wrong] / 2000 - 0.7 / 3) < 0.04 for wrong in ("ah", "oo", "eh"))
    assert all("I hear the man say ee." in parsed.think for parsed in draws(50, right=0.3))


def test_broken_and_inconsistent_are_probabilities():
    assert abs(sum(not parsed.ok for parsed in draws(broken=0.3)) / 2000 - 0.3) < 0.04
    assert not any(parsed.ok for parsed in draws(100, broken=1.0))
    assert abs(sum(parsed.answer != "ee" for parsed in draws(inconsistent=0.2)) / 2000 - 0.2) < 0.04


def test_the_column_teacher_takes_the_text_of_the_row_and_names_what_is_missing():
    stage = Stage(teacher="column")
    assert completion(ROW, stage, random.Random(0)) == ROW.columns["completion"]
    with pytest.raises(TeacherError, match=r"row-1: no text in column 'cot'; it has evidence, completion"):
        completion(ROW, stage, random.Random(0), column="cot")


def test_rows_without_a_target_are_named_together():
    with pytest.raises(TeacherError) as error:
        completions([ROW] * 12, Stage(teacher="column"), 0, column="cot")
    assert str(error.value).count("row-1: no text in column 'cot'") == 10
    assert str(error.value).endswith("and 2 more rows")


def test_all_problems_of_a_config_come_at_once_with_the_nearest_name(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("outptu: x\nstages:\n  - {kind: sft, rigth: 0.3}\n  - {kind: tag, broken: 2}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    text = str(error.value)
    for part in ("did you mean output?", "did you mean right?", "there are tagging, sft", "broken 2 is a probability",
                 "give either model", "give data"):  # fmt: skip
        assert part in text


def test_overrides_win_and_none_leaves_the_file_alone(tmp_path):
    path = tmp_path / "ok.yaml"
    path.write_text("seed: 3\nrows: 5\ntiny: {}\nstages: [{kind: sft}]\n")
    config = load_config(path, {"seed": None, "rows": 7})
    assert (config.seed, config.rows) == (3, 7)


def test_only_rows_that_the_remaining_stages_use_are_read():
    from covo_rl.supervised.rows import examples, used_rows

    options = {"rows": 30, "model": "x", "stages": [{"rows": 20}, {"first_row": 22, "rows": 5}]}
    assert used_rows(load_config(None, options)) == (0, 27)
    late = load_config(None, {**options, "start_stage": 1})
    assert used_rows(late) == (22, 27)
    assert [row.id for row in examples(late)] == [f"train-0-{i:05d}" for i in range(22, 27)]
    assert used_rows(load_config(None, {**options, "stages": [{"first_row": 3}, {"rows": 1}]})) == (0, None)


@pytest.fixture(scope="module")
def prepared():
    """A tiny family and 24 prepared rows of the built-in set."""
    from covo_rl.audio import ClipStore
    from covo_rl.supervised import rows as data
    from covo_rl.supervised.stages import starting_family

    config = load_config(None, {
        "rows": 24, "tiny": {"vocab_size": 512, "encoder_width": 32, "decoder_width": 32, "decoder_layers": 2,
                             "encoder_layers": 1, "mel_bins": 40, "initializer_range": 0.1},
        "prompt": {"instruction": "", "choice_style": "inline"}, "stages": [{"kind": "sft"}]})  # fmt: skip
    examples = data.examples(config)
    family = starting_family(config, examples, ClipStore())
    return family, data.prepare_rows(examples, family, config), config


def test_the_collator_supervises_the_completion_and_its_end_and_nothing_else(prepared):
    from covo_rl.supervised.trainer import IGNORED, Collator

    family, rows, _ = prepared
    texts = ["<think>I hear it.</think><answer>bell</answer>", "<think>a</think><answer>b</answer>"]
    batch = Collator(family, rows[:2], texts)([{"row": 0}, {"row": 1}])
    for i in range(2):
        supervised = batch["labels"][i][batch["labels"][i] != IGNORED].tolist()
        assert family.tokenizer.decode(supervised) == texts[i] + "<|im_end|>"
        assert supervised[-1] == family.eos_token_ids[0]
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        assert ids == [*rows[i].prompt_ids, *supervised]
        assert (batch["input_ids"][i] == family.audio_token_id).sum() == rows[i].clips[0].slots
    assert [slots for _, slots in batch["clips"]] == [rows[0].clips[0].slots, rows[1].clips[0].slots]


def test_the_loss_is_that_of_each_row_on_its_own(prepared):
    """Padding and the cut logits change nothing: the mean over tokens of the plain per-row loss, by the model's
    own forward."""
    from covo_rl.supervised.trainer import IGNORED, Collator, completion_loss, family_forward

    family, rows, _ = prepared
    family.model.eval()
    texts = [completion(row.example, Stage(), random.Random(0)) for row in rows[:3]]
    collate = Collator(family, rows[:3], texts)
    with torch.no_grad():
        with family_forward(family) as model:
            together = completion_loss(model, collate([{"row": i} for i in range(3)]))
        total, tokens = 0.0, 0
        for i in range(3):
            batch = collate([{"row": i}])
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logps = family.model(**inputs, **batch["clips"][0][0]).logits[0].log_softmax(-1)
            for t in range(1, batch["labels"].shape[1]):
                if batch["labels"][0, t] != IGNORED:
                    total -= float(logps[t - 1, batch["labels"][0, t]])
                    tokens += 1
    assert float(together) == pytest.approx(total / tokens, abs=1e-5)


def test_the_folded_statistics_standardise_what_the_first_convolution_sees(prepared):
    family, rows, _ = prepared
    mels = torch.cat([row.clips[0].tensors["input_features"] for row in rows])
    seen = family.model.encoder.conv1(mels)[..., 1:-1]
    # 24 of 24 clips made the statistics: unit inputs through weights of deviation 0.1 over 40 bins x 3 taps.
    assert 0.3 < float(seen.detach().std()) < 3


def test_tagging_learns_the_facts_of_a_few_clips_and_moves_encoder_and_adapter_only(prepared):
    from covo_rl.supervised import tagging as supervised

    family, rows, _ = prepared
    before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
    log = supervised.train_tagging(
        family, rows, Stage(kind="tagging", steps=60, batch_size=12, learning_rate=3e-3), seed=0
    )
    assert log[-1]["fact_accuracy"] > 0.9
    moved = {name.split(".")[0] for name, p in family.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "audio_adapter"}


def test_a_supervised_stage_learns_and_leaves_frozen_parts_alone(prepared):
    from covo_rl.supervised import trainer as supervised

    family, rows, _ = prepared
    before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
    stage = Stage(steps=25, batch_size=8, learning_rate=5e-3, train_parts=["llm", "lm_head"])
    log, _ = supervised.fine_tune(family, rows, completions([row.example for row in rows], stage, 0), stage, seed=0)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert float(log[-1]["train_loss"]) < 0.6 * float(losses[0])
    moved = {name.split(".")[0] for name, p in family.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"llm"}


def test_one_process_uses_one_gpu_of_several(prepared, monkeypatch):
    """torch's DataParallel cuts every tensor of a batch into equal shares, and audio has other rows than ids."""
    from covo_rl.supervised import trainer as supervised

    class ThreeGPUs(supervised.SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 3

    used = []
    monkeypatch.setattr(supervised, "SFTConfig", ThreeGPUs)
    monkeypatch.setattr(supervised.AudioSFTTrainer, "train", lambda trainer: used.append(trainer.args.n_gpu))
    family, rows, _ = prepared
    stage = Stage(steps=1, batch_size=2)
    supervised.fine_tune(family, rows, completions([row.example for row in rows], stage, 0), stage, seed=0)
    assert used == [1]


def test_another_family_learns_through_the_same_stage():
    """Qwen2-Audio, with its own names for the audio tensors and no logits_to_keep."""
    from covo_rl.models import family_class
    from covo_rl.models.tiny import tiny_qwen2_audio
    from covo_rl.supervised import rows as data
    from covo_rl.supervised import trainer as supervised

    config = load_config(None, {"rows": 4, "model": "x", "stages": [{"kind": "sft"}]})
    examples = data.examples(config)
    model, processor = tiny_qwen2_audio([row.question for row in examples])
    family = family_class("qwen2_audio")(model, processor)
    rows = data.prepare_rows(examples, family, config)
    stage = Stage(steps=4, batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", train_parts=["llm"])
    log, _ = supervised.fine_tune(family, rows, completions(examples, stage, 0), stage, seed=0)
    first = next(entry["loss"] for entry in log if "loss" in entry)
    assert float(log[-1]["train_loss"]) < float(first)


def test_sharded_launches_take_one_sft_stage(monkeypatch):
    from covo_rl.supervised import stages

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = load_config(None, {"rows": 4, "model": "x", "stages": [{"kind": "sft"}, {"kind": "sft"}]})
    with pytest.raises(ConfigError, match="2 stages under FSDP: give one sft stage"):
        stages.run_stages(config)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"never ran under DeepSpeed: launch with recipes/accelerate/fsdp2\.yaml"):
        stages.run_stages(config)


def test_the_recipe_writes_a_checkpoint_that_loads_with_its_prompt(tmp_path):
    root = Path(__file__).parents[1]
    config = {
        "rows": 12, "output": str(tmp_path / "out"), "save_dtype": "float16",
        "tiny": {"vocab_size": 400, "encoder_width": 16, "decoder_width": 16, "decoder_layers": 1, "encoder_layers": 1,
                 "decoder_heads": 2, "encoder_heads": 2, "mel_bins": 20, "adapter_hidden": 16},
        "prompt": {"instruction": "", "choice_style": "inline"},
        "stages": [{"kind": "tagging", "steps": 1, "batch_size": 4}, {"kind": "sft", "steps": 1, "batch_size": 4}],
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(root / "recipes/sft_cot.py"), "--config", str(tmp_path / "c.yaml"), "--seed", "5"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120, capture_output=True)
    from covo_rl import models

    family = models.load_family(str(tmp_path / "out"), dtype="float32")
    assert next(family.model.parameters()).dtype == torch.float32
    assert next(models.load_family(str(tmp_path / "out")).model.parameters()).dtype == torch.float16
    assert yaml.safe_load((tmp_path / "out/prompt.yaml").read_text())["choice_style"] == "inline"
    assert yaml.safe_load((tmp_path / "out/cold_start.yaml").read_text())["seed"] == 5
    assert [stage["kind"] for stage in json.loads((tmp_path / "out/training_log.json").read_text())] == [
        "tagging", "sft"]  # fmt: skip


@pytest.mark.parametrize(
    ("there", "more", "said"),
    [
        ([], {}, None),
        (["notes.txt"], {}, None),
        (["config.json"], {}, "holds something else (config.json): choose another --output"),
        (["model.safetensors"], {"overwrite": True}, "holds something else"),
        (["config.yaml"], {"overwrite": True}, "holds something else"),
        (["config.json", "cold_start.yaml"], {}, "holds an earlier cold start (cold_start.yaml, config.json): choose"),
        (["config.json", "cold_start.yaml"], {"overwrite": True}, None),
        (["stage-0"], {}, None),
        (["stage-0"], {"save_stages": True}, "holds an earlier cold start (stage-0)"),
        (["stage-0"], {"save_stages": True, "start_stage": 1, "model": "builtin:tiny"}, None),
    ],
)
def test_a_cold_start_writes_over_no_checkpoint_unasked(there, more, said, tmp_path, monkeypatch):
    """finding 09: and says so before it reads a row."""
    from covo_rl.supervised import stages

    def read(*_):
        raise TeacherError("the folder is free")

    monkeypatch.setattr(stages.stage_rows, "stage_examples", read)
    for name in there:
        (tmp_path / name).write_text("")
    stage = {"kind": "sft"}
    options = {"rows": 4, "model": "builtin:tiny", "output": str(tmp_path), "stages": [stage, stage]}
    config = load_config(None, options | more)
    with pytest.raises(TeacherError if said is None else ConfigError, match=re.escape(said or "the folder is free")):
        stages.run_stages(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there)


def test_two_cold_starts_do_not_share_a_folder(tmp_path):
    """finding 07"""
    from covo_rl.supervised import stages

    hold = f"from covo_rl.records.lock import FolderLock as L; lock = L({str(tmp_path)!r}); lock.hold(); input()"
    command, root = [sys.executable, "-c", hold], Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, text=True) as owner:
        while not (tmp_path / "lock.json").is_file() or not (tmp_path / "lock.json").read_text():
            assert owner.poll() is None
        options = {"rows": 4, "model": "builtin:tiny", "output": str(tmp_path), "stages": [{"kind": "sft"}]}
        config = load_config(None, options)
        with pytest.raises(ConfigError, match=f"in use by process {owner.pid} on"):
            stages.run_stages(config)
        owner.communicate("\n")
    assert not list(tmp_path.iterdir())


def test_a_part_may_have_a_learning_rate_of_its_own(prepared):
    """AdamW's first step moves every weight that has a gradient by its rate."""
    from covo_rl.policy.patterns import PatternError, part_of
    from covo_rl.supervised.trainer import fine_tune

    family, rows, _ = prepared
    before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
    texts = [completion(row.example, Stage(), random.Random(0)) for row in rows[:8]]
    stage = Stage(steps=1, batch_size=8, learning_rate=1e-3, part_learning_rates="audio_adapter=1e-5",
                  train_parts=["audio_adapter", "llm", "lm_head"])  # fmt: skip
    try:
        fine_tune(family, rows[:8], texts, stage, seed=0)
        moved = {}
        for name, p in family.model.named_parameters():
            part, change = part_of(name, family), float((p.detach() - before[name]).abs().max())
            moved[part] = max(moved.get(part, 0.0), change)
    finally:
        family.model.load_state_dict(before, strict=False)
    assert moved["encoder"] == 0
    assert moved["audio_adapter"] == pytest.approx(1e-5, rel=0.05)
    assert moved["llm"] == pytest.approx(1e-3, rel=0.05)
    with pytest.raises(PatternError, match="part_learning_rates names encoder: train_parts has audio_adapter"):
        fine_tune(family, rows[:8], texts, replace(stage, part_learning_rates="encoder=1e-5"), seed=0)
    with pytest.raises(ConfigError, match="part_learning_rates has no meaning for kind tagging"):
        load_config(None, {"rows": 5, "tiny": {}, "stages": [
            {"kind": "tagging", "part_learning_rates": {"llm": 1e-5}}]})  # fmt: skip
