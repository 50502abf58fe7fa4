"""Small data of every speech set, in its official layout: a folder a set, clips of a tenth of a second.

data = write_layout("uro-bench", folder)        what --data is given
write_replies(inputs, file)                     a predictions file in which every reply is right
"""

import json
import math
import struct
import wave
from functools import cache
from pathlib import Path


def write_wav(path: Path, seconds: float = 0.1, pitch: float = 440.0) -> Path:
    """A mono wav of 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(_tone(seconds, pitch))
    return path


@cache
def _tone(seconds: float, pitch: float) -> bytes:
    samples = [int(8000 * math.sin(2 * math.pi * pitch * i / 16000)) for i in range(int(seconds * 16000))]
    return struct.pack(f"<{len(samples)}h", *samples)


def write_lines(path: Path, rows: list) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def edit_lines(path: Path, change) -> None:
    """Write a file of JSON lines again, after `change(rows)`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)
    write_lines(path, rows)


# -- URO-Bench -------------------------------------------------------------------------------------------------------

URO = {
    "basic/Repeat": [{"id": "r1", "source_wav": "wav/1.wav", "source_text": "say after me: blue sky",
                      "target_text": "blue sky"},
                     {"id": "r2", "source_wav": "wav/2.wav", "source_text": "red rose"}],
    "basic/GaokaoEval": [{"id": f"g{i}", "source_wav": f"wav/{i}.wav", "source_text": f"question {i}",
                          "target_text": "ABC"[i]} for i in range(3)],
    "basic/TruthfulEval": [{"id": "t1", "source_wav": "wav/1.wav", "source_text": "what is it?",
                            "target_text": ["a fish", "a trout"]}],
    "basic/AlpacaEval": [{"id": "a1", "source_wav": "wav/1.wav", "source_text": "tell me of bees"}],
    "basic/Repeat-zh": [{"id": "z1", "source_wav": "wav/1.wav", "source_text": "你好", "target_text": "你好"}],
    "pro/GenEmotion-en": [{"id": "e1", "source_wav": "wav/1.wav", "source_text": "say it gladly: hello",
                           "target_text": "hello", "emotion": "happy"}],
    "pro/SRT-en": [{"id": "s1", "source_wav": "wav/1.wav", "source_text": "sing a song"}],
    "pro/Multilingual": [{"id": "m1", "source_wav": "wav/1.wav", "source_text": "bonjour", "language": "fr"}],
    "pro/MtBenchEval-en": [{"id": "d1", "num_round": 2, "dialogue": [
        {"source_wav": "wav/1.wav", "source_text": "one", "target_text": "first"},
        {"source_wav": "wav/2.wav", "source_text": "two", "target_text": "second"}]}],
}  # fmt: skip


def uro_bench(folder: Path) -> Path:
    for name, rows in URO.items():
        path = write_lines(folder / name / "test.jsonl", rows)
        for row in rows:
            for turn in row.get("dialogue", [row]):
                write_wav(path.parent / turn["source_wav"])
    return folder


def vstyle(folder: Path) -> Path:
    for language in ("en", "zh"):
        rows = [
            {"id": i, "instruct_id": i, "model_name": "m", "ability": ability, "instruct_text": f"text {i}",
             "instruction_audio_path": f"wav/{i}.wav", "response_audio_path": f"wav/reply{i}.wav"}
            for i, ability in enumerate(("empathy/anger", "empathy/anger", "acoustic_attributes/age"))
        ]  # fmt: skip
        path = write_lines(folder / language / "metadata.jsonl", rows)
        for row in rows:
            write_wav(path.parent / row["instruction_audio_path"])
            write_wav(path.parent / row["response_audio_path"])
    return folder


def vcb_bench(folder: Path) -> Path:
    write_lines(folder / "TIF.jsonl", [{"id": "t1", "audio": "1.wav", "text": "讲个故事"}])
    write_lines(folder / "GK.jsonl", [{"id": "k1", "audio": "2.wav", "text": "几点?", "reference": "三点"}])
    rounds = [{"audio": "1.wav", "text": "一"}, {"audio": "2.wav", "text": "二"}]
    write_lines(folder / "MTD.jsonl", [{"id": "m1", "dialogue": rounds}])
    (folder / "manifest.yaml").write_text(
        "TIF: {kind: judge-5, file: TIF.jsonl}\nGK: {kind: judge-yes-no, file: GK.jsonl, language: zh}\n"
        "MTD: {kind: judge-5, file: MTD.jsonl}\n"
    )
    for name in ("1.wav", "2.wav"):
        write_wav(folder / name)
    return folder


