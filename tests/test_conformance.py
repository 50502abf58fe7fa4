"""The points of the conformance suite find what they are there for: each is given a family that is wrong in one way.

And the command that runs them, on a family of the user's own too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from family_cases import subject_of
from safetensors.torch import load_file, save_file

from covo_rl.cli import main
from covo_rl.models import family_class, load_family
from covo_rl.models.builtin import TINY_MODELS, resolve_model
from covo_rl.policy import policy
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.rows import packed_hidden
from covo_rl.run.conformance import POINTS, Subject, check_family, exports, learning
from covo_rl.run.conformance import subject as subject_module
from covo_rl.run.conformance.command import tiny_of
from covo_rl.run.conformance.outcome import Figure, Gap, PointOutcome, outcome_of
from covo_rl.run.conformance.table import plain_text, tally

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
    kind = family_class(name)
    wrong = broken(name, slots=lambda self, tensors: kind.slots(self, tensors) + 1)
    assert "embeddings for" in failures("slots", wrong)
    counted = broken(name, slot_count=lambda self, samples: kind.slot_count(self, samples) + 1)
    text = failures("slots", counted)
    assert "lengths whose counts disagree" in text and "41.0 s: slots" in text


def test_a_limit_that_is_not_held():
    text = failures(
        "slots", broken("qwen3_asr", max_clip_seconds=20.0, _seconds=lambda self, samples, rate: samples / rate)
    )
    assert "max_clip_seconds 20 is not held" in text and "cut silently" in text


def test_a_clip_that_hears_the_next():
    def encode(self, clips):
        alone = super(type(self), self).encode(clips)
        return [rows + 1e-6 * len(clips) for rows in alone]

    assert "rows_independent = False" in failures("embeddings in any company", broken("qwen3_asr", encode=encode))


@pytest.mark.parametrize("name", ["voxtral", "phi4_multimodal"])
def test_a_clip_that_is_cut_without_a_word(name):
    """Their stock processors do not load here, and every count is of what was left."""
    kind = family_class(name)
    wrong = broken(name, extract=lambda self, samples: kind.extract(self, samples[: 30 * 16_000]))
    assert "the last 0.5 s of 41 s silent, change 0 (at least 1e-06)" in failures("slots", wrong)


def test_rows_that_are_not_independent_though_the_family_says_so():
    """On a CPU clips are encoded one by one all the same, on a GPU not."""
    assert "in one call, as on a GPU" in failures(
        "embeddings in any company", broken("musicflamingo", rows_independent=True)
    )


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
    assert "KeyError" in text and "test_conformance.py" in text and "\x1b" not in text
    assert "failed" in tally(outcomes)


def test_a_large_model_is_checked_with_its_layers_recomputed_and_exported_on_request_only(monkeypatch):
    for module in (subject_module, learning, exports):
        monkeypatch.setattr(module, "LIGHT", 0)
    subject = subject_of("qwen3_asr")
    subject.exports, modes = None, []
    layer = subject.family.decoder.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: modes.append(layer.training and layer.gradient_checkpointing))
    states = {outcome.point: outcome for outcome in check_family(subject)}
    assert any(modes) and states["exports"].state == "not run" and "--exports does it" in str(states["exports"].gaps[0])
    others = {name: outcome.state for name, outcome in states.items() if name != "exports"}
    assert set(others.values()) == {"passed"}, plain_text(list(states.values()))
    assert not any(module.training for module in subject.family.model.modules())


def test_16_bits_are_held_to_what_rounding_makes():
    subject = subject_of("qwen3_asr")
    subject.family.model.to(torch.bfloat16)
    outcomes = list(check_family(subject))
    assert not [outcome for outcome in outcomes if outcome.state == "failed"], plain_text(outcomes)
    text = plain_text(outcomes)
    assert "(at most 0.15)" in text and "greedy ids after the first: not run: torch.bfloat16 rounds" in text


def test_what_could_not_be_looked_at_is_never_passed():
    good, bad = Figure("a", 0.0, 1e-5, "x"), Figure("a", float("nan"), 1e-5, "x")
    gap = Gap("exports", "9 GB are free")
    assert PointOutcome("p", (good,)).state == "passed" and PointOutcome("p", (good, bad)).state == "failed"
    assert PointOutcome("p", (good,), (gap,)).state == "in part" and PointOutcome("p", (), (gap,)).state == "not run"
    assert PointOutcome("p").state == "not run"
    assert not Figure("a", 1e-3, 1e-3 + 1e-9, "x", least=True).ok and Figure("a", 2e-3, 1e-3, "x", least=True).ok
    assert tally([PointOutcome("p", (good,), (gap,)), PointOutcome("q", (bad,))]) == "1 failed, 1 in part, of 2 points"
    assert json.dumps(str(bad)).count("nan") == 1


# -- the command, and a family of one's own ----------------------------------------------------------------------------


def models(capsys, *words: str) -> tuple[int, str]:
    """Exit code and output of `covo-rl models WORDS`, without rulers, white space squeezed."""
    with pytest.raises(SystemExit) as stop:
        main(["models", *words])
    code = stop.value.code
    return (code if isinstance(code, int) else 1), " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_the_family_that_the_docs_print_is_checked_as_they_say(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "class Mine" in block]
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    (line,) = re.findall(r"^covo-rl models (check .* --family .*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("covo_rl.models.registry._CHOSEN", {})
    before = sorted(tmp_path.iterdir())
    code, text = models(capsys, *line.split(), "--no-exports")
    assert code == 0 and ":Mine," in text and "9 passed, 1 not run, of 10 points" in text, text
    assert "failed" not in text and "exports not run" in text and "left out, as asked" in text
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_a_check_that_fails_ends_with_1_and_names_figure_limit_and_cause(tmp_path, capsys, monkeypatch):
    wrong = "from covo_rl.models.qwen3_asr import Qwen3Asr\n\n\nclass Wrong(Qwen3Asr):\n"
    wrong += "    def encode(self, clips):\n        return [rows + len(clips) - 1 for rows in super().encode(clips)]\n"
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr("covo_rl.models.registry._CHOSEN", {})
    code, text = models(
        capsys, "check", "qwen3_asr", "--random", "--no-exports", "--family", f"{tmp_path}/wrong.py:Wrong"
    )
    assert code == 1 and "1 failed" in text and "embeddings in any company failed" in text
    assert "difference 2 (at most 0): clips share an encoder call" in text


def test_what_models_shows_of_a_name_and_of_none(capsys):
    _, text = models(capsys, "show", "voxtral")
    assert "voxtral: a family" in text and "up to 2400 s" in text and "mistralai/Voxtral-Mini-3B-2507" in text
    _, short = models(capsys, "voxtral")
    assert short == text
    _, text = models(capsys, "list")
    assert all(f"builtin:tiny_{name}" in text for name in TINY_MODELS) and "qwen3_omni_moe_thinker" in text
    code, text = models(capsys, "check", "no_such_family", "--random")
    assert code == 1 and "no such folder" in text
    _, text = models(capsys, "show", "qwen3_omni_moe")  # what config.json of the whole checkpoint says
    assert "Qwen/Qwen3-Omni-30B-A3B-Instruct" in text and "covo-rl models check builtin:tiny_qwen3_omni_moe" in text
    _, text = models(capsys, "show", "granite_speech_plus")
    assert "builtin:tiny_granite_speech, of granite_speech" in text
    _, text = models(capsys, "builtin:tiny_qwen2_5_omni")
    assert "qwen2_5_omni_thinker" in text and "LoRA trains" in text


def test_a_model_that_memory_does_not_hold_is_refused_before_it_is_loaded(capsys, monkeypatch):
    free = namedtuple("Memory", "available")(available=500_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    code, text = models(capsys, "check", "builtin:tiny_glmasr")
    assert code == 1 and re.search(r"weights of 0\.\d+ GB in float32, and 0\.0 GB of memory are free", text), text


@pytest.mark.parametrize("name", ["qwen3_omni_moe_thinker", "qwen2_5_omni", "granite_speech_plus"])
def test_random_means_the_tiny_model_of_the_same_family(name):
    assert tiny_of(name) in (f"builtin:tiny_{kind}" for kind in ("qwen3_omni_moe", "qwen2_5_omni", "granite_speech"))
