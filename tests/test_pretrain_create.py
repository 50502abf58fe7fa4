"""A Covo-Audio of a text LLM and a speech encoder: what is taken over stays as it was, what is new starts sanely."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from typer.testing import CliRunner

from covo_rl.models import load_family
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.run.commands.models import app
from covo_rl.supervised.pretrain import create, created
from covo_rl.supervised.pretrain.create import CreateError, Creation, create_model
from covo_rl.supervised.pretrain.document import Vocabulary
from covo_rl.supervised.pretrain.sources import PartSource

PADDING = 7  # rows of the LLM's tables behind its tokens, as Qwen's have
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
ENCODER = {"d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 1,
           "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_mel_bins": 20, "max_source_positions": 100,
           "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
           "begin_suppress_tokens": None}  # fmt: skip


def _llm(folder, tokenizer, **sizes):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**DECODER, vocab_size=len(tokenizer) + PADDING, **sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight[len(tokenizer) :] = 100.0  # nobody may learn from padding
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(WhisperConfig(**ENCODER)).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=20, chunk_length=2).save_pretrained(folder / "whisper")
    return _llm(folder / "llm", tiny_tokenizer(audio_tokens=())), str(folder / "whisper")


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    record = create_model(Creation(*sources, str(folder), codes=2000, adapter_hidden=32, seed=3))
    return folder, record


def test_text_logits_and_features_are_those_of_the_sources(sources, made):
    family = load_family(str(made[0]))
    ids = torch.arange(0, 500, 7)[None]
    with torch.no_grad():
        llm = Qwen2ForCausalLM.from_pretrained(sources[0])(input_ids=ids).logits[..., :512]
        ours = family.model(input_ids=ids, use_cache=False).logits
        mel = torch.randn(1, 20, 200)
        heard = WhisperModel.from_pretrained(sources[1]).encoder(mel).last_hidden_state
        encoded = family.model.encoder(mel).last_hidden_state
    assert ours.shape[-1] == 512 + 6 + 2000
    assert (ours[..., :512] - llm).abs().max() < 1e-5 and (encoded - heard).abs().max() < 1e-5
    assert made[1]["logits_gap"] < 1e-5 and made[1]["encoder_gap"] < 1e-5


def test_text_rows_stay_bit_for_bit_and_new_rows_are_their_mean_with_noise(sources, made):
    llm, ours = load_file(f"{sources[0]}/model.safetensors"), load_file(made[0] / "model.safetensors")
    noises = []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        text, new = llm[name][:512], ours[f"llm.{name}"]
        assert torch.equal(new[:512], text)
        noise = new[512:] - text.mean(0)
        assert abs(noise.std() - 0.02) < 0.0005  # 2,006 rows of 32: a standard error of 0.00006
        assert noise.mean(0).abs().max() < 5 * 0.02 / 2006**0.5
        assert len(noise.unique(dim=0)) == 2006
        noises.append(noise.flatten())
    assert abs(torch.corrcoef(torch.stack(noises))[0, 1]) < 0.02  # not the same noise twice


def test_ids_are_those_of_the_tokenizer_and_pre_training_takes_the_model(made):
    folder, record = made
    family = load_family(str(folder))
    tokens = family.tokenizer.get_vocab()
    assert [tokens[token] for token in create.AUDIO_TOKENS] == [512, 513, 514] and len(family.tokenizer) == 518
    vocabulary = Vocabulary.of(family)
    assert (vocabulary.audio_start, vocabulary.slot, vocabulary.audio_end) == (512, 513, 514)
    assert (vocabulary.first_code, vocabulary.codes) == (518, 2000) == (record["first_code"], record["codes"])
    assert vocabulary.text("<|cAUDIO|>") != [513]  # what a row spells stays text
    assert family.processor.feature_extractor.feature_size == 20
    assert family.processor.feature_extractor.segment_frames == 200  # 2 s, as the encoder's positions
    slots = family.slots(family.extract(torch.randn(24000).numpy()))
    assert slots == family.slot_count(24000) == 7


class Qwen25(dict):
    """As much of Qwen2.5's tokenizer as ids need: 151,643 pieces, then 22 special tokens."""

    pad_token_id = 151643

    def __init__(self):
        super().__init__({"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645})
        self.size = 151665

    def __len__(self):
        return self.size

    def get_vocab(self):
        return self

    def convert_tokens_to_ids(self, tokens):
        return [self[token] for token in tokens]

    def add_tokens(self, tokens, special_tokens):
        assert special_tokens
        self.update({token: self.size + i for i, token in enumerate(tokens)})
        self.size += len(tokens)


def test_qwen_with_151665_tokens_gets_the_published_ids():
    llm = PartSource(None, Qwen2Config(**DECODER, vocab_size=152064), Qwen25(), text_rows=151665)
    config = create.configuration(Creation("", "", ""), llm, PartSource(None, WhisperConfig(**ENCODER)))
    assert (config.text_end_token_id, config.turn_end_token_id) == (151643, 151645)
    ids = (config.audio_bos_token_id, config.audio_placeholder_token_id, config.audio_eos_token_id)
    assert ids == (151665, 151666, 151667)
    assert (config.audio_token_index, config.llm_config.vocab_size) == (151671, 168055)


def test_a_tied_head_becomes_a_copy_and_audio_tokens_of_the_llm_are_kept(sources, tmp_path):
    llm = _llm(tmp_path / "tied", tiny_tokenizer(), tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(f"{llm}/model.safetensors")
    record = create_model(Creation(llm, sources[1], str(tmp_path / "out"), codes=9, adapter_hidden=8))
    assert (record["added_tokens"], record["first_code"]) == (0, 512)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    table, head = ours["llm.model.embed_tokens.weight"], ours["llm.lm_head.weight"]
    assert torch.equal(table[:512], head[:512]) and not torch.equal(table[512:], head[512:])


def test_parts_of_a_covo_audio_are_taken_and_weights_rounded_on_request(made, tmp_path):
    model, processor = tiny_covo_audio(encoder_width=16, decoder_width=32, decoder_layers=1, adapter_hidden=8)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "covo")
    record = create_model(
        Creation(str(tmp_path / "covo"), str(tmp_path / "covo"), str(tmp_path / "out"), codes=4, adapter_downsample=2,
                 adapter_hidden=8, dtype="bfloat16")
    )  # fmt: skip
    assert record["dtype"] == "bfloat16" and record["logits_gap"] < created.LIMITS[torch.bfloat16]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(ours["encoder.conv1.weight"], model.encoder.conv1.weight.bfloat16())
    assert sum(name.startswith("audio_adapter") for name in ours) == 6  # one stage of three layers
    family = load_family(str(tmp_path / "out"))
    assert family.processor.feature_extractor.slot_frames == 4
    with pytest.raises(CreateError, match=r"it has 2000 codes of speech already"):
        create_model(Creation(str(made[0]), str(made[0]), str(tmp_path / "again")))


@torch.no_grad()
def test_the_adapter_hands_on_what_it_hears(made):
    model = load_family(str(made[0])).model
    first, second = torch.randn(2, 1, 100, 24)
    rows = [model.audio_adapter(states) for states in (first, second)]
    text = model.llm.model.embed_tokens.weight[:512]
    size = float(rows[0].square().mean().sqrt() / text.square().mean().sqrt())
    assert 0.3 < size < 3  # as long as a word's embedding
    assert (rows[0] - rows[1]).square().mean().sqrt() > 0.3 * rows[0].square().mean().sqrt()
    for weight in model.audio_adapter.parameters():  # as transformers would draw them
        weight.copy_(torch.randn(weight.shape) * 0.02) if weight.ndim > 1 else weight.zero_()
    assert model.audio_adapter(first).square().mean().sqrt() < 1e-3 * rows[0].square().mean().sqrt()


def test_the_seed_decides_and_codes_leave_the_adapter_alone(sources, made, tmp_path):
    create_model(Creation(*sources, str(tmp_path / "fewer"), codes=8, adapter_hidden=32, seed=3))
    create_model(Creation(*sources, str(tmp_path / "other"), codes=8, adapter_hidden=32, seed=4))
    first, fewer, other = (load_file(path / "model.safetensors") for path in (made[0], *sorted(tmp_path.iterdir())))
    drawn = [name for name in first if name.startswith("audio_adapter") and name.endswith("weight")]
    assert len(drawn) == 9 and all(torch.equal(first[name], fewer[name]) for name in drawn)
    assert not any(torch.equal(fewer[name], other[name]) for name in [*drawn, "llm.lm_head.weight"])


def test_everything_that_does_not_fit_is_said_at_once_and_nothing_written(sources, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(sources[1], odd)
    settings = json.loads((odd / "preprocessor_config.json").read_text()) | {"feature_size": 80, "hop_length": 200}
    (odd / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    bad = Creation(sources[1], str(odd), str(tmp_path / "out"), codes=-1, adapter_downsample=6, dtype="int4")
    with pytest.raises(CreateError) as caught:
        create_model(bad)
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    for part in (
        "--codes -1", "--adapter-downsample 6: a power of two", "--dtype int4: there are auto, float32",
        "it exists; give a new folder", "its model_type is whisper, but a Qwen2 causal model",
        "feature_size 80, where 20", "hop_length 200, where 160",
    ):  # fmt: skip
        assert part in said
    with pytest.raises(CreateError, match=r"no folder with a config.json") as caught:
        create_model(Creation(str(tmp_path / "none"), "builtin:none", str(tmp_path / "new")))
    assert len(caught.value.problems) == 2 and not (tmp_path / "new").exists()


def test_cut_files_are_named(sources, tmp_path):
    for name, source in zip(("llm", "whisper"), sources, strict=True):
        shutil.copytree(source, tmp_path / name)
    state = load_file(tmp_path / "llm" / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "llm" / "model.safetensors")
    state = load_file(tmp_path / "whisper" / "model.safetensors")
    state["model.encoder.conv1.weight"] = state["model.encoder.conv1.weight"][:, :5].clone()
    save_file(state, tmp_path / "whisper" / "model.safetensors")
    with pytest.raises(CreateError) as caught:
        create_model(Creation(str(tmp_path / "llm"), str(tmp_path / "whisper"), str(tmp_path / "out")))
    llm, encoder = caught.value.problems
    assert (
        "model.norm.weight is missing" in llm and "conv1.weight is (24, 5, 3), config.json wants (24, 20, 3)" in encoder
    )
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "whisper" / "model.safetensors").unlink()
    with pytest.raises(CreateError) as caught:
        create_model(Creation(str(tmp_path / "llm"), str(tmp_path / "whisper"), str(tmp_path / "out")))
    assert "its weights cannot be read" in caught.value.problems[0]
    assert "there is no model.safetensors" in caught.value.problems[1]


def test_a_model_that_is_not_what_it_was_made_of_is_not_left(sources, tmp_path, monkeypatch):
    right = create.extended
    monkeypatch.setattr(create, "extended", lambda *given: right(*given).roll(1, 0))
    with pytest.raises(created.VerificationError, match=r"out is not .*logits lie .* apart.*text rows of .* changed"):
        create_model(Creation(*sources, str(tmp_path / "out"), codes=4, adapter_hidden=8))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_ids_and_gaps(sources, tmp_path):
    words = ["create", "--llm", sources[0], "--encoder", sources[1], "--output", str(tmp_path / "out"), "--codes", "4"]
    result = CliRunner().invoke(app, [*words, "--adapter-hidden", "8"])
    assert result.exit_code == 0 and "4, ids 518 to 521" in result.output and "512 of the LLM, 6 added" in result.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "it exists; give a new folder" in again.output
