"""What is peculiar to Voxtral, Granite Speech and Phi-4-multimodal; what all families share is in test_families.py."""

import base64
import json

import numpy as np
import published
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from covo_rl.models import ModelError, family_class, load_family
from covo_rl.models.granite_speech import GraniteMel
from covo_rl.models.tiny import tiny_model
from covo_rl.models.voxtral import Voxtral
from covo_rl.models.weights import WeightsError
from covo_rl.prompt import CUT, position_limit
from covo_rl.run.conformance import Subject
from covo_rl.run.conformance.sampling import strange_ids

RATE = 16_000
#: seconds -> slots: 375 a started 30 s; 3 for every 15 frames of 20 ms; one for every 8 frames of 10 ms
SECONDS = (0.1, 1.0, 2.35, 29.99, 30.0, 30.01, 41.0)
SLOTS = {
    "voxtral": (375, 375, 375, 375, 375, 750, 750),
    "granite_speech": (3, 12, 24, 300, 300, 303, 411),
    "phi4_multimodal": (1, 13, 30, 375, 375, 375, 513),
}


@pytest.fixture(scope="module")
def families():
    return {name: family_class(name)(*tiny_model(name)) for name in SLOTS}


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(RATE * seconds)) * 0.1).astype(np.float32)


def asked(family, clips, text="What do you hear?"):
    content = [*[{"type": "audio"}] * len(clips), {"type": "text", "text": text}]
    return family.tokenize(family.render([{"role": "user", "content": content}]), [clip.slots for clip in clips])


@torch.no_grad()
def own_and_ours(family, seconds):
    """Log-probs at the last position: of the model's own forward, and by our embedding, decoder and head."""
    clip = family.clip_features(wave(seconds), RATE)
    ids = torch.tensor([asked(family, [clip])])
    own = family.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **clip.tensors).logits
    embeds = family.embed_tokens(family.embeddable(ids))
    embeds = embeds.masked_scatter((ids == family.audio_token_id)[..., None], family.encode([clip])[0])
    hidden = family.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return own[0, -1].log_softmax(-1), family.lm_head(hidden[0, -1]).log_softmax(-1)


@pytest.mark.parametrize("name", SLOTS)
def test_clips_fill_the_slots_that_their_length_says(name, families):
    family = families[name]
    assert tuple(family.clip_slots(wave(seconds), RATE) for seconds in SECONDS) == SLOTS[name]
    assert tuple(family.clip_features(wave(s), RATE).slots for s in SECONDS[::3]) == SLOTS[name][::3]


@pytest.mark.parametrize("name", SLOTS)
def test_a_clip_of_41_seconds_is_heard_as_the_model_itself_hears_it(name, families):
    """Two windows of Voxtral, many blocks of Granite, two chunks of 500 positions of Phi-4."""
    own, ours = own_and_ours(families[name], 41.0)
    torch.testing.assert_close(own, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "samples"), [("granite_speech", 256), ("phi4_multimodal", 399)])
def test_a_click_is_refused_by_count_and_by_features_alike(name, samples, families):
    for make in (families[name].clip_slots, families[name].clip_features):
        with pytest.raises(ValueError, match=r"(16\.0|24\.9) ms is too short for one audio slot of (Granite|Phi-4)"):
            make(np.ones(samples, np.float32), RATE)
    assert families[name].clip_features(np.ones(samples + 1, np.float32), RATE).slots > 0


# -- Granite Speech ----------------------------------------------------------------------------------------------------


