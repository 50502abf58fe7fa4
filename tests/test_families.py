"""Every family computes what its model computes: the ten points of covo_rl/run/conformance on tiny random models.

And the points themselves: each is given a family that is wrong in the one way that it is there to find.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from covo_rl.export.questions import answer_questions, is_ours
from covo_rl.models import load_family
from covo_rl.models.builtin import TINY_MODELS, resolve_model
from covo_rl.models.tiny import tiny_model
from covo_rl.policy import policy
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.rows import packed_hidden
from covo_rl.run.conformance import POINTS, Subject, check_family
from covo_rl.run.conformance.exports import exports_judged, write_exports
from covo_rl.run.conformance.hearing import is_unheard, unread_tensors
from covo_rl.run.conformance.outcome import Figure, Gap, Outcome, outcome_of
from covo_rl.run.conformance.subject import RATE
from covo_rl.run.conformance.table import plain_text, verdict
from covo_rl.run.sizes import audio_positions, shape_of, sizes_of

#: families whose stock processor does not load here, and why: it draws pictures, resamples with torchaudio, or takes
#: audio in its own template only
NO_STOCK_PROCESSOR = {
    "voxtral", "qwen2_5_omni", "qwen3_omni_moe", "granite_speech", "gemma4", "gemma3n", "phi4_multimodal",
}  # fmt: skip


def subject_of(name: str) -> Subject:
    path = resolve_model(f"builtin:tiny_{name}")
    return Subject(load_family(path), path, exports=False)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_family_computes_what_its_model_computes(name):
    outcomes = list(check_family(subject_of(name)))
    assert [outcome.point for outcome in outcomes] == list(POINTS)
    assert not [outcome for outcome in outcomes if outcome.state == "failed"], plain_text(outcomes)
    left_out = {gap.what for outcome in outcomes for gap in outcome.gaps}
    expected = {"adapter and merged export", *({"the stock processor"} if name in NO_STOCK_PROCESSOR else ())}
    assert left_out == expected, plain_text(outcomes)  # exports: the next test, in one process for all


def test_exports_of_all_families_equal_their_policies_in_a_fresh_process(tmp_path):
    subjects = {name: subject_of(name) for name in TINY_MODELS}
    folders: dict[bool, list[Path]] = {False: [], True: []}
    gaps = {}
    for name, subject in subjects.items():
        folder = tmp_path / name
        folder.mkdir()
        gaps[name] = list(write_exports(subject, folder))
        folders[is_ours(subject.family)].append(folder)
    assert not any(gaps.values()), gaps
    for own, some in folders.items():
        if some:
            answer_questions(some, own=own)
    outcomes = {name: outcome_of(name, exports_judged(subject, tmp_path / name)) for name, subject in subjects.items()}
    assert {name: outcome.state for name, outcome in outcomes.items()} == dict.fromkeys(TINY_MODELS, "passed"), (
        plain_text(list(outcomes.values()))
    )


def test_every_family_has_a_table_of_published_names():
    assert set(published.tables()) == set(TINY_MODELS)


@pytest.mark.parametrize("name", published.tables())
def test_the_published_layout_loads_tensor_by_tensor(name, tmp_path):
    model, processor = tiny_model(name)
    ours = published.write_published(model, processor, published.tables()[name], tmp_path)
    family = load_family(str(tmp_path))
    state = family.model.state_dict()
    for key, tensor in ours.items():
        if key in state or not is_unheard(key):
            assert torch.equal(state[key], tensor), key
    assert not [key for key in unread_tensors(type(family.model), str(tmp_path)) if not is_unheard(key)]


# -- the points find what they are there for ---------------------------------------------------------------------------


def broken(name: str, **replacements) -> Subject:
    """A subject whose family has these attributes of its class replaced."""
    subject = subject_of(name)
    kind = type(subject.family)
    subject.family.__class__ = type(f"Broken{kind.__name__}", (kind,), replacements)
    return subject


def failures(point: str, subject: Subject) -> str:
    """The figures that failed, as text."""
    outcome = outcome_of(point, POINTS[point](subject))
    assert outcome.state == "failed", plain_text([outcome])
    return "\n".join(outcome.lines()[: 1 + sum(not figure.ok for figure in outcome.figures)])


def test_slots_that_are_one_too_many(name="covo_audio"):
    kind = type(subject_of(name).family)
    wrong = broken(name, slots=lambda self, tensors: kind.slots(self, tensors) + 1)
    assert "embeddings for" in failures("slots", wrong)
    counted = broken(name, slot_count=lambda self, samples: kind.slot_count(self, samples) + 1)
    text = failures("slots", counted)
    assert "lengths whose counts disagree" in text and "41.0 s: slots" in text


def test_a_limit_that_is_not_held():
    text = failures("slots", broken("qwen3_asr", max_clip_seconds=20.0, _check_length=lambda self, seconds: None))
    assert "max_clip_seconds 20 is not held" in text and "cut silently" in text


def test_a_clip_that_hears_the_next():
    def encode(self, clips):
        alone = super(type(self), self).encode(clips)
        return [rows + 1e-6 * len(clips) for rows in alone]

    assert "rows_independent = False" in failures("embeddings in any company", broken("qwen3_asr", encode=encode))


def test_a_head_that_forgets_to_scale_agrees_with_its_own_forward_and_is_found_all_the_same():
    """Granite Speech in transformers forgets `logits_scaling`: only the text model's class knows it."""
    subject = subject_of("granite_speech")
    subject.family.model.lm_head._forward_hooks.clear()
    assert "logits_scaling" in failures("text = CausalLM", subject)
    assert outcome_of("packed", POINTS["packed = plain rows"](subject)).state == "passed"


