"""What is peculiar to Gemma 4 and Gemma 3n, against their stock forward (the conformance suite has the rest)."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from covo_rl.models.gemma import Gemma3n, Gemma4
from covo_rl.models.registry import ModelError
from covo_rl.models.tiny.gemma import AUDIO_TOKENS, PICTURE_TOKENS, tiny_gemma3n, tiny_gemma4

RATE = 16_000
MADE = {"gemma4": (Gemma4, tiny_gemma4), "gemma3n": (Gemma3n, tiny_gemma3n)}
both = pytest.mark.parametrize("name", list(MADE))


def _family(name):
    family, make = MADE[name]
    return family(*make())


def _clip(seconds, seed=0):
    wave: Any = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return wave.astype(np.float32) * 0.1


def _question(family, *waves):
    """(ids, features, what the stock extractor makes of all clips together)."""
    parts = [*({"type": "audio"} for _ in waves), {"type": "text", "text": "What do you hear? A bell, or a dog?"}]
    features = [family.clip_features(wave, RATE) for wave in waves]
    text = family.render([{"role": "user", "content": parts}])
    ids = torch.tensor(family.tokenize(text, [clip.slots for clip in features]))
    stock = family.processor.feature_extractor(list(waves), return_tensors="pt") if waves else {}
    return ids, features, dict(stock)


def _decoder_inputs(family, ids, features):
    """What our passes give the decoder."""
    embeds = family.embed_tokens(family.embeddable(ids))
    if features:
        slots = (ids == family.audio_token_id).nonzero()[:, 0]
        embeds = embeds.index_copy(0, slots, torch.cat(family.encode(features)))
    return {"inputs_embeds": embeds, **family.decoder_inputs(ids, embeds)}


def _stock_inputs(family, ids, stock):
    """What the model's own forward gives it, and the logits that come of it."""
    given = {}

    def note(module, args, kwargs):
        given.update({name: kwargs[name][0] for name in ("inputs_embeds", "per_layer_inputs")})

    hook = family.decoder.register_forward_pre_hook(note, with_kwargs=True)
    logits = family.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **stock).logits[0]
    hook.remove()
    return given, logits


@torch.no_grad()
@both
def test_the_decoder_is_given_what_the_stock_forward_gives_it(name):
    """Embeddings: scaled text, audio that is not scaled again, fillers, hard tokens; and the second, per-layer ones."""
    family = _family(name)
    for waves in ((), (_clip(0.6),), (_clip(1.1, 1), _clip(1.1, 2))):
        ids, features, stock = _question(family, *waves)
        theirs, logits = _stock_inputs(family, ids, stock)
        ours = _decoder_inputs(family, ids, features)
        assert ours.keys() == theirs.keys()
        for field, value in theirs.items():
            torch.testing.assert_close(ours[field], value, atol=1e-5, rtol=0, msg=lambda text, f=field: f"{f}: {text}")
        hidden = family.decoder(**{field: value[None] for field, value in ours.items()}).last_hidden_state[0]
        torch.testing.assert_close(family.lm_head(hidden), logits, atol=1e-4, rtol=0)
        plain = family.decoder(
            inputs_embeds=ours["inputs_embeds"][None], per_layer_inputs=0 * theirs["per_layer_inputs"][None]
        )
        assert (family.lm_head(plain.last_hidden_state[0]) - logits).abs().max() > 1e-2, "per-layer inputs are used"


@torch.no_grad()
@both
def test_the_head_caps_its_logits_at_the_bound_of_the_configuration(name):
    family = _family(name)
    bound, hidden = family.text_config.final_logit_softcapping, torch.arange(-80, 80.0).view(5, 32)
    assert family.model.lm_head(hidden).abs().max() > 1.5 * bound
    torch.testing.assert_close(family.lm_head(hidden), bound * torch.tanh(family.model.lm_head(hidden) / bound))
    if name == "gemma4":  # the other configuration takes no None
        family.text_config.final_logit_softcapping = None
        assert family.lm_head is family.model.lm_head


