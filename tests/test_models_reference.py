"""Covo-Audio against recorded features of the published code, and against a model put together from transformers' own
parts: logits, tokens, losses, gradients."""

import numpy as np
import pytest
import torch
from covo_reference import (
    CODE_0,
    FOLDER,
    PROMPT,
    SLOT,
    Reference,
    case_a,
    drawn_ids,
    read_json,
    reference,
    weights,
    write_checkpoint,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    RepetitionPenaltyLogitsProcessor,
)

from covo_rl.models.covo_audio import (
    CovoAudioConfig,
    CovoAudioFeatureExtractor,
    CovoAudioForConditionalGeneration,
    WindowedRepetitionPenalty,
)
from covo_rl.models.covo_audio.processing import make_labels, split_codes

STOP = {"eos_token_id": 151645, "pad_token_id": 151643, "do_sample": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("published"))
    return CovoAudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0].eval()


@pytest.fixture(scope="module")
def audio(model):
    extractor = CovoAudioFeatureExtractor.from_model_config(model.config)
    features, mask = extractor.clip(case_a()["wav_24k"], 24000)
    return {"input_features": features, "input_features_mask": mask}


@pytest.fixture(scope="module")
def prompt():
    return torch.from_numpy(case_a()["input_ids"]).long()


def test_published_keys_load_without_missing_or_unexpected(loaded):
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights()[name]), name


