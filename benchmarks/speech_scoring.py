"""How long the rules of the speech benchmarks take: rows of every task from a file, and whole evaluations.

    python benchmarks/speech_scoring.py                                # 10,000 rows of each, a few minutes
    python benchmarks/speech_scoring.py --rows 1000 --only asr take_over
    python benchmarks/speech_scoring.py --json benchmarks/results/DATE-speech-scoring-cpu.json

Rows are made up, of the lengths that real ones have (texts of 5 to 30 words, a word of speech every third of a second).
A task: JSON lines are read and given to `score_set`. A set: `covo-rl eval` in a process of its own, from the official
layout and a predictions file to the report, with engines that are files of finished results; imports are in its time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.data.files import read_json_lines
from covo_rl.evaluate.speech import TASKS, score_set
from covo_rl.evaluate.speech.choices import CHAT_TASKS
from covo_rl.synth.speech import write_wav

Row = dict[str, Any]
WORDS = [
    "the", "of", "a", "voice", "that", "nobody", "heard", "before", "goes", "on", "and", "then", "ends", "while",
    "three", "people", "talk", "about", "twenty", "five", "colours,", "it's", "raining;", "we", "don't", "know",
    "why", "-", "perhaps", "Ann", "does!", "however", "much", "he", "paid", "for", "two", "or", "1,200", "of", "them",
]  # fmt: skip
SIGNS = "今天我们听见三个人在雨里说话他走了二十五步2020年3月有105个，但是没有人知道为什么。"  # noqa: RUF001
VSTYLE = ("empathy/anger", "instruction/style", "acoustic_attributes/age", "role_play/scenario")


def said(rng: random.Random, language: str = "en") -> str:
    """A text of 5 to 30 words or characters."""
    length = rng.randint(5, 30)
    return "".join(rng.choices(SIGNS, k=length)) if language == "zh" else " ".join(rng.choices(WORDS, k=length))


def misheard(rng: random.Random, text: str) -> str:
    """The text with a tenth of its words left out."""
    return " ".join(word for word in text.split() if rng.random() > 0.1)


def timed(rng: random.Random, count: int = 25) -> list[Row]:
    """Words from 2.5 s on, as Full-Duplex-Bench has them."""
    return [{"text": rng.choice(WORDS), "timestamp": [2.5 + i / 3, 2.7 + i / 3]} for i in range(rng.randint(0, count))]


def transcribed(rng: random.Random, language: str = "en") -> Row:
    text = said(rng, language)
    return {"reference": text, "reply_text": misheard(rng, text)}


def spoken_segments(rng: random.Random) -> list[Row]:
    """Of MTR-DuplexBench: three of them, eight words each."""
    starts = [rng.uniform(0, 12) for _ in range(3)]
    words = [[{"word": rng.choice(WORDS), "start": s + i / 3, "end": s + i / 3 + 0.2} for i in range(8)]
             for s in starts]  # fmt: skip
    return [{"timestamp": [own[0]["start"], own[-1]["end"]], "text": " ".join(word["word"] for word in own),
             "words": own} for own in words]  # fmt: skip


def active(rng: random.Random) -> list[list[float]]:
    """Six segments of voice activity."""
    return [[3 * i + rng.random(), 3 * i + 1 + rng.random()] for i in range(6)]


def air(rng: random.Random) -> Row:
    options = rng.sample(WORDS, 4)
    return {"task_name": rng.choice(("Sound_AQA", "Speaker_Age_Prediction")), "dataset_name": "avqa",
            **{f"choice_{letter}": text for letter, text in zip("abcd", options, strict=True)},
            "answer_gt": rng.choice(options), "response": rng.choice("ABCD") + ". " + said(rng)}  # fmt: skip


#: task -> a row of it
MADE: dict[str, Callable[[random.Random], Row]] = {
    **{name: lambda rng: {"reply_text": said(rng), "judgements": [rng.choice("345") for _ in range(3)]}
       for name in ("rating", "voicebench_open")},
    "yes_no": lambda rng: {"reply_text": said(rng), "judgements": [rng.choice(("Yes", "No")) for _ in range(3)]},
    "voicebench_qa": lambda rng: {"judgements": [rng.choice(("yes", "no")) for _ in range(3)]},
    "srt": lambda rng: {"reply_text": said(rng), "judgements": [rng.choice("12345")]},
    "style": lambda rng: {"ability": rng.choice(VSTYLE), "judgement": f"{said(rng)} [[{rng.randint(1, 5)}]]"},
    "mcq": lambda rng: {"reply_text": f"The answer is {rng.choice('ABCD')}. {said(rng)}", "reference": "B"},
    "refusal": lambda rng: {"reply_text": said(rng)},
    "open": lambda rng: {"judgement": f"{said(rng)} [[{rng.randint(1, 5)}]]"},
    "instruction": lambda rng: {"reply_text": said(rng), "instruction": "Number Words (at most)",
                                "arguments": {"N": 20}},
    "rubric": lambda rng: {"sums": [rng.choice((0.4, 0.6, 0.8)) for _ in range(5)], "maximum": 1.0, "right": True},
    **dict.fromkeys(("repeat", "asr", "tts", "translation"), transcribed),
    "emotion": lambda rng: {**transcribed(rng), "probability": rng.random()},
    "likelihood": lambda rng: {"pair": str(rng.randrange(5000)), "in_vocabulary": rng.random() < 0.5,
                               **{side: [-6 * rng.random() for _ in range(50)] for side in ("right", "wrong")}},
    "closed": lambda rng: {"reply_text": f"It is {rng.choice(WORDS)}", "reference": "voice", "nearest": "voice",
                           "choices": ["voice", "people", "colours,", "raining;"]},
    "air_choice": air,
    "air_chat": lambda rng: {"task_name": rng.choice([*CHAT_TASKS]), "gpt-score": f"{rng.randint(1, 9)} 8"},
    "mtr_turns": lambda rng: {"kind": rng.choice(("turn", "background")), "segments": spoken_segments(rng),
                              "timestamps": {"user_start": 0.0, "user_end": 2.0, "model_start": 2.5, "model_end": 9.0,
                                             "background_start": 4.0, "background_end": 5.0}},
    "take_over": lambda rng: {"kind": rng.choice(("turn_taking", "pause")), "words": timed(rng), "turn_end": 2.0},
    "overlap": lambda rng: {"user_vad": active(rng), "model_vad": active(rng)},
    "backchannel": lambda rng: {"segments": active(rng), "words": timed(rng), "seconds": 20.0,
                                "human": [rng.random() for _ in range(100)]},
}  # fmt: skip
#: further ways of a task: name -> (task, a row, options)
CHINESE = {f"{task}, zh": (task, lambda rng: transcribed(rng, "zh"), {"language": "zh"})
           for task in ("repeat", "asr", "tts", "translation")}  # fmt: skip


def score_task(folder: Path, name: str, count: int) -> dict[str, float]:
    """Wall seconds of reading `count` rows and of scoring them, and CPU seconds of both."""
    task, make, options = CHINESE.get(name) or (name, MADE[name], {})
    rng, path = random.Random(0), folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), **make(rng)}) + "\n" for i in range(count)))
    if task in ("repeat", "emotion", "asr", "tts", "translation"):
        options = options or {"language": "en"}
    if task != "likelihood":
        score_set(
            task, [*read_json_lines(path)][:10], **({"swapped": []} if task == "air_chat" else options)
        )  # warm up
    begin, cpu = time.perf_counter(), time.process_time()
    rows = [*read_json_lines(path)]
    read = time.perf_counter()
    block = score_set(task, rows, **({"swapped": rows} if task == "air_chat" else options))
    end = time.perf_counter()
    assert block["score"] is not None, name
    return {"read_s": read - begin, "score_s": end - read, "cpu_s": time.process_time() - cpu}


# -- whole evaluations -----------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_sound(path: Path, number: int = 0) -> None:
    """A tenth of a second of sound, another for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, np.full(2400, (number % 30_000) / 32_768, np.float32))


