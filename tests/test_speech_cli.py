"""`covo-rl speech`: rows to codes and back through files, with tokenizers and decoders of random weights."""

import json

import numpy as np
import pytest
import soundfile
import torch

from covo_rl.cli import main
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.token2wav.configuration import Token2WavConfig
from covo_rl.speech.configuration import SpeechTokenizerConfig
from covo_rl.speech.pieces import Pieces
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.synth.speech import DIGITS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two spoken rows, a tokenizer and a decoder."""
    folder = tmp_path_factory.mktemp("speech")
    torch.manual_seed(0)
    pieces = Pieces.learn([" ".join(DIGITS)], None)
    SpeechTokenizer(SpeechTokenizerConfig.tiny(len(pieces)), pieces).save_pretrained(folder / "tokenizer")
    Token2Wav(Token2WavConfig.tiny()).save_pretrained(folder / "decoder")
    assert _speech("make", folder / "digits", "--count", "2", "--split", "test") == 0
    return folder


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _speech(*words):
    """The exit code of `covo-rl speech WORDS`."""
    with pytest.raises(SystemExit) as exit:
        main(["speech", *map(str, words)])
    return exit.value.code


def test_recordings_become_codes_and_codes_recordings(place, capsys):
    digits, tokenizer = place / "digits", SpeechTokenizer.from_pretrained(place / "tokenizer")
    assert _speech("encode", digits / "rows.jsonl", digits / "codes.jsonl", "--tokenizer", place / "tokenizer") == 0
    said, coded = _rows(digits / "rows.jsonl"), _rows(digits / "codes.jsonl")
    for before, after in zip(said, coded, strict=True):
        wave = soundfile.read(digits / before["audio"], dtype="float32")[0]
        assert after == before | {"codes": tokenizer.encode([wave])[0].tolist(), "tokenizer": tokenizer.digest()}
        assert len(after["codes"]) == len(wave) / 960
    options = ("--decoder", place / "decoder", "--steps", "2")
    assert _speech("decode", digits / "codes.jsonl", place / "spoken", *options) == 0
    for before, after in zip(coded, _rows(place / "spoken/rows.jsonl"), strict=True):
        wave, rate = soundfile.read(place / "spoken" / after["audio"])
        assert (len(wave), rate) == (960 * len(before["codes"]), 24_000) and np.abs(wave).max() > 0
        assert after["text"] == before["text"]
    printed = capsys.readouterr().out
    assert "2 rows, " in printed and "2 rows spoken" in printed


def test_words_get_times_from_the_codes(place, capsys):
    digits, tokenizer = place / "digits", ("--tokenizer", place / "tokenizer")
    said = _rows(digits / "rows.jsonl")
    bare = [{**row, "words": None} for row in said]
    (digits / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    assert _speech("align", digits / "bare.jsonl", digits / "words.jsonl", *tokenizer) == 0
    for row, aligned in zip(said, _rows(digits / "words.jsonl"), strict=True):
        assert [word for word, _, _ in aligned["words"]] == row["text"].split()
        ends = [second for _, start, end in aligned["words"] for second in (start, end)]
        assert ends == sorted(ends) and ends[0] >= 0 and all(round(second * 25, 6).is_integer() for second in ends)
    # words that are there stay, exact as they are; paths start where those of the rows do
    (digits / "half.jsonl").write_text("\n".join(map(json.dumps, [said[0], bare[1]])))
    capsys.readouterr()
    assert _speech("align", digits / "half.jsonl", place / "half.jsonl", *tokenizer) == 0
    assert f"1 had theirs; written to {place}/half.jsonl; read it with --audio-dir {digits}" in capsys.readouterr().out
    half = _rows(place / "half.jsonl")
    assert half[0] == said[0] and half[1]["words"] == _rows(digits / "words.jsonl")[1]["words"]
    (digits / "long.jsonl").write_text(json.dumps({**bare[0], "text": "one two " * 200}))
    assert _speech("align", digits / "long.jsonl", digits / "no.jsonl", *tokenizer) == 2
    assert "400 pieces of text do not fit" in capsys.readouterr().err and not (digits / "no.jsonl").exists()


def test_nothing_is_written_where_a_row_is_wrong(place, capsys):
    digits = place / "digits"
    rows = _rows(digits / "rows.jsonl")
    bad = [rows[0] | {"id": "a", "audio": "rows.jsonl"}, rows[1], rows[1] | {"id": "c", "words": [["one", 0, 99]]}]
    (digits / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    assert _speech("encode", digits / "bad.jsonl", digits / "out.jsonl", "--tokenizer", place / "tokenizer") == 2
    message = capsys.readouterr().err
    assert "2 problems" in message and "\n  a: " in message and "c: " in message and "ends at 99.0 s" in message
    (digits / "other.jsonl").write_text(json.dumps(rows[0] | {"codes": [256, 0], "words": None}))
    assert _speech("decode", digits / "other.jsonl", place / "none", "--decoder", place / "decoder") == 2
    assert "its code 256 at position 0: there are 0 to 255" in capsys.readouterr().err
    assert not (place / "none").exists() and not (digits / "out.jsonl").exists()


def test_words_that_make_no_sense_are_told(place, capsys):
    rows, tokenizer = place / "digits/rows.jsonl", ("--tokenizer", place / "tokenizer")
    for words, message in (
        (("encode", rows, rows, *tokenizer), "exists: give another OUT"),
        (("encode", rows, place / "nowhere/rows.jsonl", *tokenizer), "no such folder for OUT"),
        (("encode", place / "digits/row.jsonl", place / "x", *tokenizer), "no such file or folder"),
        (("encode", rows, place / "x", "--tokenizer", place / "none"), "none/config.json"),
        (("make", place / "digits"), "digits holds rows.jsonl: give another OUT"),
        (("decode", rows, place / "digits"), "digits holds rows.jsonl: give another OUT"),
        (("make", place / "x", "--split", "dev"), "there are train, validation, test"),
        (("encode", rows, place / "x", "--device", "foo"), "device 'foo': write auto, cpu"),
        (("make", place / "tokenizer/config.json"), "cannot be written"),
        (("demo", place / "tokenizer/config.json"), "cannot be written"),
        (("demo", place / "x", "--seed", "-1"), "greater than or equal to 0"),
        (("demo", place / "x", "--train", "--decoder", "d"), "leave out --tokenizer and --decoder"),
    ):
        assert _speech(*words) == 2
        assert message in capsys.readouterr().err
    assert not (place / "x").exists()


def test_trainings_are_their_recipes(capsys):
    assert _speech("train-tokenizer", "--help") == 0
    assert "--wavlm" in capsys.readouterr().out
    # every option of the YAML is one of the command
    wrong = ("--pitch-gain", "0", "--seed", "x", "--dtype", "int8", "--resume", "--overwrite")
    assert _speech("train-decoder", *wrong) == 1
    message = capsys.readouterr().err
    for text in ("pitch_gain 0", "seed 'x'", "dtype 'int8'", "resume goes on, overwrite begins again"):
        assert text in message
    assert _speech("train-tokenizer", "--steps", "0") == 1
    assert "steps 0: must be at least 1" in capsys.readouterr().err
