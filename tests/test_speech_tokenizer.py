"""The speech tokenizer: one grid, batches equal to single clips, files that are checked, codes that are read."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from covo_rl.models import ModelError
from covo_rl.models.weights import WeightsError
from covo_rl.resolve import ConfigError
from covo_rl.speech.align import AlignError, align_pieces, align_words
from covo_rl.speech.clips import digit_rows
from covo_rl.speech.configuration import SpeechTokenizerConfig
from covo_rl.speech.front_end import MelFrontEnd, prepare_wave
from covo_rl.speech.grid import CodeError, check_codes, count_codes, count_slots, pad_to_codes
from covo_rl.speech.measures import measure_tokenizer
from covo_rl.speech.pieces import Pieces, PiecesError
from covo_rl.speech.tokenizer import SpeechTokenizer

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
}  # fmt: skip
CONV = {**SMALL, "conv_dim": [8] * 7, "feat_extract_norm": "layer"}


def small(front_end="mel", **wavlm):
    torch.manual_seed(0)
    pieces = Pieces.learn(["one two three"])
    layers = {**(SMALL if front_end == "mel" else CONV), **wavlm}
    config = SpeechTokenizerConfig(16, 4, 16, 16, len(pieces), front_end, layers)
    return SpeechTokenizer(config, pieces).eval()


def waves(*lengths):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(length).astype(np.float32) * 0.1 for length in lengths]


def test_the_grid():
    assert [count_codes(n) for n in (0, 1, 960, 961, 24_000)] == [0, 1, 1, 2, 25]
    assert [count_slots(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    padded = pad_to_codes(np.ones(961, np.float32))
    assert len(padded) == 1920 and padded[:961].all() and not padded[961:].any()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("front_end", ["conv", "mel"])
def test_a_batch_has_the_codes_of_single_clips(front_end, norm):
    if front_end == "mel" and norm == "group":
        pytest.skip("the mel has no norm")
    tokenizer = small(front_end, **({"feat_extract_norm": norm} if front_end == "conv" else {}))
    clips = waves(5000, 24_000, 960, 961)
    together = tokenizer.encode(clips)
    assert [len(codes) for codes in together] == [6, 25, 1, 2]
    inputs = [prepare_wave(wave, front_end) for wave in clips]
    with torch.no_grad():
        vectors, mask = tokenizer.features(inputs)
        for i, wave in enumerate(inputs):
            alone, _ = tokenizer.features([wave])
            torch.testing.assert_close(vectors[i][mask[i]], alone[0], atol=2e-5, rtol=0)
    for codes, wave in zip(together, clips, strict=True):
        assert codes.dtype == torch.int64 and torch.equal(codes, tokenizer.encode([wave])[0])


@pytest.mark.parametrize("front_end", ["conv", "mel"])
def test_two_frames_a_code_exactly(front_end):
    tokenizer = small(front_end)
    for samples in (960, 1000, 9600):
        frames = tokenizer.wavlm.feature_extractor(prepare_wave(waves(samples)[0], front_end)[None])
        assert frames.shape[-1] == 2 * count_codes(samples)


def test_codes_do_not_hear_loudness():
    tokenizer, [wave] = small(), waves(9600)
    assert torch.equal(*tokenizer.encode([wave, wave * 0.25]))


def test_features_are_the_weighted_sum_of_all_layers():
    tokenizer = small("conv")
    torch.nn.init.normal_(tokenizer.layer_weights)
    wave = prepare_wave(waves(4800)[0], "conv")
    with torch.no_grad():
        layers = tokenizer.wavlm(wave[None], output_hidden_states=True).hidden_states
        assert len(layers) == 3  # the input, and two layers
        weights = torch.softmax(tokenizer.layer_weights, 0)
        total = sum(float(w) * layer for w, layer in zip(weights, layers, strict=True))
        pairs = torch.stack([torch.cat([total[0, 2 * i], total[0, 2 * i + 1]]) for i in range(5)])
        vectors = tokenizer.to_code(tokenizer.norm(tokenizer.merge(pairs)))
        expected = vectors / vectors.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(tokenizer.features([wave])[0][0], expected, atol=1e-5, rtol=0)
        nearest = [max(range(16), key=lambda k: float(v @ tokenizer.codebook[k])) for v in expected]
    assert tokenizer.nearest(expected).tolist() == nearest


def test_the_published_shape():
    with torch.device("meta"):
        tokenizer = SpeechTokenizer(SpeechTokenizerConfig.published())
    assert sum(p.numel() for p in tokenizer.parameters()) == 317_587_177
    assert tokenizer.codebook.shape == (16_384, 16) and tokenizer.layer_weights.shape == (25,)
    assert tokenizer.merge.weight.shape == (1024, 2048) and tokenizer.from_code.weight.shape == (1024, 16)
    names = {name.split(".")[0] for name in tokenizer.state_dict()}
    assert names == {"wavlm", "layer_weights", "merge", "norm", "to_code", "codebook", "from_code"}


def test_a_saved_tokenizer_comes_back(tmp_path):
    tokenizer, clips = small(), waves(9600, 4800)
    tokenizer.save_pretrained(tmp_path)
    again = SpeechTokenizer.from_pretrained(tmp_path)
    assert again.digest() == tokenizer.digest() and again.config == tokenizer.config and not again.training
    codes = tokenizer.encode(clips)
    assert all(map(torch.equal, codes, again.encode(clips)))
    assert again.transcribe(codes[0]) == tokenizer.transcribe(codes[0])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "covo_speech_tokenizer" and load_file(tmp_path / "model.safetensors")[
        "codebook"
    ].shape == (16, 4)
    with torch.no_grad():
        again.to_code.bias[0] += 1
    assert again.digest() != tokenizer.digest()
    other = config["wavlm"] | {"do_stable_layer_norm": False}  # the same tensors, other codes
    (tmp_path / "config.json").write_text(json.dumps(config | {"wavlm": other}))
    assert SpeechTokenizer.from_pretrained(tmp_path).digest() != tokenizer.digest()
    tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    narrow = SpeechTokenizer.from_pretrained(tmp_path)
    assert narrow.codebook.dtype == torch.float32
    torch.testing.assert_close(narrow.codebook, tokenizer.codebook, atol=1e-3, rtol=0)


def test_without_heads_it_encodes_and_refuses_to_read(tmp_path):
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.startswith("heads.")}, tmp_path / "model.safetensors")
    blind = SpeechTokenizer.from_pretrained(tmp_path)
    [codes] = blind.encode(waves(4800))
    assert torch.equal(codes, tokenizer.encode(waves(4800))[0]) and blind.digest() == tokenizer.digest()
    with pytest.raises(CodeError, match="saved without heads"):
        blind.transcribe(codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("merge.bias"), "missing: merge.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda t: t.update(codebook=torch.zeros(3, 4)), r"codebook \(3, 4\), here \(16, 4\)"),
        (lambda t: t["merge.bias"].fill_(float("nan")), "NaN or infinite numbers in 1 \\(merge.bias"),
    ],
)
def test_damaged_weights_are_named(tmp_path, change, message):
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        SpeechTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "whisper"}, "is no speech tokenizer's"),
        ({"codebok_size": 3}, "did you mean codebook_size"),
        ({"codebook_size": -1, "front_end": "fft"}, "front_end"),
        ({"wavlm": {"hidden": 3}}, "WavLMConfig has no 'hidden'"),
        ({"wavlm": [1]}, "wavlm"),
        ({"wavlm": {"hidden_size": "x"}}, "expected int, got str"),
        ({"wavlm": {"num_hidden_layers": 10**9}}, "num_hidden_layers 1000000000: 1 to 1000"),
        ({"wavlm": {"num_attention_heads": 3}}, "must be divisible by num_heads"),
        (
            {"codebook_size": 1_000_000, "code_dim": 100_000},
            r"shape than config.json says: codebook \(16, 4\)",
        ),
    ],
)
def test_a_malformed_configuration_is_an_error(tmp_path, change, message):
    """Before it costs memory: that last codebook would be 400 GB."""
    small().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    layers = {"wavlm": content["wavlm"] | change["wavlm"]} if isinstance(change.get("wavlm"), dict) else {}
    (tmp_path / "config.json").write_text(json.dumps(content | change | layers))
    with pytest.raises((ConfigError, ModelError, WeightsError), match=message):
        SpeechTokenizer.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        SpeechTokenizer.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    (tmp_path / "pieces.json").write_text("{}")
    with pytest.raises(PiecesError, match="no file of pieces"):
        SpeechTokenizer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="cannot be read"):
        SpeechTokenizer.from_pretrained(tmp_path)


def test_codes_outside_the_codebook_are_named():
    with pytest.raises(
        CodeError, match=r"row 1: code 16 at position 2; there are 0 to 15\nb.*-1 at position 0"
    ) as error:
        check_codes([[1], [0, 15, 16], [-1]], 16, ["a", "row 1", "b"])
    assert "a:" not in str(error.value)
    tokenizer = small()
    with pytest.raises(CodeError, match="code 16 at position 1"):
        tokenizer.ctc_logps([3, 16])
    for strange in ([1.5], [True], torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), [2**70]):
        with pytest.raises(CodeError, match="at position 0; there are 0 to 15"):
            tokenizer.transcribe(strange)
    with pytest.raises(CodeError, match="no codes"):
        tokenizer.ctc_logps([])
    assert tokenizer.transcribe([]) == ""


@pytest.mark.parametrize(
    "wave", [np.zeros(0, np.float32), np.full(960, np.nan, np.float32), np.zeros((3, 3, 3), np.float32)]
)
def test_a_wave_that_is_none(wave):
    with pytest.raises(ValueError, match="wave"):
        small().encode([wave])


def test_one_wave_is_no_list_of_waves():
    with pytest.raises(ValueError, match="give a list of waves"):
        small().encode(waves(960)[0])


def test_silence_has_codes():
    assert len(small().encode([np.zeros(1920, np.float32)])[0]) == 2


def test_pieces_write_what_they_read():
    words = Pieces.learn(["one two three"])
    assert words.text([id for ids in words.words("Three, TWO!") for id in ids]) == "three two"
    assert words.words("one - two")[1] == []
    one, two = (words.words(word)[0][0] for word in ("one", "two"))
    assert words.greedy([0, one, one, 0, one, two, two, 0]) == "one one two"
    with pytest.raises(PiecesError, match="not trained on 'four'"):
        words.words("one four")
    bpe = Pieces.learn(["seven eleven", "seventy"], 20)
    assert len(bpe) <= 20 and bpe.text([id for ids in bpe.words("seventy eleven") for id in ids]) == "seventy eleven"


def _paths(length, states):
    """All sequences of outputs, as CTC sees them."""
    if length == 0:
        yield ()
        return
    for path in _paths(length - 1, states):
        for state in range(states):
            yield (*path, state)


def _written(path):
    return [s for i, s in enumerate(path) if s and (i == 0 or path[i - 1] != s)]


@pytest.mark.parametrize("ids", [[1], [1, 2], [1, 1], [2, 1, 2]])
def test_alignment_is_the_best_of_all_paths(ids):
    logps = np.log(np.random.default_rng(3).dirichlet(np.ones(3), 5))
    best = max((p for p in _paths(5, 3) if _written(p) == ids), key=lambda p: sum(logps[i, s] for i, s in enumerate(p)))
    spans = align_pieces(logps, ids)
    laid = [0] * 5
    for id, (start, end) in zip(ids, spans, strict=True):
        laid[start:end] = [id] * (end - start)
    assert tuple(laid) == best


def test_what_cannot_be_aligned():
    logps = np.log(np.full((2, 3), 1 / 3))
    for ids in ([], [1, 1], [1, 2, 1]):
        with pytest.raises(AlignError, match="do not fit 2 codes"):
            align_pieces(logps, ids)
    with pytest.raises(AlignError):
        align_words(small(), [1, 2], "...")


def test_words_are_aligned_in_order():
    tokenizer = small()
    words = align_words(tokenizer, list(range(16)), "Two, - one two")
    assert [word for word, _, _ in words] == ["Two,", "-", "one", "two"]
    times = [second for _, *span in words for second in span]
    assert times == sorted(times) and times[-1] <= 16 * 0.04 and words[1][1] == words[1][2]


def test_the_mel_front_end_hears_its_band():
    front = MelFrontEnd()
    t = np.arange(24_000) / 24_000
    low, high = (front(prepare_wave(np.sin(2 * np.pi * f * t), "mel")[None])[0, :, 25].argmax() for f in (200, 4000))
    assert low < 10 and high > 50


def test_configurations_are_values():
    tiny = SpeechTokenizerConfig.tiny()
    assert tiny == SpeechTokenizerConfig.tiny() and dataclasses.replace(tiny, pieces=3).pieces == 3
    assert tiny.wavlm_config().layerdrop == 0 and not tiny.wavlm_config().apply_spec_augment


def test_the_shipped_tokenizer_on_voices_it_never_heard():
    tokenizer = SpeechTokenizer.from_pretrained("builtin:speech_tokenizer")
    rows = digit_rows("test", 20)
    figures = measure_tokenizer(tokenizer, rows)
    assert figures["wer"] <= 0.05 and figures["code_use"] >= 0.6
    assert figures["pitch_semitones"] <= 1 and figures["voicing"] >= 0.85
    errors = []
    for row, codes in zip(rows, tokenizer.encode([row.wave() for row in rows]), strict=True):
        for (_, *span), (_, *true) in zip(align_words(tokenizer, codes, row.text), row.words, strict=True):
            errors += [abs(a - b) for a, b in zip(span, true, strict=True)]
    assert np.mean(errors) < 0.04  # one code
    waves = [row.wave() for row in rows[:5]]
    exact, coarse = torch.cat(tokenizer.encode(waves)), torch.cat(tokenizer.to(torch.bfloat16).encode(waves))
    assert (exact == coarse).float().mean() > 0.8
    assert tokenizer.transcribe(coarse[:50])
