"""The streaming encoder: streams equal the definition, nothing later reaches a feature, clips stay as they were."""

import copy
import statistics
import time

import numpy as np
import pytest
import torch

from covo_rl.models.covo_audio import CovoAudioFeatureExtractor, streaming_encoder
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.models.covo_audio.streaming_mel import StreamingMel
from covo_rl.models.tiny.covo_audio import tiny_covo_audio

CHUNK = 3840  # samples of 0.16 s at 24 kHz
SHORT = (1, 2559, 2560, 2561, 3839, 3840, 3841, 3840 + 307, 3840 + 308, 72000, 72777)
CONTEXTS = (0, 1, 3, None)


def small_model(seconds=3.0, **options):
    """So many seconds of positions; an adapter that keeps the features' size, so that 1e-5 says something."""
    sizes = {"encoder_width": 32, "decoder_width": 32, "decoder_layers": 1, "adapter_hidden": 48, "mel_bins": 40}
    model, _ = tiny_covo_audio(**sizes, segment_seconds=seconds, initializer_range=0.2, **options)
    generator = torch.Generator().manual_seed(1)
    for weight in model.audio_adapter.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


def noise(samples, seed=0):
    """Noise whose level moves over 60 dB, with silence in it."""
    generator = torch.Generator().manual_seed(seed)
    level = 10 ** (1.5 * torch.sin(torch.arange(samples) / 9000) - 1.5)
    wave = torch.randn(samples, generator=generator) * level * 0.2
    wave[samples // 2 : samples // 2 + 5000] = 0
    return wave


def streamed(encoder, wave, seed):
    """Pushed in pieces of 1 sample to 1 s, then ended."""
    random, place, features = np.random.default_rng(seed), 0, []
    encoder.reset()
    while place < wave.shape[-1]:
        size = int(24000 ** random.random())
        features.append(encoder.push(wave[..., place : place + size]))
        place += size
    return torch.cat([*features, encoder.end()], -2)


def check_equivalence(model, left_chunks, length, seed, rate=None):
    encoder, wave = StreamingEncoder(model, left_chunks, sampling_rate=rate), noise(length, seed)
    with torch.no_grad():
        offline = encoder.offline_features(wave)
    stream = streamed(encoder, wave, seed)
    assert offline.shape == stream.shape == (-(-length // encoder.mel.chunk_samples), 32)
    assert offline.abs().mean() > 0.1
    torch.testing.assert_close(stream, offline, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left_chunks", CONTEXTS)
def test_a_stream_in_any_pieces_gives_the_features_of_the_whole(model, left_chunks):
    for seed, length in enumerate(SHORT):
        check_equivalence(model, left_chunks, length, seed)


def test_so_it_does_at_the_mels_own_rate(model):
    for seed, length in enumerate((1, 2559, 2560, 2561, 2560 + 199, 2560 + 200, 8000)):
        check_equivalence(model, 1, length, seed, rate=16000)


def test_positions_wrap_after_their_3_seconds(model):
    check_equivalence(model, 3, 7 * 24000, 0)


@pytest.mark.parametrize("left_chunks", [0, 1, 3])
def test_windows_of_a_whole_stream_change_neither_features_nor_gradients(model, left_chunks, monkeypatch):
    """44 chunks in windows of 2, 4 and 12, against one mask over all of them."""
    encoder, found = StreamingEncoder(model, left_chunks), []
    for chunks in (2, 1000):
        monkeypatch.setattr(streaming_encoder, "WINDOW_CHUNKS", chunks)
        features = encoder.offline_features(noise(7 * 24000))
        gradient = torch.autograd.grad(features.square().sum(), model.encoder.conv1.weight)[0]
        found.append((features.detach(), gradient / gradient.norm()))
    for windows, whole in zip(*found, strict=True):
        torch.testing.assert_close(windows, whole, rtol=0, atol=1e-5)


def test_a_long_stream_never_has_a_mask_over_all_of_it(model, monkeypatch):
    made, encoder = [], StreamingEncoder(model, 50)
    mask = encoder._mask
    monkeypatch.setattr(encoder, "_mask", lambda chunks, like: made.append(chunks) or mask(chunks, like))
    with torch.no_grad():
        assert len(encoder.offline_features(noise(400 * CHUNK))) == 400
    assert made == [200, 250]  # the second behind the 50 chunks that its first one sees


@pytest.mark.slow
@pytest.mark.parametrize("left_chunks", [*CONTEXTS, 50])
def test_35_seconds_with_every_context(left_chunks):
    published = small_model(30.0)
    for seed in range(2):
        check_equivalence(published, left_chunks, 35 * 24000, seed)


def gradient(encoder, wave, chunk):
    wave = wave.clone().requires_grad_()
    feature = encoder.offline_features(wave)[chunk]
    return torch.autograd.grad((feature * torch.linspace(-1, 2, len(feature))).sum(), wave)[0]


@pytest.mark.parametrize(("rate", "chunk_samples", "look_ahead"), [(16000, 2560, 200), (24000, 3840, 308)])
def test_a_feature_depends_on_200_samples_of_the_next_chunk_and_on_nothing_later(
    model, rate, chunk_samples, look_ahead
):
    encoder = StreamingEncoder(model, sampling_rate=rate)
    wave = torch.randn(5 * chunk_samples, generator=torch.Generator().manual_seed(0)) * 0.3
    for chunk in range(4):
        end = chunk_samples * (chunk + 1) + look_ahead
        found = gradient(encoder, wave, chunk)
        assert found[end:].eq(0).all() and found[end - 1] != 0
    assert encoder.mel.look_ahead == look_ahead


def test_push_gives_a_feature_with_the_sample_that_completes_it(model):
    encoder = StreamingEncoder(model)
    wave = noise(2 * CHUNK + 308)
    assert encoder.push(wave[: CHUNK + 307]).shape == (0, 32)
    assert encoder.push(wave[CHUNK + 307 : CHUNK + 308]).shape == (1, 32)
    assert encoder.push(wave[CHUNK + 308 :]).shape == (1, 32)
    assert encoder.end().shape == (1, 32)


def test_context_reaches_as_far_back_as_it_says(model):
    # Two layers of one chunk each and the adapter's chunk: feature 6 begins with chunk 3, whose first encoder frame
    # sees two mel frames before it, and the Hann window is 0 at its first sample. m never moves from 4.
    encoder = StreamingEncoder(model, 1, mel_peak=4.0, sampling_rate=16000)
    wave = torch.randn(7 * 2560, generator=torch.Generator().manual_seed(0)) * 0.3
    first = int(gradient(encoder, wave, 6).nonzero()[0])
    assert first == 3 * 2560 - 2 * 160 - 199


def test_the_floor_follows_the_loudest_frame_so_far(model):
    mel = StreamingMel(model.config, 16000)
    wave = torch.cat([noise(8000, 1) * 0.01, noise(8000, 2) * 3])[None]
    raw, _ = mel.log_mel(torch.nn.functional.pad(wave, (200, 0)), torch.tensor([-20.0]))
    floored, peaks = mel.log_mel(torch.nn.functional.pad(wave, (200, 0)), torch.tensor([0.0]))
    largest, expected = 0.0, []
    for frame in (raw[0] * 4 - 4).T:  # floored by less than it shows: m is at most the first frame's own value
        largest = max(largest, float(frame.max()))
        expected.append(torch.clamp(frame, min=largest - 8))
    torch.testing.assert_close(floored[0] * 4 - 4, torch.stack(expected, 1), rtol=0, atol=1e-5)
    assert peaks[0, 0] == 0 and peaks[0, -1] == pytest.approx(largest)


def test_the_mel_is_the_published_one_where_the_loudest_frame_is_past(model):
    wave = torch.cat([torch.randn(4800, generator=torch.Generator().manual_seed(3)), noise(67200)])
    clip = CovoAudioFeatureExtractor.from_model_config(model.config).log_mel(wave)
    stream = StreamingMel(model.config).whole(wave[None], torch.zeros(1))[0]
    loudest = int(clip[:, :25].amax(0).argmax())
    assert clip.amax() == clip[:, loudest].amax()
    torch.testing.assert_close(stream[:, loudest:298], clip[:, loudest:298], rtol=0, atol=2e-4)


def test_sessions_in_step_are_those_sessions_alone(model):
    waves = torch.stack([noise(30000, seed) for seed in range(3)])
    encoder = StreamingEncoder(model, 1)
    together = streamed(encoder, waves, 0)
    assert together.shape == (3, 8, 32)
    for wave, features in zip(waves, together, strict=True):
        torch.testing.assert_close(streamed(encoder, wave, 5), features, rtol=0, atol=1e-5)
    padded = encoder.offline_features(torch.nn.functional.pad(waves[0, :20000], (0, 10000)))
    torch.testing.assert_close(padded[:6], encoder.offline_features(waves[0, :20000]), rtol=0, atol=1e-5)


def test_a_fork_goes_on_by_itself(model):
    encoder, (head, one, other) = StreamingEncoder(model, 3), noise(45000).split(15000)
    before = encoder.push(head)
    fork = encoder.fork()
    state = fork.state
    first = torch.cat([before, encoder.push(one), encoder.end()])
    second = torch.cat([before, fork.push(other), fork.end()])
    fork.state = state  # and back again
    assert torch.equal(second[len(before) :], torch.cat([fork.push(other), fork.end()]))
    for features, tail in ((first, one), (second, other)):
        whole = encoder.offline_features(torch.cat([head, tail]))
        torch.testing.assert_close(features, whole, rtol=0, atol=1e-5)


def test_memory_stays_and_a_chunk_takes_less_time_than_it_lasts(model):
    encoder, wave, sizes, seconds = StreamingEncoder(model, 3), noise(20 * CHUNK), [], []
    for piece in wave.split(CHUNK):
        start = time.thread_time()  # not the wall: other work on the machine is no cost of the chunk
        encoder.push(piece)
        seconds.append(time.thread_time() - start)
        state = encoder.state
        sizes.append(sum(t.numel() for t in (state.audio_BT, *state.keys, *state.values, *state.stages)))
    assert sizes[4] > sizes[2] and len(set(sizes[4:])) == 1
    assert state.keys[0].shape == (1, 4, 3 * 8, 8)
    assert statistics.median(seconds) < 0.16


def test_encoder_and_adapter_learn_under_the_mask(model):
    own = small_model(seed=4).train()
    own.gradient_checkpointing_enable()
    encoder, wave = StreamingEncoder(own, 1), noise(2 * CHUNK)
    features = encoder.offline_features(wave)
    (features * torch.linspace(-1, 2, 32)).sum().backward()
    trained = [*own.encoder.named_parameters(), *own.audio_adapter.named_parameters()]
    still = [name for name, weight in trained if weight.grad is None or not weight.grad.any()]
    assert still == ["embed_positions.weight"]
    with pytest.raises(ValueError, match="gradient checkpointing is on in training mode"):
        encoder.push(wave)
    own.eval()
    torch.testing.assert_close(streamed(encoder, wave, 0), features.detach(), rtol=0, atol=1e-5)


def test_16_bits_stream_too(model):
    wave = noise(4 * CHUNK)
    exact = StreamingEncoder(model, 1).offline_features(wave).detach()
    half = StreamingEncoder(copy.deepcopy(model).to(torch.bfloat16), 1)
    features = streamed(half, wave, 0)
    assert features.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        automatic = streamed(StreamingEncoder(model, 1), wave, 0)
        whole = StreamingEncoder(model, 1).offline_features(wave).detach()
    for rounded in (features, automatic, whole, half.offline_features(wave).detach()):
        assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_whole_clips_are_encoded_as_before(model):
    extractor = CovoAudioFeatureExtractor.from_model_config(model.config)
    mel, mask = extractor.clip(noise(30000).numpy(), 24000)

    def clip_features():
        with torch.no_grad():
            return model.get_audio_features(mel, mask).pooler_output

    weights, before = {k: v.clone() for k, v in model.state_dict().items()}, clip_features()
    stream = streamed(StreamingEncoder(model), noise(30000), 0)
    assert torch.equal(before, clip_features()) and before.shape == stream.shape
    assert (before - stream).abs().max() > 1e-3  # another mask: what was trained on clips is not what streams
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


def test_what_cannot_be_streamed_is_refused(model):
    encoder = StreamingEncoder(model)
    for samples, words in (
        (torch.zeros(4, dtype=torch.int16), "torch.int16"),
        (torch.zeros(2, 2, 2), r"\(n,\) of one session"),
        (torch.tensor([0.0, float("nan"), float("inf")]), "2 of 3 samples are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=words):
            encoder.push(samples)
    assert encoder.state is None
    assert encoder.push(np.zeros(5, np.float64)).shape == (0, 32)
    with pytest.raises(ValueError, match=r"shape \(2, 5\), but the stream is of one session"):
        encoder.push(torch.zeros(2, 5))
    assert encoder.end().shape == (1, 32)
    for call in (encoder.end, lambda: encoder.push(torch.zeros(5))):
        with pytest.raises(ValueError, match="the stream has ended"):
            call()
    encoder.reset()
    assert encoder.end().shape == encoder.offline_features(torch.zeros(0)).shape == (0, 32)
    with pytest.raises(ValueError, match="a stream has 24000 Hz"):
        StreamingEncoder(model, sampling_rate=44100)
    with pytest.raises(ValueError, match="left_chunks=-1"):
        StreamingEncoder(model, -1)
    with pytest.raises(ValueError, match="no `duplex` section"):
        StreamingEncoder.of(model)
