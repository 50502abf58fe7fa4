"""Families behind one interface: clips -> features -> embeddings -> decoder -> head equals the model's own forward."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from covo_rl import models
from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioProcessor
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.qwen2_audio import Qwen2Audio
from covo_rl.models.tiny import TAGS, tiny_covo_audio, tiny_qwen2_audio, tiny_tokenizer

RNG = np.random.default_rng(3)
RATE = 16_000
CLIPS = [RNG.normal(0, 0.1, round(RATE * seconds)).astype(np.float32) for seconds in (1.0, 7.0)]
MESSAGES = [
    {"role": "user", "content": [{"type": "audio"}, {"type": "audio"}, {"type": "text", "text": "Which is louder?"}]}
]
SIZES = {"encoder_width": 32, "decoder_width": 48, "decoder_layers": 2}


def build(name):
    if name == "qwen2_audio":
        return Qwen2Audio(*tiny_qwen2_audio(["Which is louder?"]))
    return CovoAudio(*tiny_covo_audio(tiny_tokenizer(["Which is louder?"], 320), adapter_hidden=32, **SIZES))


@pytest.fixture(scope="module", params=["covo_audio", "qwen2_audio"])
def family(request):
    return build(request.param)


def own_forward(family):
    """Logits from the processor's own path and the model's own forward."""
    text = family.render(MESSAGES)
    if family.model_type == "covo_audio":
        inputs = family.processor(text=text, audio=CLIPS, sampling_rate=RATE)
    else:
        inputs = family.processor(text=[text], audio=CLIPS, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        return inputs["input_ids"], family.model(**inputs).logits


def test_the_interface_gives_the_models_own_logits(family):
    ids, want = own_forward(family)
    features = [family.clip_features(clip, RATE) for clip in CLIPS]
    tokens = family.tokenize(family.render(MESSAGES), [clip.slots for clip in features])
    assert tokens == ids[0].tolist()
    with torch.no_grad():
        embeds = family.embed_tokens(torch.tensor([tokens]))
        slots = torch.tensor([tokens]) == family.audio_token_id
        embeds[slots] = torch.cat(family.encode(features))
        hidden = family.decoder(inputs_embeds=embeds).last_hidden_state
        got = family.lm_head(hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_embeddings_do_not_depend_on_the_batch(family):
    features = [family.clip_features(clip, RATE) for clip in CLIPS]
    assert family.encode([]) == []
    with torch.no_grad():
        together = family.encode(features)
        for clip, got in zip(features, together, strict=True):
            assert got.shape[0] == clip.slots
            torch.testing.assert_close(family.encode([clip])[0], got, atol=1e-5, rtol=1e-4)


def test_slots_are_counted_without_the_features(family):
    """Every length class: whole and odd 10 ms frames, one sample more and less, another rate, over one segment."""
    tried = [(n, 16_000) for n in (800, 960, 1120, 1279, 1280, 1281, 1440, 15_999, 16_001, 47_999, 48_001, 111_111)]
    for samples, rate in [*tried, (4_410, 44_100), (22_051, 22_050), (72_000, 24_000)]:
        wave = RNG.normal(0, 0.1, samples).astype(np.float32)
        features = family.clip_features(wave, rate)
        assert family.clip_slots(wave, rate) == features.slots, (samples, rate)
        assert family.encode([features])[0].shape[0] == features.slots


def test_parts_cover_every_parameter_once(family):
    for name, _ in family.model.named_parameters():
        owners = [part for part, prefix in family.parts.items() if name.startswith(prefix)]
        assert len(owners) == 1, name
    assert set(family.parts) == {"encoder", "audio_adapter", "llm", "lm_head"}


def test_a_frozen_encoder_stays_out_of_autograd(family):
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name.startswith(family.parts["llm"]))
    try:
        assert not family.encode([family.clip_features(CLIPS[0], RATE)])[0].requires_grad
        family.model.get_parameter(family.parts["audio_adapter"] + next(iter(_adapter(family)))).requires_grad_(True)
        assert family.encode([family.clip_features(CLIPS[0], RATE)])[0].requires_grad
    finally:
        family.model.requires_grad_(True)


def _adapter(family):
    prefix = family.parts["audio_adapter"]
    return {name.removeprefix(prefix): p for name, p in family.model.named_parameters() if name.startswith(prefix)}


def test_load_finds_the_family_by_model_type(family, tmp_path):
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    again = models.load_family(str(tmp_path))
    assert type(again) is type(family)
    assert again.eos_token_ids == family.eos_token_ids and again.pad_token_id == family.pad_token_id
    torch.testing.assert_close(own_forward(again)[1], own_forward(family)[1])
    half = models.load_family(str(tmp_path), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.encode([half.clip_features(CLIPS[0], RATE)])[0].dtype == torch.bfloat16


def test_auto_processor_loads_a_saved_processor(tmp_path):
    from transformers import AutoProcessor

    family = build("covo_audio")
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is CovoAudioProcessor
    assert (again.first_code_id, again.num_audio_codes) == (family.model.config.audio_token_index, 0)
    assert again.feature_extractor.segment_frames == 300
    assert again.chat_template == family.processor.chat_template


def test_published_folder_without_processor_files_gets_its_processor(tmp_path):
    """The published folder has a tokenizer with a text-only template, and no preprocessor_config.json."""
    family = build("covo_audio")
    family.model.save_pretrained(tmp_path)
    family.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    again = CovoAudioProcessor.from_pretrained(tmp_path)
    assert again.feature_extractor.segment_frames == 300
    assert "<|cAUDIO|>" in again.apply_chat_template(MESSAGES)


def test_an_unknown_model_type_is_an_error_that_says_what_exists(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert' has no family; there are covo_audio, qwen2_audio"):
        models.load_family(str(tmp_path))


def test_a_tokenizer_with_another_placeholder_id_is_refused():
    model, processor = tiny_covo_audio(tiny_tokenizer(["a"], 320), **SIZES)
    model.config.audio_placeholder_token_id += 1
    with pytest.raises(ValueError, match=r"<\|cAUDIO\|> has id \d+ in the tokenizer but audio_placeholder_token_id"):
        CovoAudioProcessor.from_model_config(model.config, processor.tokenizer)


def test_qwen2_audio_refuses_more_than_30_s():
    family = build("qwen2_audio")
    assert family.max_clip_seconds == 30
    assert family.clip_features(np.zeros(30 * RATE, np.float32), RATE).slots == 750
    with pytest.raises(ValueError, match=r"30\.06 s: Qwen2-Audio takes 30 s"):
        family.clip_features(np.zeros(30 * RATE + 1000, np.float32), RATE)
    with pytest.raises(ValueError, match="too short for one audio slot"):
        family.clip_features(np.zeros(160, np.float32), RATE)


def test_tiny_tokenizer_round_trips_and_keeps_tags_whole():
    tokenizer = tiny_tokenizer(["a dog barks"] * 2, 300)
    text = "<think>é 犬 dog</think> <answer>B</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in TAGS)
    assert len(tokenizer("dog" * 2)["input_ids"]) < 6
    with pytest.raises(ValueError, match="vocab_size=260 is too small: 256 bytes and 10 added tokens"):
        tiny_tokenizer(["a"], 260)


def test_tiny_model_has_the_size_and_seed_it_says():
    tokenizer = tiny_tokenizer(["a dog"], 320)
    state = torch.get_rng_state()
    model, processor = tiny_covo_audio(tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert CovoAudio(model, processor).clip_features(np.zeros(72000, np.float32), 24000).slots == 19
    same, other = tiny_covo_audio(tokenizer)[0], tiny_covo_audio(tokenizer, seed=1)[0]
    assert torch.equal(same.llm.lm_head.weight, model.llm.lm_head.weight)
    assert not torch.equal(other.llm.lm_head.weight, model.llm.lm_head.weight)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adapter_downsample": 6}, "adapter_downsample=6 is not a power of two"),
        ({"adapter_downsample": 1}, "adapter_downsample=1 is not a power of two"),
        ({"llm_config": {"vocab_size": 100}}, "vocab_size=100 ends before audio_token_index=151671"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CovoAudioConfig(**options)


def test_default_configuration_is_the_published_one():
    config = CovoAudioConfig()
    assert (config.num_audio_codes, config.segment_frames, config.slot_frames) == (16384, 3000, 16)
    assert config.get_text_config() is config.llm_config
    assert config.audio_token_id == 151666 and not config.tie_word_embeddings
    assert (config.llm_config.num_key_value_heads, config.encoder_config.encoder_layers) == (4, 32)
    again = CovoAudioConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_importing_the_families_table_pulls_in_no_torch():
    code = "import sys, covo_rl.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