def test_the_logits_of_granite_are_those_of_its_text_model(families):
    """transformers' speech class forgets logits_scaling: the same weights give twice the logits until we load them."""
    model, processor = tiny_model("granite_speech")
    config = model.config.get_text_config()
    text = transformers.GraniteForCausalLM(config).eval()
    text.load_state_dict({f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
                         | {"lm_head.weight": model.lm_head.weight})  # fmt: skip
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        right, stock = text(input_ids=ids).logits, model(input_ids=ids).logits
        family = family_class("granite_speech")(model, processor)
        loaded = model(input_ids=ids).logits
        ours = family.lm_head(family.decoder(inputs_embeds=family.embed_tokens(ids)).last_hidden_state)
    assert config.logits_scaling == 2
    torch.testing.assert_close(stock, 2 * right, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded, right, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, right, atol=1e-5, rtol=0)


def test_the_mel_of_granite_is_that_of_torchaudio():
    """Two tones; every fourth frame and fortieth bin, as GraniteSpeechFeatureExtractor gave with torchaudio 2.11."""
    times = np.arange(3200) / RATE
    tones = (0.3 * np.sin(2 * np.pi * 440 * times) + 0.1 * np.sin(2 * np.pi * 3000 * times)).astype(np.float32)
    mel = GraniteMel()(tones)
    recorded = [[1.284889, 0.655012, 0.771408, 0.160195], [0.006120, -0.277404, 0.078508, -0.277404],
                [0.078499, -0.277404, 0.006104, -0.277404]]  # fmt: skip
    assert mel.shape == (1, 10, 160)
    torch.testing.assert_close(mel[0, ::4, 3::40], torch.tensor(recorded), atol=1e-5, rtol=0)


def test_the_mel_of_granite_is_the_stock_one_bit_for_bit():
    pytest.importorskip("torchaudio")
    stock = transformers.GraniteSpeechFeatureExtractor()
    for seconds, slots in zip(SECONDS, SLOTS["granite_speech"], strict=True):
        out = stock(wave(seconds))
        assert torch.equal(out["input_features"], GraniteMel()(wave(seconds)))
        assert out["audio_embed_sizes"] == [slots]


def test_granite_never_draws_the_audio_id_for_which_its_forward_embeds_another(families, monkeypatch):
    """As where a published table has a row for it; the check finds the id where the family does not name it."""
    family = family_class("granite_speech")(*tiny_model("granite_speech"))
    assert family.unsampled_ids == ()  # it has no row
    family.model.config.audio_token_id = 40
    assert family.unsampled_ids == (40,)
    subject = Subject(family, None)
    with torch.no_grad():
        assert strange_ids(subject) == []
        monkeypatch.setattr(type(family), "unsampled_ids", ())
        assert strange_ids(subject) == [40]


def test_granite_plus_hears_intermediate_layers(families):
    config = families["granite_speech"].model.config.to_dict()
    config["encoder_config"] |= {"model_type": "granite_speech_plus_encoder", "cat_hidden_layers": [1]}
    config["projector_config"]["encoder_hidden_size"] *= 2
    plus = transformers.GraniteSpeechPlusConfig(**{**config, "model_type": "granite_speech_plus"})
    torch.manual_seed(0)
    model = transformers.GraniteSpeechPlusForConditionalGeneration(plus).eval()
    family = family_class("granite_speech_plus")(model, families["granite_speech"].processor)
    own, ours = own_and_ours(family, 1.0)
    torch.testing.assert_close(own, ours, atol=1e-5, rtol=0)


# -- Voxtral -----------------------------------------------------------------------------------------------------------


def test_voxtral_takes_the_mel_of_the_whole_clip_and_then_cuts(families):
    """As VoxtralProcessor does: the loudest frame of all windows sets the floor of each."""
    family = families["voxtral"]
    loud_then_soft = np.concatenate((wave(30.0), 1e-4 * wave(3.0)))
    stock = transformers.VoxtralProcessor
    options = {"sampling_rate": RATE, "padding": True, "truncation": False, "pad_to_multiple_of": 480_000,
               "max_source_positions": 3000, "return_tensors": "pt"}  # fmt: skip
    extractor = family.processor.feature_extractor
    theirs = stock._retrieve_input_features(family.processor, [loud_then_soft], **options)
    ours = family.clip_features(loud_then_soft, RATE).tensors["input_features"]
    assert torch.equal(ours, theirs)
    alone = extractor(loud_then_soft[-3 * RATE :], sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert (ours[1:] - alone).abs().max() > 0.1, "windows of their own would be another sound"


def tekken(folder):
    """A folder as Mistral publishes it: a tokenizer of bytes and the merge `hi`, and no word of templates or roles."""
    known = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]",
             18: "[/SYSTEM_PROMPT]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}  # fmt: skip
    special = [{"rank": i, "token_str": known.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(40)]
    words = [*(bytes([i]) for i in range(256)), b"hi"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": None} for i, w in enumerate(words)]
    config = {"pattern": r"[^\s]+|\s+", "num_vocab_tokens": 257, "default_vocab_size": 297,
              "default_num_special_tokens": 40, "version": "v7"}  # fmt: skip
    whole = {"config": config, "vocab": vocab, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "voxtral"}', encoding="utf-8")
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)


def test_voxtral_reads_tekken_json_and_writes_prompts_as_mistral_common(families, tmp_path):
    """[INST] 3, [BEGIN_AUDIO] 25, [AUDIO] 24, [/INST] 4; byte b is 40 + b: the order that mistral-common 1.13 gives."""
    tekken(tmp_path)
    model = families["voxtral"].model
    family = Voxtral(model, Voxtral.load_processor(str(tmp_path)))
    audio = {"type": "audio"}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"},
             {"role": "user", "content": [audio, {"type": "text", "text": "hi?"}, audio]}]  # fmt: skip
    written = [1, 3, 296, 4, 105, 2, 3, 25, *[24] * 375, 296, 103, 25, *[24] * 750, 4]
    assert family.tokenize(family.render(turns), [375, 750]) == written
    assert (family.tokenizer.eos_token_id, family.pad_token_id) == (2, 11)
    assert family.tokenizer.decode([1, 105, 24, 103, 2], skip_special_tokens=True) == "A?"
    system = [{"role": "system", "content": "A"}, {"role": "user", "content": "[INST]"}]
    assert family.render(system) == f"<s>[SYSTEM_PROMPT]A[/SYSTEM_PROMPT][INST][{CUT}INST][/INST]"
    assert family.tokenize(family.render(system), []) == [1, 17, 105, 18, 3, *(40 + b for b in b"[INST]"), 4]

    family.processor.save_pretrained(tmp_path / "copy")
    again = Voxtral(model, Voxtral.load_processor(str(tmp_path / "copy")))
    assert again.tokenize(again.render(turns), [375, 750]) == written
    assert (tmp_path / "copy" / "tekken.json").read_bytes() == (tmp_path / "tekken.json").read_bytes()


def test_voxtral_refuses_a_system_message_beside_audio(families):
    content = [{"type": "audio"}, {"type": "text", "text": "What?"}]
    with pytest.raises(ValueError, match=r"no system message beside audio; put its text into the question"):
        families["voxtral"].render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}])