def test_saving_writes_the_published_keys_again(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path, max_shard_size="6MB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    saved = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            saved.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 (no mapping)
    assert set(saved) == set(weights())
    assert all(torch.equal(saved[name], weights()[name]) for name in saved)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CovoAudioConfig and config.adapter_hidden_dim == 2048


@pytest.mark.parametrize("auto", [AutoModelForMultimodalLM, AutoModelForCausalLM])
def test_auto_classes_find_the_model(auto, tmp_path):
    assert type(auto.from_pretrained(write_checkpoint(tmp_path))) is CovoAudioForConditionalGeneration


def test_full_size_model_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = CovoAudioForConditionalGeneration(CovoAudioConfig())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == read_json("full_size_shapes.json")
    assert len(shapes) == 844


def test_log_mel_equals_the_reference(audio):
    got = audio["input_features"][0, :, 0:400:8].numpy()
    np.testing.assert_allclose(got, case_a()["log_mel_every_8"], atol=1e-6)
    assert audio["input_features"].shape == (1, 128, 3000)


def test_encoder_and_adapter_equal_the_reference(model, audio):
    with torch.no_grad():
        out = model.get_audio_features(**audio)
    np.testing.assert_allclose(out.last_hidden_state[0, ::50], case_a()["encoder_every_50"], atol=1e-4)
    assert out.pooler_output.shape == (20, 16)
    np.testing.assert_allclose(out.pooler_output, case_a()["audio_features_used"], atol=1e-4)


def test_a_clip_of_two_segments_keeps_the_first_rows(model):
    """41 s: both segments give 188 rows, the clip has 257 slots, which are the first 257 rows."""
    extractor = CovoAudioFeatureExtractor.from_model_config(model.config)
    wave = np.random.default_rng(0).normal(0, 0.1, 41 * 24000).astype(np.float32)
    features, mask = extractor.clip(wave, 24000)
    assert features.shape == (2, 128, 3000) and mask.sum() == 257
    with torch.no_grad():
        every_row = model.get_audio_features(features).pooler_output
        kept = model.get_audio_features(features, mask, torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert every_row.shape == (376, 16) and kept.sizes == [257, 257]
    assert torch.equal(kept.pooler_output, every_row[:257].repeat(2, 1))


def test_the_ids_of_the_case_are_drawn_from_its_seed():
    """No text of anybody's: the prompt's system turn and the response are ids from a seed, in a known frame."""
    prompt, response = drawn_ids()
    assert case_a()["input_ids"].tolist() == [prompt] and case_a()["response_ids"].tolist() == response
    assert len(prompt) == PROMPT and prompt.count(SLOT) == 20 and len(response) == 50


def test_the_reference_itself_gives_the_recorded_features(audio):
    with torch.no_grad():
        features = reference().features(audio["input_features"])
    np.testing.assert_allclose(features, case_a()["audio_features_used"], atol=1e-4)


def _both_logits(model, prompt, **audio):
    """(of the model, of the reference from the recorded features), (176, V) each."""
    recorded = torch.from_numpy(case_a()["audio_features_used"])
    with torch.no_grad():
        logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **audio).logits[0]
        return logits, reference().logits(prompt[0].tolist(), recorded)


def test_logits_from_the_reference_features_equal_the_reference(model, prompt):
    got, want = _both_logits(model, prompt, audio_embeds=torch.from_numpy(case_a()["audio_features_used"]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_logits_from_the_waveform_equal_the_reference(model, audio, prompt):
    """Over the slots this random decoder turns 1e-5 in a feature, the rounding of another CPU, into 3e-4."""
    got, want = _both_logits(model, prompt, **audio)
    is_slot = prompt[0] == SLOT
    assert is_slot.sum() == 20
    torch.testing.assert_close(got[~is_slot], want[~is_slot], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[is_slot], want[is_slot], atol=1e-3, rtol=0)


def _greedy(prompt, count, *penalties):
    return reference().greedy(prompt[0].tolist(), torch.from_numpy(case_a()["audio_features_used"]), count, *penalties)


def test_greedy_tokens_equal_the_reference(model, audio, prompt):
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        **audio,
        **STOP,
        max_new_tokens=12,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens, scores = _greedy(prompt, 12)
    assert out.sequences[0, PROMPT:].tolist() == tokens
    assert out.past_key_values.get_seq_length() == 187  # the last sampled id is never fed
    torch.testing.assert_close(torch.stack(out.scores)[:, 0].topk(4).values, scores.topk(4).values, atol=1e-4, rtol=0)


def _penalties(repetition_penalty=1.0, window_penalty=1.0, window_size=8):
    """transformers' own penalty, then ours over the last ids, written as a loop."""
    window = lambda ids, scores: _slow_window(ids, scores, window_penalty, window_size)  # noqa: E731
    return RepetitionPenaltyLogitsProcessor(repetition_penalty), window


def test_penalised_tokens_equal_the_reference(model, audio, prompt):
    options = {"repetition_penalty": 1.05, "window_penalty": 1.05}
    out = model.generate(input_ids=prompt, **audio, **STOP, max_new_tokens=12, **options)
    assert out[0, PROMPT:].tolist() == _greedy(prompt, 12, *_penalties(**options))[0]


@pytest.mark.parametrize(
    "name, options",
    [
        ("plain", {}),
        ("hf_only_1p05", {"repetition_penalty": 1.05}),
        ("window_only", {"window_penalty": 1.05, "window_size": 8}),
        ("both", {"repetition_penalty": 1.05, "window_penalty": 1.05}),
        ("both_1p3", {"repetition_penalty": 1.3, "window_penalty": 1.3}),
    ],
)
def test_penalties_on_a_model_that_repeats(model, audio, prompt, name, options):
    """With the head replaced by twice the embedding the model repeats, so each penalty changes the tokens."""
    heads = [model.llm.lm_head.weight, reference().llm.lm_head.weight]
    before = heads[0].detach().clone()
    with torch.no_grad():
        for head in heads:
            head.copy_(2.0 * model.get_input_embeddings().weight)
    try:
        out = model.generate(input_ids=prompt, **audio, **STOP, max_new_tokens=24, **options)
        want, _ = _greedy(prompt, 24, *_penalties(**options))
        plain, _ = _greedy(prompt, 24)
    finally:
        with torch.no_grad():
            for head in heads:
                head.copy_(before)
    assert out[0, PROMPT:].tolist() == want
    assert len(set(plain)) < 24 and (want == plain) == (not options)


@pytest.mark.parametrize("name, window", [("window8_1p05", 8), ("window0_1p05", 0)])
def test_windowed_penalty_equals_the_reference(name, window):
    with np.load(FOLDER / "logits_processor.npz") as data:
        ids, scores, want = (torch.from_numpy(data[key]) for key in ("input_ids", "scores", name))
    got = WindowedRepetitionPenalty(1.05, window)(ids.long(), scores.clone())
    np.testing.assert_allclose(got, want, atol=1e-6)


def _slow_window(ids, scores, penalty, window):
    out = scores.clone()
    for row in range(len(ids)):
        recent = ids[row].tolist()[-window:] if window else ids[row].tolist()
        for token in set(recent):
            out[row, token] = scores[row, token] * penalty if scores[row, token] < 0 else scores[row, token] / penalty
    return out


def test_windowed_penalty_equals_a_loop_and_leaves_its_input_alone():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (4, 12), generator=generator)
    scores = torch.randn(4, 9, generator=generator)
    before = scores.clone()
    for window in (0, 1, 5, 30):
        got = WindowedRepetitionPenalty(1.3, window)(ids, scores)
        assert torch.equal(got, _slow_window(ids, scores, 1.3, window))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("supervise", ["all", "codes"])
def test_teacher_forced_loss_and_gradients_equal_the_reference(model, audio, prompt, supervise):
    response = case_a()["response_ids"].tolist()
    ids = torch.cat([prompt, torch.tensor([response])], dim=1)
    labels = make_labels(ids, [PROMPT], CODE_0, supervise=supervise)
    wanted = [i if supervise == "all" or i >= CODE_0 else -100 for i in response]
    assert labels[0].tolist() == [-100] * PROMPT + wanted
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **audio).loss
    loss.backward()
    slow = Reference()
    logits = slow.logits(ids[0].tolist(), slow.features(audio["input_features"]))
    want = torch.nn.functional.cross_entropy(logits[PROMPT - 1 : -1], torch.tensor(wanted))
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in slow.named_parameters():
        if parameter.grad is not None:
            assert norms[name] == pytest.approx(parameter.grad.norm().item(), rel=1e-3, abs=1e-6), name
    model.zero_grad()


def test_text_labels_are_the_rest_of_the_response(prompt):
    ids = torch.cat([prompt, torch.from_numpy(case_a()["response_ids"]).long()[None]], dim=1)
    by_kind = {kind: make_labels(ids, [PROMPT], 151671, supervise=kind) for kind in ("all", "text", "codes")}
    assert (by_kind["text"] != -100).sum() == 10  # nine text ids and the end token
    assert (by_kind["codes"] != -100).sum() == 40
    assert torch.equal(torch.maximum(by_kind["text"], by_kind["codes"]), by_kind["all"])


def test_codes_are_told_from_text_by_id_range():
    text, codes = split_codes(case_a()["response_ids"], 151671, 16384)
    assert len(text) == 10 and len(codes) == 40
    assert all(0 <= code < 16384 for code in codes)
    assert split_codes([151670, 151671, 168054], 151671, 16384) == ([151670], [0, 16383])
    with pytest.raises(ValueError, match=r"id 168055 at position 1 is audio code 16384.*0 to 16383"):
        split_codes([5, 168055], 151671, 16384)


def test_bfloat16_follows_the_weights(loaded, audio, prompt, tmp_path):
    model = CovoAudioForConditionalGeneration.from_pretrained(write_checkpoint(tmp_path), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = model.get_audio_features(**audio)
        logits = model(input_ids=prompt, **audio).logits
    assert out.pooler_output.dtype == logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