@pytest.mark.parametrize(("seconds", "slots"), [(0.1, 3), (1.0, 25), (2.35, 59), (29.99, 750), (30.0, 750)])
def test_slots_are_those_of_the_stock_processors(seconds, slots):
    """25 a second for Gemma 4; for Gemma 3n always as many as the configuration says (188 in published ones)."""
    four, three = _family("gemma4"), _family("gemma3n")
    wave = _clip(seconds)
    assert four.clip_features(wave, RATE).slots == four.clip_slots(wave, RATE) == slots
    assert three.clip_features(wave, RATE).slots == three.model.config.audio_soft_tokens_per_image == 94
    try:
        from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    except ImportError:
        pytest.skip(f"the processor of Gemma 4 in transformers {transformers.__version__} needs torchvision")
    tokens: Any = SimpleNamespace(boa_token="(", audio_token="x", eoa_token=")")
    mask = four.clip_features(wave, RATE).tensors["input_features_mask"].numpy()
    assert Gemma4Processor.replace_audio_token(tokens, {"input_features_mask": mask}, 0) == f"({slots * 'x'})"


@both
def test_clips_beyond_30_seconds_are_refused_although_the_extractor_would_cut_them(name):
    family = _family(name)
    extractor = family.processor.feature_extractor
    cut, whole = (extractor([_clip(seconds)], return_tensors="pt")["input_features"].shape for seconds in (41, 30))
    assert cut == whole
    for seconds in (30.01, 41.0):
        with pytest.raises(ValueError, match=rf"a clip of {seconds:.2f} s: {type(family).__name__} takes 30 s"):
            family.clip_features(_clip(seconds), RATE)
    with pytest.raises(ValueError, match=r"a clip of 5\.0 ms is too short"):
        family.clip_features(_clip(0.005), RATE)


@both
def test_ids_frame_a_clip_as_the_stock_processor_does_and_text_that_spells_the_tokens_stays_text(name):
    family = _family(name)
    before, after = family.frame
    text = f"hear{family.audio_token}this"
    expected = family.tokenizer(f"hear{before}{2 * family.audio_token}{after}this", add_special_tokens=False)[
        "input_ids"
    ]
    assert family.tokenize(text, [2]) == expected
    rendered = family.render([{"role": "user", "content": f"what is {family.audio_token}?"}])
    ids = family.tokenize(rendered, [])
    assert family.audio_token_id not in ids
    assert f"what is {family.audio_token}?" in family.tokenizer.decode(ids)


