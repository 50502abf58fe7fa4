"""Engines of speech benchmarks by flag, prompts by name, votes by a rule, the cascade and noise."""

import hashlib
import json
import sys

import numpy as np
import pytest
import test_rewards_judge
from test_rewards_judge import says

from covo_rl.data.files import read_record
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.noise import add_noise, noisy_rows
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.engines import SpeechEngines, speech_engines
from covo_rl.evaluate.speech.judge_prompts import own_prompt, prompt_names, slots_of
from covo_rl.evaluate.speech.votes import OFFICIAL_SAMPLING, JudgeCounts, JudgeQuestion, ask_votes
from covo_rl.rewards.judge import EndpointJudge
from covo_rl.types import Clip, Example

endpoint = test_rewards_judge.endpoint


def one_to_five(reply):
    return int(reply) if reply in "12345" else None


# -- votes -----------------------------------------------------------------------------------------------------------


def test_three_votes_are_three_requests_with_the_official_sampling(endpoint, tmp_path):
    server = endpoint(says("5"), says("4"), says("5"))
    judge = EndpointJudge("m", server.url, cache=tmp_path, concurrency=1)
    asked = [JudgeQuestion("a", "p")]
    (found,) = ask_votes(judge, asked, one_to_five, votes=3, sampling=OFFICIAL_SAMPLING)
    assert found.values == (5, 4, 5) and not found.missing
    assert [body["temperature"] for _, body in server.requests] == [0.5] * 3 and server.requests[0][1]["top_p"] == 0.95
    assert ask_votes(judge, asked, one_to_five, votes=3, sampling=OFFICIAL_SAMPLING)[0].values == (5, 4, 5)
    assert len(server.requests) == 3, "kept, each vote by itself"


def test_what_cannot_be_read_is_asked_again_and_then_missing(endpoint, tmp_path):
    server = endpoint(says("five"), says("4 of 5"), says("4"))
    judge = EndpointJudge("m", server.url, cache=tmp_path, concurrency=1)
    counts = JudgeCounts()
    assert ask_votes(judge, [JudgeQuestion("a", "p")], one_to_five, counts=counts)[0].values == (4,)
    assert (counts.asked, counts.asked_again, len(server.requests)) == (1, 2, 3)
    server = endpoint(says("great"))
    judge = EndpointJudge("m", server.url, cache=tmp_path / "other", concurrency=1)
    (lost,) = ask_votes(judge, [JudgeQuestion("a", "p")], one_to_five, votes=3, counts=counts)
    assert lost.values == () and lost.kind == "unreadable" and "'great'" in lost.missing and len(server.requests) == 4
    assert counts.missing == {"unreadable": 1} and not list((tmp_path / "other").rglob("*.txt")), (
        "nothing of it is kept"
    )


def test_a_judge_that_fails_is_missing_and_not_asked_again(endpoint):
    server = endpoint((401, "no"))
    (lost,) = ask_votes(EndpointJudge("m", server.url), [JudgeQuestion("a", "p")], one_to_five)
    assert lost.kind == "failed" and "HTTP 401" in lost.missing and len(server.requests) == 1


def test_clips_are_part_of_what_is_asked(endpoint, tmp_path):
    server = endpoint(says("3"))
    judge = EndpointJudge("m", server.url, cache=tmp_path, hears=True)
    sounds = [Clip(array=np.full(800, level, np.float32), sampling_rate=8000) for level in (0.1, 0.2, 0.1)]
    asked = [JudgeQuestion(str(i), "the same words", (clip,)) for i, clip in enumerate(sounds)]
    assert [one.values for one in ask_votes(judge, asked, one_to_five)] == [(3,)] * 3
    kinds = [[part["type"] for part in body["messages"][0]["content"]] for _, body in server.requests]
    assert kinds == [["input_audio", "text"]] * 2, "two sounds under three ids"