# -- a LoRA beside the weights -----------------------------------------------------------------------------------------


def with_lora(folder, name, subfolder, prefix, leaves):
    """A published folder that ships a LoRA; returns what each adapted weight is with it merged: W + 8 / 4 B A."""
    model, processor = tiny_model(name)
    if hasattr(model.config, "has_lora_adapter"):
        model.config.has_lora_adapter = True
    published.write_published(model, processor, published.tables()[name], folder)
    tensors, merged, generator = {}, {}, torch.Generator().manual_seed(1)
    layers = family_class(name).parts["llm"] + "layers."
    for place, module in model.named_modules():
        if place.startswith(layers) and place.endswith(leaves):
            a = torch.randn(4, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, 4, generator=generator) * 0.1
            theirs = "base_model.model." + prefix + place.removeprefix(layers)
            tensors |= {f"{theirs}.lora_A.weight": a, f"{theirs}.lora_B.weight": b}
            merged[f"{place}.weight"] = module.weight.detach() + 2.0 * (b @ a)
    (folder / subfolder).mkdir(exist_ok=True)
    save_file(tensors, folder / subfolder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": rf".*layers.*\.({'|'.join(leaves)})",
              "base_model_name_or_path": "somebody/else", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / subfolder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return model, merged


SHIPPED = [
    ("granite_speech", ".", "language_model.model.layers.", ("self_attn.q_proj", "self_attn.v_proj")),
    ("phi4_multimodal", "speech-lora", "model.layers.", ("self_attn.qkv_proj", "mlp.gate_up_proj")),
]


@pytest.mark.parametrize(("name", "subfolder", "prefix", "leaves"), SHIPPED, ids=[case[0] for case in SHIPPED])
def test_the_lora_that_a_checkpoint_ships_is_merged(name, subfolder, prefix, leaves, tmp_path):
    base, merged = with_lora(tmp_path, name, subfolder, prefix, leaves)
    family = load_family(str(tmp_path))
    weights = dict(family.model.named_parameters())
    before = {key: value for key, value in base.named_parameters() if "image_embed." not in key}
    assert weights.keys() == before.keys(), "a plain model"
    assert len(merged) == 4
    for key, value in before.items():
        torch.testing.assert_close(weights[key], merged.get(key, value), atol=1e-6, rtol=0)
    assert not getattr(family.model.config, "has_lora_adapter", False)
    assert family.model.name_or_path == str(tmp_path)


@pytest.mark.parametrize(("name", "subfolder", "prefix", "leaves"), SHIPPED, ids=[case[0] for case in SHIPPED])
def test_a_shipped_lora_that_is_damaged_is_named(name, subfolder, prefix, leaves, tmp_path):
    with_lora(tmp_path, name, subfolder, prefix, leaves)
    file = tmp_path / subfolder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != first}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing keys of its LoRA: 1 \(.*lora_A"):
        load_family(str(tmp_path))
    save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="cannot be merged"):
        load_family(str(tmp_path))