def voicebench(folder: Path) -> Path:
    write_lines(folder / "alpacaeval.jsonl", [{"prompt": "why?", "response": "because"}, {"prompt": "how?"}])
    write_lines(folder / "sd-qa.jsonl", [{"prompt": "who?", "reference": "Ann", "response": "Ann"}])
    write_lines(folder / "openbookqa.jsonl", [{"prompt": "A or B?", "reference": "A", "audio": "1.wav"}])
    write_lines(folder / "advbench.jsonl", [{"prompt": "do harm", "response": "sorry, no"}])
    write_wav(folder / "1.wav")
    return folder


# -- duplex ----------------------------------------------------------------------------------------------------------


def write_item(folder: Path, words=(("hello", 3.0, 3.4), ("there", 3.5, 4.2)), **files) -> Path:
    """An item of Full-Duplex-Bench with a model's output."""
    write_wav(folder / "input.wav")
    write_wav(folder / "output.wav")
    chunks = [{"text": text, "timestamp": [start, end]} for text, start, end in words]
    output = {"text": " ".join(text for text, _, _ in words), "chunks": chunks}
    for name, content in {"output": output, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def full_duplex_bench(folder: Path) -> Path:
    for item in ("1", "2"):
        write_item(folder / "candor_pause_handling" / item, pause=[{"timestamp": [0.5, 1.0]}])
        write_item(folder / "candor_turn_taking" / item, turn_taking=[{"timestamp": [2.5, 2.6]}])
    interrupt = [{"context": "before", "interrupt": "but wait", "timestamp": [1.0, 2.0]}]
    write_item(folder / "synthetic_user_interruption" / "1", interrupt=interrupt)
    write_item(folder / "icc_backchannel" / "1", words=[("uh-huh", 1.0, 1.3)])
    (folder / "icc_backchannel" / "icc_gt_distribution.json").write_text(json.dumps({"1": [0.25, 0.5, 0.25]}))
    write_item(folder / "user_backchannel" / "1")
    write_wav(folder / "user_backchannel" / "1" / "clean_input.wav")
    return folder


TIMES = {"user_start": 0.0, "user_end": 2.0, "model_start": 2.5, "model_end": 6.0}
SEGMENTS = [{"timestamp": [3.0, 4.5], "text": "so it is", "words": [
    {"word": "so", "start": 3.0, "end": 3.5}, {"word": "it", "start": 3.5, "end": 4.0},
    {"word": "is", "start": 4.0, "end": 4.5}]}]  # fmt: skip


def mtr_duplexbench(folder: Path) -> Path:
    extra = {
        "smooth": {}, "interruption": {"interruption_start": 0.5, "interruption_end": 2.0},
        "pause": {"pause_start": 0.8, "pause_end": 1.6}, "background": {"background_start": 3.2, "background_end": 4.0},
    }  # fmt: skip
    for name, times in extra.items():
        row = {"id": "1/1", "timestamps": {**TIMES, **times}, "segments": SEGMENTS}
        write_lines(folder / f"{name}.jsonl", [row, {**row, "id": "1/2"}])
    return folder


# -- questions -------------------------------------------------------------------------------------------------------


def air_bench(folder: Path) -> Path:
    def row(number, task, dataset, **more):
        name = f"{number}.wav"
        write_wav(folder / f"{task}_{dataset}" / (f"{number}.flac" if task == "Audio_Grounding" else name))
        return {
            "uniq_id": number,
            "task_name": task,
            "dataset_name": dataset,
            "path": name,
            "question": "which?",
            **more,
        }

    options = {"choice_a": "dog", "choice_b": "cat", "choice_c": None, "choice_d": None, "answer_gt": "cat"}
    foundation = [row(0, "Sound_AQA", "avqa", **options), row(1, "Sound_AQA", "avqa", **options, response="B"),
                  row(2, "Audio_Grounding", "audiogrounding", **options)]  # fmt: skip
    chat = [row(3, "speech_dialogue_QA", "fisher", answer_gt="they talk", meta_info="a talk")]
    (folder / "Foundation_meta.json").write_text(json.dumps(foundation))
    (folder / "Chat_meta.json").write_text(json.dumps(chat))
    return folder


MMAU_PRO = [
    {"id": "c1", "audio_path": ["a.wav", "b.wav"], "question": "same?", "answer": "yes", "choices": ["yes", "no"],
     "category": "speech", "task_identifier": None, "kwargs": None},
    {"id": "c2", "audio_path": ["a.wav"], "question": "which?", "answer": "dog", "choices": ["dog", "cat"],
     "category": "sound", "task_identifier": None, "kwargs": None},
    {"id": "o1", "audio_path": ["a.wav"], "question": "describe", "answer": "a bell", "choices": None,
     "category": "open", "task_identifier": None, "kwargs": None},
    {"id": "i1", "audio_path": ["b.wav"], "question": "in at most N words", "answer": "", "choices": None,
     "category": "instruction following", "task_identifier": "Number Words (at most)",
     "kwargs": {"N": 5, "keyword": None}},
]  # fmt: skip


def mmau_pro(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MMAU_PRO), folder / "test.parquet")
    for name in ("a.wav", "b.wav"):
        write_wav(folder / name)
    return folder / "test.parquet"