def uro(folder: Path, count: int) -> list[str]:
    """AlpacaEval of URO-Bench: replies are sound, heard, judged by three votes, and their naturalness is scored."""
    rng, part = random.Random(0), folder / "URO/basic/AlpacaEval"
    write_lines(part / "test.jsonl", [{"id": f"q{i}", "source_wav": "wav/1.wav", "source_text": said(rng)}
                                      for i in range(count)])  # fmt: skip
    write_sound(part / "wav/1.wav")
    for i in range(count):
        write_sound(folder / f"replies/{i}.wav", i)
    results = {
        "replies": [{"id": f"q{i}", "reply_text": said(rng), "reply_audio": f"replies/{i}.wav"} for i in range(count)],
        "heard": [{"id": f"AlpacaEval/q{i}", "text": said(rng)} for i in range(count)],
        "judged": [{"id": f"AlpacaEval/q{i}", "text": rng.choices("345", k=3)} for i in range(count)],
        "utmos": [{"id": f"AlpacaEval/q{i}", "score": 4 + rng.random()} for i in range(count)],
    }
    files = {name: write_lines(folder / f"{name}.jsonl", rows) for name, rows in results.items()}
    return ["--set", "uro-bench", "--subset", "AlpacaEval", "--data", f"{folder}/URO", "--predictions",
            str(files["replies"]), "--transcriber", f"file:{files['heard']}", "--judge", f"file:{files['judged']}",
            "--scorer-model", f"utmos=file:{files['utmos']}"]  # fmt: skip