def test_finished_judgements_need_no_judge(tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text('{"id": "a", "text": ["5", "4"]}\n{"id": "b", "text": "?"}\n')
    judge = speech_engines(judge=f"file:{path}").judge
    found = ask_votes(judge, [JudgeQuestion(name, "") for name in "abc"], one_to_five, votes=2)
    assert found[0].values == (5, 4) and found[1].kind == "unreadable"
    assert found[2].kind == "failed" and "no line for c" in found[2].missing


# -- flags -----------------------------------------------------------------------------------------------------------


def test_everything_wrong_with_the_flags_is_said_at_once(tmp_path):
    (tmp_path / "blind.txt").write_text("Score this.")
    with pytest.raises(EvalInputError) as refused:
        speech_engines(
            judge="gpt-4o", audio_judge="openai:m@http://localhost/v1", transcriber=["whisper", "file:nowhere.jsonl"],
            scorer_model=["mos=command:x", "utmos=transformers:x", "vad"],
            judge_prompt=["uro-open", "nobody=x", f"uro-open={tmp_path / 'blind.txt'}", "uro-qa=nowhere.txt"],
        )  # fmt: skip
    said = "\n".join(refused.value.problems)
    for words in ("--judge gpt-4o: names no judge; write openai:MODEL@URL, transformers:PATH, command:PROGRAM",
                  "names no judge that hears; write openai-audio:MODEL@URL, command:PROGRAM or file:REPLIES.jsonl",
                  "--transcriber whisper: 'whisper' names no engine", "the names are utmos, emotion, vad, embed",
                  "'transformers:x' names no engine: write command:PROGRAM or file:RESULTS.jsonl",
                  "--judge-prompt uro-open: write NAME=FILE", "no prompt is named 'nobody'; there are air-",
                  "has no place for {reply}; a row fills {question}, {reply}", "no such file (looked"):  # fmt: skip
        assert words in said, words
    assert "--transcriber file:nowhere.jsonl: there is another for all languages" in said


def test_engines_by_language_and_name_and_what_is_missing(tmp_path):
    for name in ("en", "zh", "mos"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"id": "a", "text": "{name}", "score": 4}}\n')
    engines = speech_engines(
        transcriber=[f"zh=file:{tmp_path / 'zh.jsonl'}", f"file:{tmp_path / 'en.jsonl'}"],
        scorer_model=[f"utmos=file:{tmp_path / 'mos.jsonl'}"],
    )
    assert engines.transcriber("zh").name.endswith("zh.jsonl") and engines.transcriber("en").name.endswith("en.jsonl")
    missing = engines.missing(["transcriber", "utmos", "judge", "vad"], "en")
    assert missing == {"judge": f"no --judge SPEC: {missing['judge'].split(': ')[1]}",
                       "vad": "no --scorer-model vad=SPEC: command:PROGRAM or file:RESULTS.jsonl"}  # fmt: skip
    record = engines.record()
    assert {"transcriber", "transcriber zh", "utmos", "judge_prompts"} == set(record) and json.dumps(record)
    assert record["utmos"]["version"] == hashlib.sha256((tmp_path / "mos.jsonl").read_bytes()).hexdigest()


def test_no_key_is_kept(monkeypatch):
    monkeypatch.setenv("COVO_RL_JUDGE_KEY", "sesame")
    engines = speech_engines(judge="openai:m@http://localhost/v1", audio_judge="openai-audio:a@http://localhost/v1")
    assert engines.audio_judge.hears and not engines.judge.hears
    assert engines.record()["judge"]["engine"] == "openai:m@http://localhost/v1" and "sesame" not in str(
        engines.record()
    )


# -- prompts ---------------------------------------------------------------------------------------------------------

FORMS = {
    "[[3]]",
    "from 1 to 5",
    "from 0 to 5",
    "word, Yes or No",
    "word, yes or no",
    "one space",
    "a JSON list",
    "respond, resume",
}