def test_weights_missing_beside_a_shipped_lora_are_still_named(tmp_path):
    """With an adapter in its folder transformers reports on the adapter alone."""
    with_lora(tmp_path, *SHIPPED[0])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.input_linear.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((WeightsError, ModelError), match=r"missing in the checkpoint.*encoder\.input_linear\.weight"):
        load_family(str(tmp_path))


# -- Phi-4-multimodal --------------------------------------------------------------------------------------------------


def test_phi4_stops_before_longrope_changes_its_angles(families):
    """4097 positions in one row of a pass turn the keys of every other row by other angles."""
    family = families["phi4_multimodal"]
    assert position_limit(family.model.config) == 4096 < family.model.config.max_position_embeddings
    rope, places = family.decoder.rotary_emb, torch.arange(8)[None]
    alone = rope(torch.zeros(1), places)[0]
    beside = rope(torch.zeros(1), torch.cat((places, torch.tensor([[4096]])), 1))[0][:, :8]
    assert (alone - beside).abs().max() > 0.1


def test_phi4_uses_its_speech_projector_and_lets_the_image_half_go(families):
    family = families["phi4_multimodal"]
    clip = family.clip_features(wave(0.5), RATE)
    before = family.encode([clip])[0]
    audio = family.model.model.embed_tokens_extend.audio_embed
    kept = audio.up_proj_for_vision_speech.weight.detach().clone()
    try:
        torch.nn.init.zeros_(audio.up_proj_for_vision_speech.weight)
        assert torch.equal(family.encode([clip])[0], before)
    finally:
        audio.up_proj_for_vision_speech.weight.data = kept
    assert not hasattr(family.model.model.embed_tokens_extend, "image_embed"), "it sees"
    assert family.audio_token_id == family.model.config.audio_config.audio_token_id
