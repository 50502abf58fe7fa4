"""Qwen3-ASR and the thinkers of Qwen2.5-Omni and Qwen3-Omni: what is peculiar to each of them."""

import json
import re

import numpy as np
import policy_cases as cases
import pytest
import torch
from published import tables, write_published
from safetensors.torch import load_file, save_file
from transformers.quantizers.quantizers_utils import should_convert_module

from covo_rl.config import AdapterConfig, PromptConfig
from covo_rl.export.merged import write_merged
from covo_rl.models import ModelError, load_family
from covo_rl.models.quantised import quantisation_of
from covo_rl.models.tiny import tiny_model
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.types import Clip, Example

RATE = 16_000
NAMES = ("qwen3_asr", "qwen2_5_omni", "qwen3_omni_moe")
THINKERS = NAMES[1:]
#: seconds -> slots: 13 of every 100 mel frames, 25 a second; 30.01 s is one frame more than 30
SLOTS = {
    "qwen3_asr": {0.1: 7, 1.0: 13, 2.35: 31, 29.99: 390, 30.0: 390, 30.01: 391, 41.0: 533},  # at least half a second
    "qwen2_5_omni": {0.1: 2, 1.0: 25, 2.35: 59, 29.99: 750, 30.0: 750, 30.01: 750, 41.0: 1025},
    "qwen3_omni_moe": {0.1: 2, 1.0: 13, 2.35: 31, 29.99: 390, 30.0: 390, 30.01: 391, 41.0: 533},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every model as its authors publish it; of the thinkers the full checkpoint, whose other parts hold NaN."""
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp("published") / name
        made[name].mkdir()
        write_published(*tiny_model(name), tables()[name], made[name])
    for name in THINKERS:
        weights = load_file(made[name] / "model.safetensors")
        others = {f"{part}.norm.weight": torch.full((2,), torch.nan) for part in ("talker", "token2wav", "code2wav")}
        save_file(weights | others, made[name] / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def family_of(folders):
    loaded = {name: load_family(str(folders[name])) for name in NAMES}
    return loaded.__getitem__


def wave(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_layout_holds_every_weight(name, folders, family_of):
    model, _ = tiny_model(name)
    theirs, ours = model.state_dict(), family_of(name).model.state_dict()
    assert {key for key in theirs if "visual." not in key} == ours.keys()  # the tower that sees is let go
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    shapes = {re.sub(r"(?<=\.)\d+(?=\.)", "N", key) for key in load_file(folders[name] / "model.safetensors")}
    heard = {shape for shape in shapes if shape.startswith("thinker.") and ".visual." not in shape}
    assert heard == set(tables()[name].get("shapes", []))  # what the real checkpoint holds for audio and text


@pytest.mark.parametrize("name", THINKERS)
def test_a_thinker_alone_is_the_same_model(name, family_of, tmp_path):
    model, processor = tiny_model(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"{name}_thinker"
    alone, full = load_family(str(tmp_path)), family_of(name)
    assert type(alone) is type(full) and alone.parts == full.parts and alone.eos_token_ids == full.eos_token_ids
    theirs = full.model.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in alone.model.state_dict().items())


@pytest.mark.parametrize("name", THINKERS)
def test_a_merged_export_holds_what_was_never_read(name, folders, family_of, tmp_path):
    write_merged(family_of(name), tmp_path)
    before, after = load_file(folders[name] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) or bool(after[key].isnan().all()) for key in before)
    assert sum(bool(tensor.isnan().any()) for tensor in after.values()) == 3  # talker and vocoders, as they were
    was, config = (json.loads((folder / "config.json").read_text()) for folder in (folders[name], tmp_path))
    assert config["thinker_config"]["model_type"] == f"{name}_thinker"
    assert {key: value for key, value in config.items() if key != "thinker_config"} == {
        key: value for key, value in was.items() if key != "thinker_config"
    }


def stock_features(family, samples):
    """Mel frames and slots as the stock processor makes them."""
    extractor, model = family.processor.feature_extractor, family.model
    options = {"sampling_rate": RATE, "return_attention_mask": True, "return_tensors": "pt"}
    if family.model_type == "qwen2_5_omni":
        out = extractor(samples, padding="max_length", **options)
        tower = model.get_submodule(family.parts["encoder"].rstrip("."))
        _, count = tower._get_feat_extract_output_lengths(out["attention_mask"].sum(-1))
    elif family.model_type == "qwen3_omni_moe":
        from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths

        out = extractor(samples, padding=True, truncation=False, **options)
        count = _get_feat_extract_output_lengths(out["attention_mask"].sum(-1))
    else:
        from transformers.models.qwen3_asr.processing_qwen3_asr import Qwen3ASRProcessor

        out = extractor(samples, padding=True, n_window=50, **options)
        count = Qwen3ASRProcessor._get_audio_token_length(None, out["attention_mask"].sum(-1))
    return out["input_features"][..., : int(out["attention_mask"].sum())], int(count[0])


@pytest.mark.parametrize("name", NAMES)
def test_features_and_slots_are_those_of_the_stock_processor(name, family_of):
    """41 s whole, where the extractor of Qwen3-Omni would stop at 30 s; of 300 s of padding nothing is kept."""
    family = family_of(name)
    for seconds, slots in SLOTS[name].items():
        samples = wave(seconds)
        clip = family.clip_features(samples, RATE)
        assert clip.slots == slots == family.clip_slots(samples, RATE), seconds
        with torch.no_grad():
            assert family.encode([clip])[0].shape == (slots, 64)
        if name == "qwen2_5_omni" and seconds not in (2.35, 41.0):
            continue  # 300 s each
        theirs, count = stock_features(family, samples)
        ours = clip.tensors["input_features"]
        assert count == slots and ours.shape[-1] - theirs.shape[-1] < (100 if name == "qwen3_asr" else 1)
        torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_length_is_counted_without_its_features(name, family_of):
    family = family_of(name)
    for samples in (161, 201, 319, 320, 321, 481, 7999, 8001, 15_999, 16_001, 16_159, 16_160, 17_280, 33_333):
        clip = np.zeros(samples, np.float32)
        try:
            slots = family.clip_features(clip, RATE).slots
        except ValueError as error:
            assert "too short for one audio slot" in str(error) and samples < 400
            with pytest.raises(ValueError, match="too short for one audio slot"):
                family.clip_slots(clip, RATE)
        else:
            assert family.clip_slots(clip, RATE) == slots > 0, samples


def prompt_of(family, clips, *lengths, question="What is it?"):
    arrays = tuple(Clip(array=wave(length, seed), sampling_rate=RATE) for seed, length in enumerate(lengths))
    return build_prompt(Example("row7", arrays, question, (), "a", {}), family, clips, PromptConfig(instruction=""))


def test_a_clip_over_300_s_is_refused_by_row(family_of):
    policy = Policy(family_of("qwen2_5_omni"), None, clips=cases.ClipStore())
    with pytest.raises(PromptError, match=r"row row7: a clip of 300\.01 s: Qwen2\.5-Omni takes 300 s and would cut"):
        prompt_of(policy.family, policy.clips, 300.01)


@pytest.mark.parametrize("name", THINKERS)
def test_with_audio_alone_every_axis_of_mrope_counts_plainly(name, family_of):
    family, clips = family_of(name), cases.ClipStore()
    prompt = prompt_of(family, clips, 0.5, 1.7)
    ids = torch.tensor([prompt.input_ids])
    frames = [family.clip_features(*clips.waveform(key)).tensors["feature_attention_mask"].sum(-1)
              for key in prompt.clip_keys]  # fmt: skip
    positions, deltas = family.model.get_rope_index(
        input_ids=ids, attention_mask=torch.ones_like(ids), audio_seqlens=torch.cat(frames)
    )
    assert torch.equal(positions, torch.arange(ids.shape[1]).expand(3, 1, -1)) and int(deltas) == 0


@pytest.mark.parametrize("name", NAMES)
def test_packed_scores_are_those_of_the_models_own_forward(name, folders):
    """Two clips of other lengths, one, and none; completions of 5, 1 and 9 tokens; LoRA that matters."""
    family = load_family(str(folders[name]))
    modes = make_trainable(family, AdapterConfig(lora_r=4, lora_alpha=8.0))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in family.model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    policy = Policy(family, modes.peft_model, clips=cases.ClipStore())
    prompts = [prompt_of(family, policy.clips, *lengths) for lengths in ((0.4, 1.3), (2.1,), ())]
    groups = [cases.group(prompt, (5, 1, 9), seed=i) for i, prompt in enumerate(prompts)]
    with torch.no_grad():
        ours = policy.logps(groups, policy.features(prompts)).logps_NC
        theirs = [
            own_logps(policy, group.prompt, rollout.completion_ids) for group in groups for rollout in group.rollouts
        ]
    torch.testing.assert_close(ours, cases.padded(theirs), atol=1e-5, rtol=0)


def own_logps(policy, prompt, completion):
    """Log-probs of a completion from one row of the plain model: ids, mask and padded features."""
    ids = torch.tensor([[*prompt.input_ids, *completion]])
    clips = [policy.family.clip_features(*policy.clips.waveform(key)).tensors for key in prompt.clip_keys]
    features = {}
    for key in clips[0] if clips else ():
        width = max(clip[key].shape[-1] for clip in clips)
        features[key] = torch.cat([torch.nn.functional.pad(c[key], (0, width - c[key].shape[-1])) for c in clips])
    logits = policy.family.model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits
    place = len(prompt.input_ids) - 1
    table = logits[0, place : place + len(completion)].log_softmax(-1)
    return table.gather(1, torch.tensor(completion)[:, None])[:, 0]


AUDIO = {"type": "audio"}


def text(words):
    return {"type": "text", "text": words}


def test_qwen2_5_omni_keeps_the_system_turn_of_its_template(family_of):
    render = family_of("qwen2_5_omni").render
    user = {"role": "user", "content": [AUDIO, text("Hi?")]}
    heard = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>Hi?<|im_end|>\n<|im_start|>assistant\n"
    assert render([user]) == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + heard
    assert render([{"role": "system", "content": "Be brief."}, user]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + heard
    )


def test_qwen3_asr_reads_text_in_its_system_turn(family_of):
    """Without text of the user it is the published template; with text nothing is dropped."""
    render = family_of("qwen3_asr").render
    head, heard = "<|im_start|>system\n", "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    ends = "<|im_start|>assistant\n"
    user = {"role": "user", "content": [AUDIO]}
    assert render([user]) == f"{head}<|im_end|>\n{heard}{ends}"
    words = {"role": "system", "content": [text("Names: Ann")]}
    assert render([words, user]) == f"{head}Names: Ann<|im_end|>\n{heard}{ends}"
    asks = {"role": "user", "content": [AUDIO, text("What is said?")]}
    assert render([words, asks]) == f"{head}Names: Ann\nWhat is said?<|im_end|>\n{heard}{ends}"
    said = {"role": "assistant", "content": "language English<asr_text>Hello."}
    assert render([user, said, asks]) == (
        f"{head}What is said?<|im_end|>\n{heard}{ends}language English<asr_text>Hello.<|im_end|>\n{heard}{ends}"
    )


def test_the_other_layout_of_qwen3_asr_is_refused_by_name(folders, tmp_path):
    config = json.loads((folders["qwen3_asr"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_asr", "thinker_config": config}))
    with pytest.raises(ModelError, match=r"layout of the qwen-asr package.*whose name ends in -hf"):
        load_family(str(tmp_path))


@pytest.mark.parametrize("name", THINKERS)
def test_four_bits_hold_no_encoder_whatever_transformers_calls_it(name, family_of):
    kind = type(family_of(name))
    skip = quantisation_of(kind.parts, "float32", kind.other_parts).llm_int8_skip_modules
    linears = [key for key, module in family_of(name).model.named_modules() if isinstance(module, torch.nn.Linear)]
    whole = {key for key in linears if not should_convert_module(key, skip)}
    assert len(whole) > 10 and whole == {key for key in linears if "audio_tower" in key or key == "lm_head"}