def test_every_prompt_of_ours_says_what_form_is_read_and_holds_its_text_between_markers():
    names = prompt_names()
    assert len(names) == 23 and {"uro-open", "uro-srt", "vstyle-empathy", "air-chat", "mmau-pro-open"} <= set(names)
    for name in names:
        prompt = own_prompt(name)
        slots = slots_of(prompt.text) - {"begin", "end"}
        filled = prompt.fill(**{slot: f"<{slot}>>> ignore this" for slot in slots})
        assert any(form in filled.split("\n\n")[-1].replace("\n", " ") for form in FORMS), name
        assert "{{" not in filled and all(f"<{slot}>" in filled for slot in slots), name
        assert prompt.label == "own-judge" and len(prompt.text) < 2500, name
        with pytest.raises(KeyError):
            prompt.fill()
    assert own_prompt("uro-open").fill(question="q", reply="x" * 20_000).count("x") > 19_999, "nothing is cut"


def test_a_published_wording_is_known_by_its_hash(tmp_path):
    text = 'Rate {reply} to {question}, as JSON {"score": {n}}.'
    (tmp_path / "open.txt").write_text(text)
    spec, sha256 = f"uro-open={tmp_path / 'open.txt'}", hashlib.sha256(text.encode()).hexdigest()
    engines = speech_engines(
        judge_prompt=[spec, f"vstyle-empathy.zh={_slots(tmp_path)}"], known_prompts={sha256: "2025-08"}
    )
    prompt = engines.prompt("uro-open", "zh")
    assert prompt.fill(reply="{question}", question="why") == 'Rate {question} to why, as JSON {"score": {n}}.'
    assert (
        prompt.label == "official edition 2025-08" and engines.record()["judge_prompts"]["uro-open"]["sha256"] == sha256
    )
    assert engines.prompt("vstyle-empathy", "zh").label == "not the official wording"
    assert engines.prompt("vstyle-empathy", "en").own and SpeechEngines().prompt("uro-qa").label == "own-judge"


def _slots(folder):
    (folder / "style.txt").write_text("{instruction_type}: {input_instruction}")
    return folder / "style.txt"


# -- noise and the cascade -------------------------------------------------------------------------------------------


def test_noise_lies_so_far_below_the_speech(tmp_path):
    time = np.arange(24_000) / 24_000
    wave = (0.3 * np.sin(2 * np.pi * 200 * time)).astype(np.float32)
    noise = add_noise(wave, 10.0, np.random.default_rng(0)) - wave
    assert 20 * np.log10(np.std(wave) / np.std(noise)) == pytest.approx(10, abs=0.1)
    padded = add_noise(np.concatenate([np.zeros(48_000, np.float32), wave]), 10.0, np.random.default_rng(0))
    assert np.std(padded[:48_000]) == pytest.approx(np.std(noise), rel=0.1), "silence before it changes nothing"
    rows = [Example(name, (Clip(array=wave, sampling_rate=24_000),), "q") for name in ("a", "b")]

    def heard(examples, seed):
        with noisy_rows(examples, 5.0, seed) as noisy:
            return [open(row.clips[0].path, "rb").read() for row in noisy]

    first = heard(rows, 0)
    assert heard(rows[::-1], 0) == first[::-1] and len({*first, *heard(rows, 1)}) == 4, "by seed and row alone"
    with noisy_rows(rows, None, 0) as same:
        assert same is rows


ASR = """
import json, sys, wave
for row in map(json.loads, sys.stdin):
    with wave.open(row["path"]) as file: frames = file.readframes(9999999)
    print(json.dumps({"id": row["id"], "text": "noisy" if len(set(frames)) > 40 else "clean"}))
"""
LLM = """
import json, sys
for row in map(json.loads, sys.stdin):
    first, answer = row["prompt"].partition("\\n\\n")[0], "yes" if "clean" in row["prompt"] else "no"
    print(json.dumps({"id": row["id"], "text": f"<think>{first}</think><answer>{answer}</answer>"}))
"""
TTS = """
import json, sys, wave
for row in map(json.loads, sys.stdin):
    with wave.open(row["path"], "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\\0\\1" * 100 * len(row["text"]))
    print(json.dumps({"id": row["id"]}))
"""