def recognition(folder: Path, count: int) -> list[str]:
    """Error rates of a corpus of one's own."""
    rng = random.Random(0)
    texts = [said(rng) for _ in range(count)]
    write_sound(folder / "1.wav")
    data = write_lines(folder / "mine.jsonl", [{"id": f"u{i}", "audio": "1.wav", "text": text, "language": "en"}
                                               for i, text in enumerate(texts)])  # fmt: skip
    replies = write_lines(folder / "replies.jsonl", [{"id": f"u{i}", "reply_text": misheard(rng, text)}
                                                     for i, text in enumerate(texts)])  # fmt: skip
    return ["--set", "asr", "--data", str(data), "--predictions", str(replies)]


def duplex(folder: Path, count: int) -> list[str]:
    """Full-Duplex-Bench, whose every item is a folder of files."""
    rng, part = random.Random(0), folder / "FDB/candor_turn_taking"
    for i in range(count):
        item = part / f"{i}"
        write_sound(item / "input.wav")
        words = timed(rng)
        output = {"text": " ".join(word["text"] for word in words), "chunks": words}
        (item / "output.json").write_text(json.dumps(output))
        (item / "turn_taking.json").write_text(json.dumps([{"timestamp": [2.0, 2.1]}]))
    return ["--set", "full-duplex-bench", "--data", f"{folder}/FDB", "--predictions", f"{folder}/FDB"]


SETS: dict[str, Callable[[Path, int], list[str]]] = {
    "eval uro-bench": uro, "eval asr": recognition, "eval full-duplex-bench": duplex,
}  # fmt: skip


def evaluate(folder: Path, name: str, count: int) -> dict[str, float]:
    """Wall and CPU seconds of a process that evaluates, and of one that does it again in the same folder."""
    words = SETS[name](folder / "data", count)
    command = [sys.executable, "-m", "covo_rl.evaluate.cli", *words, "--output", str(folder / "out")]
    figures = {}
    for place in ("", "again_"):
        begin, cpu = time.perf_counter(), _children_cpu()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "COVO_RL_CACHE": f"{folder}/cache"})
        figures |= {f"{place}wall_s": time.perf_counter() - begin, f"{place}cpu_s": _children_cpu() - cpu}
    report = json.loads((folder / "out/report.json").read_text())
    assert report["n"] == count and all(block["score"] is not None for block in report["subsets"].values())
    return figures


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TASKS, *CHINESE, *SETS]
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            measure = evaluate if name in SETS else score_task
            figures[name] = measure(Path(folder), name, given.rows)
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures[name].items()), flush=True)
    if given.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        packages = {name: version(name) for name in ("covo-rl", "jiwer", "sacrebleu", "transformers", "numpy")}
        facts = {
            "command": f"python benchmarks/speech_scoring.py --rows {given.rows}", "commit": commit,
            "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "packages": packages,
            "machine": f"{platform.machine()}, {os.cpu_count()} shared cores, Linux",
        }  # fmt: skip
        given.json.write_text(json.dumps({**facts, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