def test_a_decoder_that_misses_an_input():
    def decoder_inputs(self, ids, embeds):
        return {name: value * 0 for name, value in super(type(self), self).decoder_inputs(ids, embeds).items()}

    text = failures("packed = plain rows", broken("gemma4", decoder_inputs=decoder_inputs))
    assert "log-probs" in text and "gradients" in text


def test_windows_that_are_not_seen(monkeypatch):
    original = PackedLayout.attend
    monkeypatch.setattr(PackedLayout, "attend", lambda self, *args: original(self, *args[:5]))
    assert "with windows of 16" in failures("packed = plain rows", subject_of("gemma4"))


def test_a_completion_that_sees_another(monkeypatch):
    def leaking(*args):
        hidden = packed_hidden(*args)
        return hidden + 1e-4 * hidden.mean(0)

    monkeypatch.setattr(policy, "packed_hidden", leaking)
    assert "packable = False" in failures("no leak", subject_of("qwen3_asr"))


def test_an_adapter_that_is_not_what_is_printed():
    subject = subject_of("qwen3_asr")
    object.__setattr__(subject.trainable, "targets", subject.trainable.targets[1:])
    assert "adapted or printed, not both 1" in failures("what trains", subject)


def test_a_frozen_weight_that_moves():
    subject = subject_of("qwen3_asr")
    weight = next(p for name, p in subject.family.model.named_parameters() if "layers.0.input_layernorm" in name)

    def drift(*_):
        weight.data.mul_(1.0001)

    subject.family.decoder.register_forward_hook(drift)
    text = failures("three GRPO steps", subject)
    assert "frozen parameters that changed 1" in text and "input_layernorm" in text


def test_sound_that_is_not_heard():
    wrong = broken("qwen3_asr", encode=lambda self, clips: [torch.zeros(c.slots, 64) + 0.1 for c in clips])
    assert "does not hear it" in failures("sampling, greedy, hearing", wrong)


def test_tensors_that_nothing_reads_and_parts_with_a_wrong_prefix(tmp_path):
    folder = shutil.copytree(resolve_model("builtin:tiny_qwen3_asr"), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.language_model.layers.9.extra": torch.zeros(2), "model.visual.patch": torch.zeros(2)},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    subject = Subject(load_family(str(folder)), str(folder))
    text = failures("weights and parts", subject)
    assert "nothing reads 1" in text and "layers.9.extra" in text and "visual" not in text
    subject.family.parts = {**subject.family.parts, "encoder": "model.ears."}
    text = failures("weights and parts", subject)
    assert "wrong prefix of encoder" in text and "`parts` misses model.audio_tower" in text


def test_what_a_family_raises_is_a_failure_with_its_place_and_the_next_points_go_on():
    def extract(self, samples):
        raise KeyError("mel\x1b[31m")

    outcomes = list(check_family(broken("qwen3_asr", extract=extract)))
    states = {outcome.point: outcome.state for outcome in outcomes}
    assert states["slots"] == states["three GRPO steps"] == "failed" and states["weights and parts"] == "passed"
    text = plain_text(outcomes)
    assert "KeyError" in text and "test_families.py" in text and "\x1b" not in text
    assert "failed" in verdict(outcomes)


def test_what_could_not_be_looked_at_is_never_passed():
    good, bad = Figure("a", 0.0, 1e-5, "x"), Figure("a", float("nan"), 1e-5, "x")
    gap = Gap("exports", "9 GB are free")
    assert Outcome("p", (good,)).state == "passed" and Outcome("p", (good, bad)).state == "failed"
    assert Outcome("p", (good,), (gap,)).state == "in part" and Outcome("p", (), (gap,)).state == "not run"
    assert Outcome("p").state == "not run"
    assert not Figure("a", 1e-3, 1e-3 + 1e-9, "x", least=True).ok and Figure("a", 2e-3, 1e-3, "x", least=True).ok
    assert verdict([Outcome("p", (good,), (gap,)), Outcome("q", (bad,))]) == "1 failed, 1 in part, of 2 points"
    assert json.dumps(str(bad)).count("nan") == 1


# -- sizes without weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_doctor_counts_positions_as_the_family_does(name):
    subject = subject_of(name)
    config = subject.family.model.config
    for seconds in (3.0, 20.0):
        slots = subject.family.clip_slots(subject.clip(0, seconds).array, RATE)
        assert audio_positions(config, seconds) == pytest.approx(slots, abs=2), seconds


#: billions of parameters: what the cards say, less a vision tower where they have one
@pytest.mark.parametrize(
    ("name", "billions"),
    [("nvidia/audio-flamingo-3-hf", 8.3), ("mistralai/Voxtral-Mini-3B-2507", 4.7), ("Qwen/Qwen2.5-Omni-7B", 8.9 - 0.7),
     ("mistralai/Voxtral-Small-24B-2507", 24.3), ("Qwen/Qwen3-Omni-30B-A3B-Instruct", 31.7 - 0.5),
     ("google/gemma-3n-E4B-it", 7.85 - 0.3), ("ibm-granite/granite-speech-3.3-8b", 8.7)],
)  # fmt: skip
def test_published_sizes_add_up_to_what_the_cards_say(name, billions):
    assert shape_of(sizes_of(name)).total / 1e9 == pytest.approx(billions, rel=0.02)