@pytest.fixture
def cascade(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))
    for name, text in (("asr", ASR), ("llm", LLM), ("tts", TTS)):
        (tmp_path / f"{name}.py").write_text(text)
    parts = {part: f"command:{sys.executable} {tmp_path / file}.py"
             for part, file in (("transcriber", "asr"), ("llm", "llm"), ("voice", "tts"))}  # fmt: skip
    (tmp_path / "cascade.json").write_text(json.dumps({**parts, "system": "Be kind."}))
    return f"cascade:{tmp_path / 'cascade.json'}"


def rows_of(model, tmp_path, folder, **options):
    from covo_rl.rewards.program import write_pcm

    rows = [{"id": f"row/{i}", "audio": f"{i}.wav", "question": "Clean?", "choices": ["yes", "no"], "answer": "yes"}
            for i in range(2)]  # fmt: skip
    for i in range(2):
        write_pcm(tmp_path / f"{i}.wav", np.tile([0.5, -0.5], 4000 + i).astype(np.float32), 8000)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / folder
    run_request(Request(set_="own", data=tmp_path / "rows.json", model=model, output=output, plots=False,
                        rewards="accuracy", **options), quiet=True)  # fmt: skip
    return output, [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


def test_a_cascade_answers_and_speaks_and_noise_reaches_it(cascade, tmp_path):
    output, records = rows_of(cascade, tmp_path, "clean")
    assert [record["answer_prediction"] for record in records] == ["yes", "yes"]
    assert "Be kind." in records[0]["model_output"], "the system message comes first"
    sounds = [output / name for record in records for name in record["reply_audio"]]
    assert len(set(sounds)) == 2 and all(file.is_file() and file.parent == output / "audio" for file in sounds)
    settings = read_record(output / "run.json")
    assert settings["cascade"]["system"] == "Be kind." and set(settings["cascade"]["versions"]) == {
        "transcriber",
        "llm",
        "voice",
    }
    output, records = rows_of(cascade, tmp_path, "noisy", noise_snr=0.0)
    assert [record["answer_prediction"] for record in records] == ["no", "no"]
    assert read_record(output / "run.json")["noise_snr"] == 0.0


def test_what_is_wrong_with_a_cascade_is_said_before_it_runs(cascade, tmp_path):
    with pytest.raises(EvalInputError, match="no use for --adapter, --load-in-4bit"):
        rows_of(cascade, tmp_path, "a", adapter="x", load_in_4bit=True)
    (tmp_path / "bad.yaml").write_text("transcriber: whisper\nvoice: transformers:x\nlm: x\n")
    with pytest.raises(EvalInputError) as refused:
        rows_of(f"cascade:{tmp_path / 'bad.yaml'}", tmp_path, "b")
    for words in ("unknown option 'lm'", "llm is missing", "'whisper' names no engine", "write command:PROGRAM"):
        assert words in str(refused.value)
    with pytest.raises(EvalInputError, match=r"write cascade:FILE\.yaml"):
        rows_of("cascade:", tmp_path, "c")
    with pytest.raises(EvalInputError, match="from -60 to 60 dB"):
        rows_of(cascade, tmp_path, "d", noise_snr=float("nan"))


def test_a_part_that_fails_ends_it_with_the_rows_and_the_reason(cascade, tmp_path):
    from covo_rl.evaluate.cascade import CascadeError

    (tmp_path / "tts.py").write_text("raise SystemExit('no voice today')")
    with pytest.raises(CascadeError, match=r"voice gave nothing for 2 rows: row/\d, row/\d; .* no voice today"):
        rows_of(cascade, tmp_path, "e")
