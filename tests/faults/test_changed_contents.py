"""What a checkpoint compares by content: the rows with their columns and clips, the rewards' files, the adapter."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases as cases

from covo_rl.config import ConfigError
from covo_rl.train.checkpoint.identity import (
    adapter_fingerprint,
    check_changes,
    data_fingerprint,
    differences,
    reward_fingerprint,
)
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.types import Clip, Example


def example(folder=None, name="a.wav", sound=b"RIFF one", **columns):
    clips = ()
    if folder is not None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(sound)
        clips = (Clip(path=str(folder / name)),)
    return Example("1", clips, "q", ("x", "y"), "x", {"facts": {"dog": True}, "answer_kind": "choice"} | columns)


def changed_parts(before, after):
    """What `differences` says of two sets of rows."""
    serious, _ = differences(*({"config": {}, "data": data_fingerprint(rows)} for rows in (before, after)))
    return serious


@pytest.mark.parametrize(
    ("columns", "part"),
    [({"facts": {"dog": False}}, "column facts"), ({"answer_kind": "numeric"}, "column answer_kind"),
     ({"facts": None}, "column facts"), ({"evidence": "it barks"}, "column evidence"),
     ({"facts": {"dog": True, "cat": False}, "answer_kind": ""}, "column answer_kind, column facts")],
)  # fmt: skip
def test_a_changed_column_is_named(columns, part):
    """finding 05"""
    assert changed_parts([example()], [example(**columns)]) == [
        f"training data: as many rows as in the checkpoint, but their content or order has changed ({part})"
    ]


def test_columns_are_compared_by_value(tmp_path):
    """finding 05: neither the order of keys nor numpy's types are a change; a column that goes is one."""
    one = Example("1", (), "q", (), None, {"a": 1, "b": [1.0, 2.0]})
    other = Example("1", (), "q", (), None, {"b": np.array([1.0, 2.0]), "a": np.int64(1)})
    assert data_fingerprint([one]) == data_fingerprint([other])
    gone = Example("1", (), "q", (), None, {"a": 1})
    assert changed_parts([one], [gone]) and changed_parts([one, gone], [gone, one])


def test_the_sound_is_compared_not_the_place(tmp_path):
    """finding 05: one changed byte is a change, another folder is none; so for bytes, waveforms and lost files."""
    here, there = example(tmp_path / "here"), example(tmp_path / "there")
    assert not changed_parts([here], [there])
    louder = example(tmp_path / "there", sound=b"RIFF two")
    assert "(audio)" in changed_parts([here], [louder])[0]
    before = data_fingerprint([louder])
    Path(louder.clips[0].path).unlink()
    assert data_fingerprint([louder]) != before
    arrays = [Example("1", (Clip(array=np.full(8, level, "f4"), sampling_rate=16_000),), "q") for level in (0.1, 0.2)]
    assert changed_parts(arrays[:1], arrays[1:])


def test_a_resume_with_another_sound_is_refused(tmp_path):
    """finding 05: same id, question and file name."""
    files = [example(tmp_path / "clips", f"{i}.wav", bytes([i])) for i in range(3)]
    saver = Saver(cases.options(tmp_path / "run"), tmp_path / "run")
    trainer = SimpleNamespace(sampler=SimpleNamespace(examples=files), policy=torch.nn.Linear(1, 1))
    before = saver._identity(trainer)
    (tmp_path / "clips" / "1.wav").write_bytes(b"another recording")
    assert saver._identity(trainer) == before  # read once, at the start, not at every save
    after = Saver(cases.options(tmp_path / "run"), tmp_path / "run")._identity(trainer)
    serious, _ = differences(before, after)
    with pytest.raises(ConfigError, match=r"content or order has changed \(audio\)(?s:.)*--allow_changed_config"):
        check_changes(serious, allowed=False, mid_batch=False)


def test_a_changed_reward_file_is_noticed(tmp_path, monkeypatch):
    """finding 05: the same name, another function; a live function is known by its source."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    code = "def mine(completions, **columns):\n    return [1.0 for _ in completions]\n"
    file.write_text(code)
    before = reward_fingerprint("./mine.py:mine=0.5,format")
    assert len(before) == 2 and reward_fingerprint("./mine.py:mine=2,format") == before
    file.write_text(code.replace("1.0", "0.0"))
    after = reward_fingerprint("./mine.py:mine=0.5,format")
    same = {"config": {}, "data": data_fingerprint([])}
    serious, _ = differences({**same, "rewards": before}, {**same, "rewards": after})
    assert len(serious) == 1 and "rewards: the file has changed (./mine.py:mine" in serious[0]
    live = reward_fingerprint({cases.vowels: 1.0})
    assert list(live) == ["vowels"] and live == reward_fingerprint({cases.vowels: 2.0})


def test_the_adapter_to_start_from_may_lie_elsewhere_but_not_change(tmp_path):
    """finding 04: on another machine its path is another; the same files are the same start."""
    for name, scale in (("here", 16), ("there", 16), ("other", 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(f'{{"lora_alpha": {scale}}}')
        (tmp_path / name / "README.md").write_text(name)

    def said(before, after):
        sides = ({"config": {"adapter": str(tmp_path / name)}, "data": data_fingerprint([]),
                  "adapter": adapter_fingerprint(str(tmp_path / name))} for name in (before, after))  # fmt: skip
        return differences(*sides)[0]

    assert not said("here", "there") and not said("here", "here")
    assert said("here", "other")[0].startswith("adapter: ") and said("gone", "lost")[0].startswith("adapter: ")
    with pytest.raises(ConfigError, match="cannot change that"):
        check_changes(said("here", "other"), allowed=True, mid_batch=False)
