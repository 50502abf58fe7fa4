"""Engines that hear: by content, once, and every answer checked."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from covo_rl.rewards import RewardError
from covo_rl.rewards.replies import AnswerError
from covo_rl.speech.listeners import ANSWERS, Heard, LocalListener, listener_from_spec
from covo_rl.speech.recognisers import ParaformerRecogniser, WhisperRecogniser
from covo_rl.speech.replies import ears_at
from covo_rl.types import Clip

ENGINE = """
import json, os, sys, wave
rows = [json.loads(line) for line in sys.stdin]
open(os.path.dirname(__file__) + "/log", "a").write(f"{len(rows)} ")
for row in rows:
    with wave.open(row["path"]) as file: length = file.getnframes()
    print(json.dumps({"id": row["id"], "text": f"{length} {row['language']}", "score": length / 1000,
                      "words": [{"text": "all", "start": 0, "end": length / file.getframerate()}]}))
"""


def tone(samples):
    return Clip(array=np.full(samples, 0.25, np.float32), sampling_rate=8000)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "asr.py").write_text(ENGINE)
    return f"command:{sys.executable} {tmp_path / 'asr.py'}"


def test_equal_sounds_are_heard_once_by_content_and_never_again(command, tmp_path):
    from covo_rl.rewards.program import write_pcm

    for name in ("one.wav", "two.wav"):
        write_pcm(tmp_path / name, np.full(800, 0.25, np.float32), 8000)
    one, two = (Clip(path=str(tmp_path / name)) for name in ("one.wav", "two.wav"))
    sounds = [Heard("a", one, "en"), Heard("b", two, "en"),
              Heard("c", one, "zh"), Heard("d", Clip(path=str(tmp_path / "no.wav")))]  # fmt: skip
    first = listener_from_spec(command)
    a, b, c, d = first.hear(sounds)
    assert a == b == {"text": "800 en", "words": [{"text": "all", "start": 0.0, "end": 0.1}]} and c["text"] == "800 zh"
    assert isinstance(d, AnswerError) and "no.wav" in str(d)
    assert first.record() == {"engine": command, "version": first.version, "asked": 4, "failed": 1}
    again = listener_from_spec(command)
    assert again.hear(sounds)[:3] == [a, b, c] and again.counts["kept"] == 2
    assert (tmp_path / "log").read_text() == "2 ", "a at one path is b at another"
    (tmp_path / "asr.py").write_text(ENGINE + "\n")
    assert listener_from_spec(command).hear(sounds[:1]) == [a]
    assert (tmp_path / "log").read_text() == "2 1 ", "another version hears anew"
    with pytest.raises(ValueError, match="two sounds have the id 'a'"):
        again.hear([sounds[0], sounds[0]])


@pytest.mark.parametrize(
    ("wants", "line", "why"),
    [
        ("text", {"text": None}, "text is None"), ("text", {"text": "a", "words": {}}, "words is {}"),
        ("text", {"text": "a", "words": [{"text": "a", "start": 2, "end": 1}]}, "word 0 lasts from 2 to 1.0 s"),
        ("text", {"text": "a", "words": [{"text": "a", "start": "0"}]}, "start of word 0 is '0'"),
        ("text", {"text": "a", "words": [{"start": 0, "end": 1}]}, "text is None"),
        ("score", {"text": "a"}, "score is None"), ("score", {"score": True}, "score is True"),
        ("score", {"score": float("inf")}, "score is inf"), ("score", {"score": {"sad": "0.5"}}, "score of sad is"),
        ("segments", {"segments": [[0, 1]]}, "segment 0 is [0, 1]"),
        ("vector", {"vector": [1, None]}, "a value of vector"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_says_why(wants, line, why):
    with pytest.raises(ValueError) as refused:
        ANSWERS[wants](line)
    assert why in str(refused.value)


def test_answers_are_read_to_what_is_meant():
    words = [{"text": "a", "start": 0, "end": 0.5, "p": 1}, {"text": "b", "start": 0.5, "end": None}]
    assert ANSWERS["text"]({"id": "1", "text": "a b", "words": words})["words"][1] == {
        "text": "b",
        "start": 0.5,
        "end": None,
    }
    assert ANSWERS["text"]({"text": ""}) == {"text": ""}, "nothing said is an answer"
    assert ANSWERS["score"]({"score": {"sad": 1}}) == {"score": {"sad": 1.0}}
    assert ANSWERS["segments"]({"segments": []}) == {"segments": []}


def test_finished_results_are_taken_by_id(tmp_path):
    path = tmp_path / "asr.jsonl"
    path.write_text('{"id": "a", "text": "hello"}\n{"id": "b", "text": ""}\n')
    engine = listener_from_spec(f"file:{path}")
    found = engine.hear([Heard("b"), Heard("a"), Heard("c")])
    assert found[:2] == [{"text": ""}, {"text": "hello"}] and "no line for c" in str(found[2])
    assert engine.record()["failed"] == 1
    path.write_text(
        '{"id": "a", "text": "hello"}\n{"id": "a", "text": "x"}\n[1]\n{"id": 3}\nno\n{"id": "d", "text": 1}\n'
    )
    with pytest.raises(RewardError) as refused:
        listener_from_spec(f"file:{path}")
    said = str(refused.value).split("\n")
    assert [line.split("line ")[1][0] for line in said] == ["2", "3", "4", "5", "6"], "every line at once"


def test_specs_that_name_no_engine_list_the_forms(tmp_path):
    for spec in ("whisper", "whisper:x", "command:", "file:"):
        with pytest.raises(RewardError, match=r"transformers:PATH .*funasr:PATH .*command:PROGRAM or file:"):
            listener_from_spec(spec)
    with pytest.raises(RewardError, match=r"write command:PROGRAM or file:RESULTS.jsonl"):
        listener_from_spec("transformers:x", "score")
    with pytest.raises(RewardError, match="no such file"):
        listener_from_spec(f"file:{tmp_path / 'nowhere.jsonl'}")


def test_a_model_hears_in_batches_of_one_language_and_loses_its_own_batch_alone():
    batches = []

    def ears(sounds, language):
        batches.append((len(sounds), language))
        if language == "xx":
            raise MemoryError("out of memory")
        return [{"text": f"{len(wave)} {language}"} for wave, _ in sounds]

    engine = LocalListener("transformers:nowhere", "text", None, lambda path: ears)
    sounds = [Heard(str(i), tone(400 + i), "en" if i % 2 else "zh") for i in range(18)]
    found = engine.hear([*sounds, Heard("x", tone(400), "xx"), Heard("none")])
    assert [one["text"] for one in found[:2]] == ["400 zh", "401 en"] and batches[:4] == [
        (8, "zh"),
        (1, "zh"),
        (8, "en"),
        (1, "en"),
    ]
    assert "MemoryError: out of memory" in str(found[18]) and "no sound" in str(found[19])
    assert engine.record()["faults"] == {"MemoryError": 1} and engine.counts["failed"] == 2


def test_an_answer_of_a_model_that_is_none_costs_its_own_sound_alone():
    def ears(sounds, language):
        return [{"text": "a", "words": [{"text": "a", "start": start, "end": 1.0}]} for start in (0.5, 2.0)]

    engine = LocalListener("transformers:nowhere", "text", None, lambda path: ears)
    good, bad = engine.hear([Heard("1", tone(400)), Heard("2", tone(401))])
    assert good["text"] == "a" and "word 0 lasts from 2 to 1" in str(bad)
    assert engine.record()["faults"] == {"an unusable answer": 1}


def test_paraformer_gives_each_unit_its_time(monkeypatch):
    asked = []

    class AutoModel:
        def __init__(self, model, **options):
            asked.append(model)

        def generate(self, input, fs):
            asked.append((len(input), fs))
            return [{"key": "x", "text": "\u4f60 \u597d", "timestamp": [[0, 240], [240, 500]]}]

    monkeypatch.setitem(sys.modules, "funasr", types.SimpleNamespace(AutoModel=AutoModel))
    wave = np.zeros(8000, np.float32)
    (heard,) = ParaformerRecogniser("paraformer-zh")([(wave, 8000)], "zh")
    assert ANSWERS["text"](heard)["words"][1] == {"text": "\u597d", "start": 0.24, "end": 0.5}
    assert asked == ["paraformer-zh", (16_000, 16_000)], "half the rate, twice the samples"
    monkeypatch.setitem(sys.modules, "funasr", None)
    with pytest.raises(ImportError, match="pip install funasr"):
        ParaformerRecogniser("x")


def test_whisper_is_asked_for_words_where_it_can_tell_them(monkeypatch):
    calls = []

    def pipe(inputs, return_timestamps, generate_kwargs):
        calls.append((return_timestamps, generate_kwargs, [len(one["raw"]) for one in inputs]))
        return [
            {
                "text": " Hi there.",
                "chunks": [{"text": " Hi", "timestamp": (0.0, 0.4)}, {"text": " there.", "timestamp": (0.4, None)}],
            }
        ]

    engine = WhisperRecogniser.__new__(WhisperRecogniser)
    engine.pipe = pipe
    engine.settings = types.SimpleNamespace(alignment_heads=[[0, 1]], is_multilingual=True)
    (heard,) = engine([(np.zeros(800, np.float32), 8000)], "en")
    assert heard == {
        "text": "Hi there.",
        "words": [{"text": "Hi", "start": 0.0, "end": 0.4}, {"text": "there.", "start": 0.4, "end": None}],
    }
    assert calls == [("word", {"do_sample": False, "language": "en", "task": "transcribe"}, [1600])]
    engine.settings = types.SimpleNamespace(alignment_heads=None, is_multilingual=False)
    assert engine([(np.zeros(800, np.float32), 8000)], "en") == [{"text": "Hi there."}]
    assert calls[1][:2] == (True, {"do_sample": False})


def test_rewards_hear_by_the_same_engines(command, tmp_path):
    ears = ears_at(command, "text")
    assert ears([np.full(800, 0.25, np.float32), np.full(900, 0.25, np.float32)], 24_000) == ["800 ", "900 "]
    assert ears_at(command, "score")([np.full(800, 0.25, np.float32)], 24_000) == [0.8]
    assert not (tmp_path / "cache").exists(), "replies of training are not kept"
    assert Path(tmp_path / "log").read_text() == "2 1 "


def tiny_whisper(folder, aligned):
    """A Whisper of random weights that knows bytes, two languages and all of the times."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )  # fmt: skip
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = ("endoftext", "startoftranscript", "en", "zh", "translate", "transcribe", "startoflm", "startofprev",
             "nospeech", "notimestamps", *(f"{i * 0.02:.2f}" for i in range(1501)))  # fmt: skip
    special = [f"<|{name}|>" for name in names]
    vocab = {text: i for i, text in enumerate([*bytes_to_unicode().values(), *special])}
    ids = {name: vocab[f"<|{name}|>"] for name in names}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], language="en", task="transcribe")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:10]})
    ends = {f"{kind}_token_id": ids["endoftext"] for kind in ("pad", "bos", "eos")}
    ends["decoder_start_token_id"] = ids["startoftranscript"]
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder")
             for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(vocab), d_model=16, **sizes, **ends))
    model.generation_config = GenerationConfig(
        **ends, is_multilingual=True, lang_to_id={name: ids[name[2:-2]] for name in special[2:4]},
        task_to_id={name: ids[name] for name in ("transcribe", "translate")}, max_initial_timestamp_index=50,
        no_timestamps_token_id=ids["notimestamps"], prev_sot_token_id=ids["startofprev"], max_length=30,
        **({"alignment_heads": [[0, 0]]} if aligned else {}),
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
def test_a_whisper_checkpoint_hears_with_times_of_words_where_it_is_aligned(aligned, tmp_path):
    tiny_whisper(tmp_path, aligned)
    engine = listener_from_spec(f"transformers:{tmp_path}", keep=False)
    noise = [
        np.random.default_rng(i).standard_normal(size).astype(np.float32) / 10 for i, size in enumerate((8000, 270_000))
    ]
    sounds = [Heard(str(i), Clip(array=wave, sampling_rate=8000), "zh") for i, wave in enumerate(noise)]
    short, long = engine.hear(sounds)  # 1 s, and 34 s: two windows
    assert len(engine.version) == 64 and all(isinstance(one["text"], str) for one in (short, long))
    assert all(("words" in one) == aligned for one in (short, long))
    assert all(word["start"] <= 34 for word in long.get("words", ()))
