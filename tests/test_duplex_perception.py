"""Streams from their sound: what is taught of each chunk, that it is learnt, that features are those of a session."""

import copy

import numpy as np
import pytest
import torch

from covo_rl.duplex.config import duplex_options
from covo_rl.duplex.features import FALL, TEST_COUNTS, WORDS, FeatureStream, Sound, draw_streams, percepts
from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.perception import (
    MOVEMENTS,
    TAGS,
    PerceptionOptions,
    chunk_tags,
    feature_auc,
    fresh_ears,
    learn_to_hear,
    perceive,
    tag_losses,
)
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.training import question_logits
from covo_rl.duplex.waves import feature_world, hear, stream_wave, wave_listener
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.models.tiny.covo_audio import tiny_covo_audio
from covo_rl.resolve import find, read_yaml
from covo_rl.supervised.duplex_stage import new_duplex_family


def encoder(width=32, left_chunks=4, **options):
    sizes = {"encoder_width": width, "mel_bins": 32, "decoder_width": 32, "decoder_layers": 1, "adapter_hidden": 64}
    model, _ = tiny_covo_audio(**sizes | {"encoder_layers": 1} | options, segment_seconds=1.28)
    return StreamingEncoder(model.eval(), left_chunks)


def one_word():
    """A digit in the first two chunks, whose pitch and level fall; then silence."""
    sound = Sound(0.0, 0.32, 3, pitch=-1.0, fall=1.0)
    return FeatureStream(
        id="rl-x", kind="single", first_chunk=0, decisions=4, turn_end=0.32, sounds=(sound,), chunks=4, shift_chunk=3,
        gold_stop=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def few():
    streams = draw_streams("rl", {"single": 2, "pause": 1}, seed=0)
    return streams, [stream_wave(stream) for stream in streams]


def test_tags_of_a_chunk_are_those_of_its_sound_and_of_the_one_before():
    tags = chunk_tags(one_word())
    digit, silence = np.zeros(TAGS), np.zeros(TAGS)
    digit[[0, 1, 2, MOVEMENTS + 1 + 3]], silence[MOVEMENTS] = (1, -1, 1, 1), 1
    assert tags.shape == (4, 2, TAGS)
    np.testing.assert_allclose(tags[:, 0], [digit, digit, silence, silence], atol=1e-6)
    np.testing.assert_allclose(tags[:, 1], [silence, digit, digit, silence], atol=1e-6)


def test_losses_of_tags_are_cross_entropy_and_squares_and_leave_out_what_is_no_stream():
    tags = torch.from_numpy(chunk_tags(one_word()))[None]
    losses = tag_losses(torch.zeros(1, 4, 2, TAGS), tags, torch.tensor([[1.0, 1, 0, 0]]))
    assert losses["words"] == pytest.approx(np.log(WORDS + 1))
    # level, pitch and fall of three of the four tags are 1, -1, 1
    assert losses["movements"] == pytest.approx(16.0 * 3 * 3 / 4)


def test_a_wave_has_its_chunks_and_other_voices_in_a_test():
    streams = [*draw_streams("rl", 2, seed=0), *draw_streams("test", 1, seed=0)]
    waves = [stream_wave(stream) for stream in streams]
    assert [len(wave) for wave in waves] == [CHUNK_SAMPLES * stream.chunks for stream in streams]
    assert np.array_equal(waves[1], stream_wave(streams[1]))
    assert not np.array_equal(waves[1][:3000], waves[0][:3000])


def test_features_of_whole_streams_are_those_that_a_session_hears(few):
    streams, waves = few
    ears = encoder()
    fresh_ears(ears, waves)
    features = [*map(wave_listener(ears), streams)]
    assert [tuple(row.shape) for row in features] == [(stream.chunks, 32) for stream in streams]
    pushed = [ears.push(waves[1][start : start + 5000]) for start in range(0, len(waves[1]), 5000)]
    torch.testing.assert_close(torch.cat([*pushed, ears.end()]), features[1], rtol=0, atol=1e-4)


def test_what_is_heard_reaches_the_features_of_fresh_ears(few):
    ears = encoder()
    assert torch.cat([hear(ears, wave) for wave in few[1][:2]]).std(0).mean() < 1e-3
    fresh_ears(ears, few[1])
    assert 0.1 < torch.cat([hear(ears, wave) for wave in few[1][:2]]).std(0).mean() < 10


def test_hearing_is_learnt_by_encoder_and_adapter_alone_which_then_are_frozen(few):
    ears = encoder()
    fresh_ears(ears, few[1])
    before = copy.deepcopy(ears.model.state_dict())
    options = PerceptionOptions(perception_steps=25, perception_batch=4, perception_chunks=12)
    log = learn_to_hear(ears, *few, options)
    assert log[-1]["step"] == 25 and log[-1]["words"] < 0.95 * np.log(WORDS + 1)
    changed = {name for name, weight in ears.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"encoder", "audio_adapter"}
    assert "encoder.embed_positions.weight" not in changed and "encoder.layers.0.fc1.weight" in changed
    trained = {name.split(".")[0] for name, weight in ears.model.named_parameters() if weight.requires_grad}
    assert trained == {"llm"}
    features_ND = torch.cat([hear(ears, wave) for wave in few[1]])
    torch.testing.assert_close(features_ND.mean(0), torch.zeros(32), rtol=0, atol=1e-3)
    torch.testing.assert_close(features_ND.std(0), torch.ones(32), rtol=0, atol=1e-3)


def test_the_probe_sees_the_chunks_of_the_last_word_and_no_more():
    streams = draw_streams("test", {"pause": 60, "single": 20}, seed=0, cue="prosody")
    heard = [torch.from_numpy(percepts(stream)) for stream in streams]
    noise = torch.Generator().manual_seed(0)
    silent = [torch.randn(row.shape, generator=noise) for row in heard]
    assert feature_auc(streams, heard) == 1.0
    assert feature_auc(streams, [row[:, [FALL]] for row in heard]) == 1.0
    # 0.3 s into a silence nothing is heard
    assert feature_auc(streams, heard, chunks=1) == pytest.approx(0.5)
    assert feature_auc(streams, silent) == pytest.approx(0.5, abs=0.15)


def test_a_model_with_ears_is_asked_by_what_it_hears(few):
    config = duplex_options({"wav": read_yaml(find("recipes", "configs/tiny_duplex_wav.yaml"))}).duplex
    given = duplex_options({"given": read_yaml(find("recipes", "configs/tiny_duplex.yaml"))}).duplex
    family = new_duplex_family(16, 1, 0, ears=config.features == "wav")
    question, given_question = (feature_world(family, each).questions(few[0][:1])[0] for each in (config, given))
    given_ids = given_question.trunk.ids  # without a system message
    assert question.trunk.ids[-len(given_ids) :] == given_ids and len(question.trunk.ids) > len(given_ids) > 50
    assert question.features_UD.shape == given_question.features_UD.shape
    torch.testing.assert_close(question.features_UD, hear(StreamingEncoder.of(family.model), few[1][0]))


@pytest.mark.slow
def test_the_end_of_a_turn_is_heard_in_voices_that_never_taught():
    ears = encoder(64, encoder_layers=2, mel_bins=64)
    report = perceive(ears, PerceptionOptions(perception_streams=300, perception_steps=300), seed=0)
    assert report["auc"] >= 0.85
    blind = draw_streams("test", {kind: TEST_COUNTS[kind] // 2 for kind in ("pause", "single")}, seed=1, cue="none")
    assert feature_auc(blind, [*map(wave_listener(ears), blind)]) < 0.65


def test_hazards_of_a_stream_are_those_of_a_session_that_hears_it(few):
    """What RL trains is what is used afterwards: the same system message, features and masks."""
    streams, waves = few
    family = new_duplex_family(32, 1, seed=0, ears=True)
    world = feature_world(
        family, duplex_options({"wav": read_yaml(find("recipes", "configs/tiny_duplex_wav.yaml"))}).duplex
    )
    assert len(world.prefix) < 30
    with torch.no_grad():  # new rows are all alike: no decision would be likelier than another
        family.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    live = DuplexSession(family, StreamingEncoder.of(family.model), ids=world.ids, max_turn_seconds=1)
    asked = question_logits(family, world.questions(streams), world.ids)
    for stream, wave_T, z_K in zip(streams, waves, asked, strict=True):
        live.reset()
        live.follow(ChunkDecision(world.ids.think) for _ in range(stream.chunks))
        events = live.push(wave_T) + live.end()
        heard = [event.stop_logit for event in events if event.type == "decision"]
        assert z_K.std() > 0.01
        torch.testing.assert_close(z_K, torch.tensor(heard)[: len(z_K)], atol=2e-5, rtol=0)
