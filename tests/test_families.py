"""Every family computes what its model computes: the ten points of covo_rl/run/conformance on tiny random models."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
import torch
from family_cases import subject_of

from covo_rl.config import parse_options
from covo_rl.export.questions import answer_questions, is_ours
from covo_rl.models import load_family
from covo_rl.models.builtin import TINY_MODELS
from covo_rl.models.tiny import tiny_model
from covo_rl.run.conformance import POINTS, check_family
from covo_rl.run.conformance.exports import exports_judged, write_exports
from covo_rl.run.conformance.hearing import is_unheard, unread_tensors
from covo_rl.run.conformance.outcome import outcome_of
from covo_rl.run.conformance.subject import RATE
from covo_rl.run.conformance.table import plain_text
from covo_rl.run.doctor import plan_options
from covo_rl.run.published import PUBLISHED
from covo_rl.run.sizes import audio_positions, shape_of, sizes_of

#: families whose stock processor does not load here, and why: it draws pictures, resamples with torchaudio, or takes
#: audio in its own template only
NO_STOCK_PROCESSOR = {
    "voxtral", "qwen2_5_omni", "qwen3_omni_moe", "granite_speech", "gemma4", "gemma3n", "phi4_multimodal",
}  # fmt: skip


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


# -- sizes without weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_doctor_counts_parameters_and_positions_as_the_family_does(name):
    subject = subject_of(name)
    config = subject.family.model.config
    assert shape_of(sizes_of(str(subject.folder))).total == sum(p.numel() for p in subject.family.model.parameters())
    for seconds in (3.0, 20.0):
        slots = subject.family.clip_slots(subject.wave(0, seconds), RATE)
        assert audio_positions(config, seconds) == pytest.approx(slots, abs=2), seconds


#: billions of parameters: what the cards say, less a vision tower where they have one
@pytest.mark.parametrize(
    ("name", "billions"),
    [("nvidia/audio-flamingo-3-hf", 8.3), ("mistralai/Voxtral-Mini-3B-2507", 4.7), ("Qwen/Qwen2.5-Omni-7B", 8.93 - 0.7),
     ("mistralai/Voxtral-Small-24B-2507", 24.3), ("Qwen/Qwen3-Omni-30B-A3B-Instruct", 31.7 - 0.5),
     ("google/gemma-3n-E4B-it", 7.85 - 0.3), ("ibm-granite/granite-speech-3.3-8b", 8.7)],
)  # fmt: skip
def test_published_sizes_add_up_to_what_the_cards_say(name, billions):
    assert shape_of(sizes_of(name)).total / 1e9 == pytest.approx(billions, rel=0.02)


#: GiB on one rank, without sharding
@pytest.mark.parametrize(
    ("name", "gib"),
    [("qwen2_5_omni_7b", 80), ("audio_flamingo_3", 80), ("voxtral_mini", 40), ("granite_speech", 80),
     ("qwen3_omni", 2 * 80)],
)  # fmt: skip
def test_a_recipe_fits_the_memory_that_it_names(name, gib):
    path = Path(__file__).parent.parent / "recipes" / "configs" / f"{name}_lora.yaml"
    options = parse_options(["--config", str(path)])
    assert plan_options(options).peak < gib * 1e9
    assert options.model.model in PUBLISHED and f"runs/{name}_lora" == str(options.train.output)