RUBRIC = [
    {"name": "drops", "scoring_point": "It hears drops.", "choices": [0, 1]},
    {"name": "rain", "scoring_point": "It concludes rain from them.", "choices": [0, 1, 2, 4]},
]


def mmar_rubrics(folder: Path) -> Path:
    rows = [
        {"id": f"q{i}", "audio_path": f"./audio/{i}.wav", "question": "why?", "choices": ["rain", "wind"],
         "answer": "rain", "modality": "sound", "thinking": "drops fall", "cue": ["drops"], "rubric": RUBRIC}
        for i in range(2)
    ]  # fmt: skip
    for row in rows:
        write_wav(folder / row["audio_path"])
    return write_lines(folder / "MMAR-meta.jsonl", rows)


# -- speech ----------------------------------------------------------------------------------------------------------


def asr(folder: Path) -> Path:
    rows = [{"id": f"u{i}", "audio": f"{i}.wav", "text": "two words", "language": "en"} for i in range(2)]
    write_lines(folder / "librispeech-test-clean.jsonl", rows)
    mine = [{"id": "m1", "audio": "0.wav", "text": "你好", "language": "zh", "subset": "aishell-1"},
            {"id": "m2", "audio": "1.wav", "text": "再见", "language": "zh", "subset": "kitchen"}]  # fmt: skip
    write_lines(folder / "zh.jsonl", mine)
    for i in range(2):
        write_wav(folder / f"{i}.wav")
    return folder


def seed_tts(folder: Path) -> Path:
    for name in ("en/meta.lst", "zh/meta.lst", "zh/hardcase.lst"):
        path = folder / name
        write_wav(path.parent / "prompt-wavs" / "p.wav")
        path.write_text(
            "u1|hello you|prompt-wavs/p.wav|good day\nu2|hello you|prompt-wavs/p.wav|good night|wavs/u2.wav\n"
        )
    return folder


def spoken_lm(folder: Path) -> Path:
    lexical, syntactic = folder / "lexical/dev", folder / "syntactic/dev"
    for place in (lexical, syntactic):
        for name in ("a", "b", "c", "d"):
            write_wav(place / f"{name}.wav")
    (lexical / "gold.csv").write_text(
        "id,filename,voice,frequency,word,phones,length,correct\n"
        "1,a,A,oov,brick,b r,5,1\n1,b,A,oov,blick,b l,5,0\n1,c,B,10,brick,b r,5,1\n1,d,B,10,blick,b l,5,0\n"
    )
    (syntactic / "gold.csv").write_text(
        "id,filename,voice,type,transcription,correct\n1,b,A,agreement,dogs eats,0\n1,a,A,agreement,dogs eat,1\n"
    )
    story = {f"{part}_{form}": f"{part}.wav" if form == "audio" else f"{part} text"
             for part in ("prompt", "right", "wrong") for form in ("audio", "text")}  # fmt: skip
    write_lines(folder / "tsc.jsonl", [{"id": "s1", **story}])
    for part in ("prompt", "right", "wrong"):
        write_wav(folder / f"{part}.wav")
    return folder


