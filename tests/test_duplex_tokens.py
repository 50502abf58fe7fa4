"""The duplex section of the configuration, and the ids and rows of think, shift and break."""

import copy
from types import SimpleNamespace

import pytest
import torch

from covo_rl.models.covo_audio import CovoAudioConfig
from covo_rl.models.covo_audio.duplex_tokens import prepare_duplex
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.models.tiny.covo_audio import tiny_covo_audio
from covo_rl.types import UserError


@pytest.fixture(scope="module")
def tiny():
    return tiny_covo_audio(
        encoder_width=16, encoder_layers=1, decoder_width=16, decoder_layers=1, audio_codes=32, mel_bins=8
    )


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny[0])


def named(model, *names):
    """A tokenizer that calls the three ids before code 0 so."""
    first = model.config.audio_token_index - 3
    return SimpleNamespace(convert_ids_to_tokens=lambda i: names[i - first])


RESERVED = [f"<|reserved_cAUDIO_{i}|>" for i in range(3)]


def test_a_config_without_the_section_is_as_it_was():
    assert CovoAudioConfig().duplex is None


def test_defaults_are_the_three_ids_before_code_0_and_survive_a_file(tmp_path):
    config = CovoAudioConfig(duplex={"left_chunks": None})
    assert config.duplex == {
        "think": 151668, "shift": 151669, "break": 151670, "text_pad": 151643, "silence_codes": [],
        "left_chunks": None, "mel_peak": 0.0,
    }  # fmt: skip
    config.save_pretrained(tmp_path)
    assert CovoAudioConfig.from_pretrained(tmp_path).duplex == config.duplex


def test_silence_codes_are_a_list():
    with pytest.raises(ValueError, match="silence_codes=7: a list of codes"):
        CovoAudioConfig(duplex={"silence_codes": 7})
    assert CovoAudioConfig(duplex={"silence_codes": None}).duplex["silence_codes"] == []


def test_everything_wrong_is_said_at_once():
    wrong = {
        "think": 151666, "shift": 151669, "break": 151669, "text_pad": 151671, "silence_codes": [3, 16384],
        "left_chunks": -1, "mel_peak": float("nan"),
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        CovoAudioConfig(duplex=wrong)
    for words in (
        "think=151666 is the id of audio_placeholder_token_id", "break=151669 is the id of shift",
        "text_pad=151671 is no id of the text, 0 to 151670", "[16384]: the model's audio codes are 0 to 16383",
        "left_chunks=-1", "mel_peak=nan",
    ):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"unknown keys \['speak'\]; it is a mapping with think, shift"):
        CovoAudioConfig(duplex={"speak": 3})
    with pytest.raises(ValueError, match="duplex is 3"):
        CovoAudioConfig(duplex=3)


def test_reserved_tokens_are_taken_and_their_rows_are_the_mean_of_the_text(model, capsys):
    first = model.config.audio_token_index - 3
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    section = prepare_duplex(model, named(model, *RESERVED), silence_codes=[7, 9], left_chunks=3)
    assert section == model.config.duplex
    assert [section[name] for name in ("think", "shift", "break")] == [first, first + 1, first + 2]
    assert (section["silence_codes"], section["left_chunks"]) == ([7, 9], 3)
    assert f"'<|reserved_cAUDIO_0|>' ({first})" in " ".join(capsys.readouterr().out.split())
    for name, weight in model.state_dict().items():
        rows = slice(first, first + 3) if name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight") else None
        if rows is not None:
            mean = before[name][:first].double().mean(0).float()
            torch.testing.assert_close(weight[rows], mean.expand(3, -1))
            weight, before[name] = weight.clone(), before[name].clone()
            weight[rows], before[name][rows] = 0, 0
        assert torch.equal(weight, before[name]), name
    assert StreamingEncoder.of(model).left_chunks == 3


def test_tokens_that_may_be_trained_are_refused_and_nothing_changes(model, tiny):
    before = model.llm.lm_head.weight.clone()
    for tokenizer in (tiny[1].tokenizer, named(model, RESERVED[0], "<|en|>", "<|zh|>")):
        with pytest.raises(UserError, match=r"look trained.*--use-ids"):
            prepare_duplex(model, tokenizer)
    assert model.config.duplex is None and torch.equal(model.llm.lm_head.weight, before)


@pytest.mark.parametrize("row", [0.0, 0.3])
def test_rows_that_no_training_told_apart_are_free(model, row):
    first = model.config.audio_token_index - 3
    with torch.no_grad():
        model.llm.model.embed_tokens.weight[first : first + 3] = row
    assert prepare_duplex(model, named(model, "<|a|>", "<|b|>", "<|c|>"))["think"] == first


def test_use_ids_overrides_once(model, tiny):
    tokenizer = tiny[1].tokenizer
    section = prepare_duplex(model, tokenizer, use_ids=[30, 31, 32])
    assert (section["think"], section["shift"], section["break"]) == (30, 31, 32)
    with torch.no_grad():
        model.llm.lm_head.weight[30] += 1  # trained since
    row = model.llm.lm_head.weight[30].clone()
    assert prepare_duplex(model, tokenizer) == prepare_duplex(model, tokenizer, use_ids=[30, 31, 32]) == section
    assert torch.equal(model.llm.lm_head.weight[30], row)
    with pytest.raises(UserError, match=r"--use-ids 40,41,42: the model has 30,31,32"):
        prepare_duplex(model, tokenizer, use_ids=[40, 41, 42])


def test_use_ids_are_three_and_free(tiny):
    model = copy.deepcopy(tiny[0])
    with pytest.raises(UserError, match="give 3 ids"):
        prepare_duplex(model, tiny[1].tokenizer, use_ids=[1, 2])
    with pytest.raises(ValueError, match=r"think=.* is the id of audio_bos_token_id"):
        prepare_duplex(model, tiny[1].tokenizer, use_ids=[model.config.audio_bos_token_id, 31, 32])
    start = tiny[1].tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(UserError, match="with which every message begins"):
        prepare_duplex(model, tiny[1].tokenizer, use_ids=[30, 31, start])
    assert model.config.duplex is None