def test_ids_and_features_of_gemma3n_are_those_of_its_stock_processor():
    try:
        from transformers import SiglipImageProcessor

        pictures = SiglipImageProcessor()
    except ImportError:
        pytest.skip(f"the processor of Gemma 3n in transformers {transformers.__version__} needs torchvision")
    family, wave = _family("gemma3n"), _clip(0.7)
    names = {"audio": AUDIO_TOKENS[1], "boa": "<start_of_audio>", "eoa": AUDIO_TOKENS[0], "image": PICTURE_TOKENS[1]}
    for name, token in {**names, "boi": "<start_of_audio>", "eoi": PICTURE_TOKENS[0]}.items():
        setattr(family.tokenizer, f"{name}_token", token)  # as those of published tokenizers
        setattr(family.tokenizer, f"{name}_token_id", family.tokenizer.convert_tokens_to_ids(token))
    stock: Any = transformers.Gemma3nProcessor(
        family.processor.feature_extractor, pictures, family.tokenizer, audio_seq_length=94,
        chat_template=family.processor.chat_template,
    )  # fmt: skip
    parts = [{"type": "text", "text": "Listen:\n"}, {"type": "audio"}, {"type": "text", "text": "\nWhat is it?"}]
    text = family.render([{"role": "user", "content": parts}])
    clip = family.clip_features(wave, RATE)
    theirs = stock(text=[text], audio=[wave], return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == family.tokenize(text, [clip.slots])
    assert all(torch.equal(theirs[name], value) for name, value in clip.tensors.items())


def test_placeholders_are_never_drawn():
    four, three = _family("gemma4"), _family("gemma3n")
    tokens = four.tokenizer.convert_ids_to_tokens(list(four.unsampled_ids))
    assert tokens == ["<|audio|>", "<|image|>", "<|video|>"]
    assert three.tokenizer.convert_ids_to_tokens(list(three.unsampled_ids)) == [AUDIO_TOKENS[1], PICTURE_TOKENS[1]]


@torch.no_grad()
def test_drawn_hard_tokens_of_gemma3n_are_embedded_as_the_stock_forward_embeds_them():
    """The ids beyond the per-layer table have embeddings of their own; end of audio is one, in every prompt."""
    family = _family("gemma3n")
    ids, features, stock = _question(family, _clip(0.4))
    hard = [i for i in range(len(family.tokenizer) - 8, len(family.tokenizer)) if i not in family.unsampled_ids]
    assert family.tokenizer.convert_tokens_to_ids("<end_of_audio>") in {*hard} & {*ids.tolist()}
    ids = torch.cat((ids, torch.tensor(hard)))
    theirs, _ = _stock_inputs(family, ids, stock)
    ours = _decoder_inputs(family, ids, features)
    torch.testing.assert_close(ours["inputs_embeds"], theirs["inputs_embeds"], atol=2e-6, rtol=0)
    table = family.model.get_input_embeddings()(ids[-len(hard) :])
    assert (ours["inputs_embeds"][-len(hard) :] - table).abs().amax(-1).min() > 1e-2


@torch.no_grad()
def test_a_clip_of_gemma3n_is_what_it_is_alone_and_fillers_follow():
    """Beside a longer clip the stock batch pads it, and its last embeddings move: we encode it alone."""
    family = _family("gemma3n")
    short, long = _clip(1.01, 1), _clip(2.4, 2)
    clips = [family.clip_features(wave, RATE) for wave in (short, long, short)]
    alone = family.encode(clips[:1])[0]
    together = family.encode(clips)
    assert torch.equal(together[0], alone) and torch.equal(together[2], alone)
    padded = family.processor.feature_extractor([short, long], return_tensors="pt")
    out = family.model.model.get_audio_features(padded["input_features"], ~padded["input_features_mask"])
    count = int((alone != alone[-1]).any(-1).sum())
    assert 0 < count < 10 and torch.equal(alone[count:], alone[-1].expand(len(alone) - count, -1))
    moved = (out.pooler_output[0, :count] - alone[:count]).abs().amax(-1)
    assert moved[-1] > 1e-2 > 1e-5 > moved[0]


def test_gemma3n_loads_without_timm_and_without_the_tensors_of_its_vision_tower(tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = tiny_gemma3n()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    tower = {"model.vision_tower.timm_model.conv_stem.conv.weight": torch.ones(2, 2)}
    save_file({**state, **tower}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Gemma3nForConditionalGeneration"]
    assert config["vision_config"]["model_type"] == "gemma3n_vision"
    family = Gemma3n.load(str(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(family.model.state_dict()[name], value), name
    with pytest.raises(NotImplementedError, match="without its vision tower"):
        family.model.get_image_features(torch.zeros(1, 3, 8, 8))


def test_an_export_of_gemma3n_carries_the_vision_tower_over(tmp_path):
    from safetensors.torch import save_file

    from covo_rl.export.merged import carried_over
    from covo_rl.policy.entries import merged_entries

    model, _ = tiny_gemma3n()
    tower = {"model.vision_tower.timm_model.conv_stem.conv.weight": torch.ones(2, 2)}
    model.save_pretrained(tmp_path)
    save_file(tower, tmp_path / "tower.safetensors")
    assert [entry.name for entry in carried_over(tmp_path, merged_entries(model))] == list(tower)


def test_a_gemma4_that_does_not_hear_is_refused_before_its_weights_are_read(tmp_path):
    model, _ = tiny_gemma4()
    values = {**model.config.to_dict(), "audio_config": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="has no audio tower"):
        Gemma4.load(str(tmp_path))


@both
def test_layers_that_share_keys_have_fewer_modules_to_adapt(name):
    """Routers, altup, laurel and the per-layer gates are left alone."""
    from covo_rl.config import AdapterConfig
    from covo_rl.policy.trainable import make_trainable

    family = _family(name)
    targets = make_trainable(family, AdapterConfig(lora_r=2, lora_alpha=4.0)).targets
    leaves = {layer: sorted(t.rsplit(".", 1)[1] for t in targets if f".layers.{layer}." in t) for layer in range(4)}
    whole = sorted(family.lora_leaves)
    shared = [leaf for leaf in whole if leaf not in ("k_proj", "v_proj")]
    assert leaves == {0: whole, 1: whole, 2: shared, 3: shared}
    assert len(targets) == 24