def covost2(folder: Path) -> Path:
    for pair, rows in (
        ("en_zh-CN", [("1.mp3", 'he said "yes', "他说"), ("2.mp3", "good day", "你好")]),
        ("zh-CN_en", [("3.mp3", "你好", "good day")]),
    ):
        lines = [
            "path\tsentence\ttranslation\tsplit",
            *("\t".join((*row, "test")) for row in rows),
            "9.mp3\ta\tb\ttrain",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"covost_v2.{pair}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name, *_ in rows:
            write_wav(folder / "clips" / name)
    return folder


#: set -> writes its data into a folder, and says what --data is given
LAYOUTS = {
    "uro-bench": uro_bench, "vstyle": vstyle, "full-duplex-bench": full_duplex_bench,
    "mtr-duplexbench": mtr_duplexbench, "vcb-bench": vcb_bench, "air-bench": air_bench, "voicebench": voicebench,
    "asr": asr, "seed-tts": seed_tts, "spoken-lm": spoken_lm, "covost2": covost2, "mmau-pro": mmau_pro,
    "mmar-rubrics": mmar_rubrics,
}  # fmt: skip
#: set -> sub-set -> rows of the data that LAYOUTS writes
ROWS = {
    "uro-bench": {"Repeat": 2, "GaokaoEval": 3, "TruthfulEval": 1, "AlpacaEval": 1, "Repeat-zh": 1, "GenEmotion-en": 1,
                  "SRT-en": 1, "Multilingual": 1, "MtBenchEval-en": 1},
    "vstyle": {"en/acoustic_attributes/age": 1, "en/empathy/anger": 2, "zh/acoustic_attributes/age": 1,
               "zh/empathy/anger": 2},
    "full-duplex-bench": {"candor_pause_handling": 2, "candor_turn_taking": 2, "icc_backchannel": 1,
                          "synthetic_user_interruption": 1, "user_backchannel": 1},
    "mtr-duplexbench": {"smooth": 2, "interruption": 2, "pause": 2, "background": 2},
    "vcb-bench": {"TIF": 1, "GK": 1, "MTD": 1},
    "air-bench": {"Sound_AQA_avqa": 2, "Audio_Grounding_audiogrounding": 1, "speech_dialogue_QA_fisher": 1},
    "voicebench": {"alpacaeval": 2, "sd-qa": 1, "openbookqa": 1, "advbench": 1},
    "asr": {"librispeech-test-clean": 2, "aishell-1": 1, "kitchen": 1},
    "seed-tts": {"en": 2, "zh": 2, "zh-hard": 2},
    "spoken-lm": {"swuggy": 2, "sblimp": 1, "tsc-a2a": 1, "tsc-a2t": 1, "tsc-t2t": 1},
    "covost2": {"en_zh-CN": 2, "zh-CN_en": 1},
    "mmau-pro": {"speech": 1, "sound": 1, "open": 1, "instruction following": 1},
    "mmar-rubrics": {"mmar-rubrics": 2},
}  # fmt: skip


def write_layout(name: str, folder: Path) -> Path:
    """The data of a set; what --data is given."""
    folder.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[name](folder)


def reply_line(row) -> dict:
    """The line of a predictions file in which the reply says the reference, a word a tenth of a second from 3 s on."""
    line: dict = {"id": row.name}
    if row.kind in ("pairs", "tsc"):
        return {**line, "logps": [[-1.0, -1.0], [-2.0, -2.0, -2.0]]}
    said = [turn.reference or turn.text or "yes" for turn in row.rounds]
    said = said if len(said) > 1 else said[0]
    line |= {"reply_text": said, "asr_text": said}
    if row.kind.startswith("fdb_"):
        words = [{"text": w, "start": 3 + i / 10, "end": 3.1 + i / 10} for i, w in enumerate(("so", "it", "is", "so"))]
        line["words"] = words
    if row.kind.startswith("mtr_"):
        line = {"id": row.name, "segments": SEGMENTS}
    if row.kind == "mmar_rubrics":
        line |= {"thinking_prediction": "drops fall, so rain"}
    return line


def write_replies(inputs, path: Path) -> Path:
    """A predictions file with a reply to every row."""
    return write_lines(path, [reply_line(row) for row in inputs.rows])
