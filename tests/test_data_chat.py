"""Rows that are conversations: ms-swift's and TRL's."""

import json
import warnings

import numpy as np
import pytest
import soundfile

from covo_rl.data import DataError, load_examples

RATE = 16_000


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a.wav", "b.wav")):
        soundfile.write(tmp_path / name, np.random.default_rng(seed).uniform(-0.5, 0.5, RATE // 10), RATE)
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def load(folder, *rows, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_examples(write(folder / "q.jsonl", rows), **options)


def problem(folder, row, **options):
    with pytest.raises(DataError) as caught:
        load(folder, row, **options)
    (only,) = caught.value.problems
    return str(only)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def swift(*pairs, audios=("a.wav",), **more):
    return {"messages": turns(*pairs), "audios": list(audios), **more}


def part(**fields):
    return {"type": "audio", **fields}


def trl(*parts, **more):
    return {"prompt": turns(("user", [*parts, {"type": "text", "text": "Which?"}])), **more}


def test_a_row_of_swift(folder):
    row = swift(("system", "Be brief."), ("user", "<audio>Which animal?"), ("assistant", "cat"), id="s1", task="x")
    (example,) = load(folder, row)
    assert (example.id, example.question, example.choices, example.answer) == ("s1", "Which animal?", (), "cat")
    assert (example.system, example.columns) == ("Be brief.", {"task": "x"})
    assert [clip.path for clip in example.clips] == [str(folder / "a.wav")]


def test_a_solution_is_the_answer_and_stays_for_rewards(folder):
    user = ("user", "<audio>\nWhich?")
    (example,) = load(folder, swift(user, solution="<answer> cat </answer>", choices=["dog", "cat"]))
    assert (example.answer, example.choices) == ("cat", ("dog", "cat"))
    assert example.columns == {"solution": "<answer> cat </answer>"}
    reply = "<think>It meows.</think><answer>cat</answer>"
    (example,) = load(folder, swift(user, ("assistant", reply)))
    assert (example.answer, example.columns) == ("cat", {"completion": reply})
    (example,) = load(folder, swift(user, ("assistant", reply), solution="the cat"))
    assert (example.answer, example.columns) == ("the cat", {"completion": reply, "solution": "the cat"})
    assert load(folder, swift(user))[0].answer is None
    assert load(folder, swift(user, ("assistant", None), solution="cat"))[0].answer == "cat"
    assert load(folder, swift(user, choices=["dog", "cat"], answer_letter="A"))[0].answer == "dog"


def test_several_clips_in_order_and_none(folder):
    (example,) = load(folder, swift(("user", "<audio><audio> Same?"), audios=["b.wav", "a.wav"], solution="no"))
    assert [clip.path for clip in example.clips] == [str(folder / name) for name in ("b.wav", "a.wav")]
    assert example.question == "Same?"
    (example,) = load(folder, swift(("user", "What is 1 + 1?"), audios=[], solution="2", path="a.wav"))
    assert example.clips == () and example.columns["path"] == "a.wav"


PARTS = {
    "path in audio": part(audio="a.wav"),
    "path": part(path="a.wav"),
    "path in url": part(url="a.wav"),
    "audio_url": {"type": "audio_url", "audio_url": {"url": "a.wav"}},
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_row_of_trl(folder, kind):
    row = trl(PARTS[kind], id=5, solution="cat")
    row["prompt"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    (example,) = load(folder, row)
    assert (example.id, example.question, example.answer, example.system) == ("5", "Which?", "cat", "Be brief.")
    assert [clip.path for clip in example.clips] == [str(folder / "a.wav")]


def test_parts_that_hold_sound_and_places_filled_by_a_column(folder):
    data = (folder / "a.wav").read_bytes()
    for source in (data, {"bytes": data, "path": None}):
        assert load_examples([trl(part(audio=source), answer="cat")])[0].clips[0].data == data
    array = {"array": np.zeros(1_600, np.float32), "sampling_rate": RATE}
    assert load_examples([trl(part(audio=array), answer="cat")])[0].clips[0].sampling_rate == RATE
    for name, value in (("audio", "a.wav"), ("audios", ["a.wav"]), ("audio", {"path": "a.wav"})):
        (example,) = load(folder, trl(part(), **{name: value}, completion=turns(("assistant", "cat"))))
        assert (example.clips[0].path, example.answer) == (str(folder / "a.wav"), "cat")
        assert example.columns == {}
    assert load(folder, trl(completion="cat"))[0].answer == "cat"


REFUSED = {
    "more tags": (swift(("user", "<audio><audio>A?")), "2 places for audio (<audio>), the row has 1 clips"),
    "no tag": (swift(("user", "A?")), "0 places for audio (<audio>), the row has 1 clips"),
    "a tag amid the text": (swift(("user", "Is <audio> loud?")), "is amid its text"),
    "several questions": (
        swift(("user", "<audio>A?"), ("assistant", "b"), ("user", "C?"), ("assistant", "d")),
        "its conversation is user, assistant, user, assistant: a row is one question",
    ),
    "two system messages": (swift(("system", "x"), ("user", "<audio>A?"), system="y"), "more than one system message"),
    "order": (swift(("user", "<audio>A?"), ("system", "x")), "in the order user, system"),
    "role": (swift(("user", "<audio>A?"), ("tool", "x")), "the role 'tool'"),
    "no role": ({"messages": [{"content": "A?"}]}, "has the role None"),
    "no user": (swift(("assistant", "b"), audios=()), "its conversation is assistant"),
    "sound of the system": (swift(("system", "<audio>"), ("user", "A?")), "its system message has a place for audio"),
    "content": (swift(("user", 5)), "content of its user message is 5"),
    "pictures": (swift(("user", "<audio>A?"), images=["a.png"]), "it has images, which a prompt cannot hold"),
    "a picture in a part": (trl({"type": "image", "image": "a.png"}), "its messages hold {'type': 'image'"),
    "sound twice": (trl(part(audio="a.wav", path="b.wav")), "says twice where its sound is"),
    "sound here and there": (trl(part(audio="a.wav"), audios=["b.wav"]), "hold sound, and so does audios"),
    "sound in some parts": (trl(part(audio="a.wav"), part()), "some places for audio"),
    "two answers": (swift(("user", "<audio>A?"), answer="b", solution="c"), "its answer and its solution differ"),
    "two chats": ({**swift(("user", "<audio>A?")), "prompt": turns(("user", "A?"))}, "messages and a prompt"),
    "a URL": (swift(("user", "<audio>A?"), audios=["https://x.org/a.wav"]), "is a URL, from which nothing is fetched"),
    "a URL in a part": (trl(part(url="https://x.org/a.wav")), "is a URL, from which nothing is fetched"),
    "outside": (swift(("user", "<audio>A?"), audios=["../../a.wav"]), "leaves the audio folder"),
    "no text": (swift(("user", "<audio>")), "its question (question) is ''"),
    "another answer": (swift(("user", "<audio>A?"), choices=["b", "c"], solution="d"), "not among the choices"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_question_cannot_hold_is_refused(folder, name):
    row, says = REFUSED[name]
    assert says in problem(folder, {"id": "x", **row})


def test_a_tag_behind_the_text_and_options_inside_it_are_noted(folder):
    path = write(folder / "q.jsonl", [swift(("user", "Which?\n<audio>"), solution="cat", id="r1")])
    with pytest.warns(UserWarning, match=r"row 1 \(id 'r1'\): <audio> stands behind the text"):
        assert load_examples(path)[0].question == "Which?"
    for text in ("Which? A. dog B. cat", "Which?\n(A) dog\n(B) cat", "A: dog\nB: cat"):
        path = write(folder / "q.jsonl", [swift(("user", f"<audio>{text}"), solution="B", id="r1")])
        with pytest.warns(UserWarning, match="rows r1: their questions list options in the text"):
            (example,) = load_examples(path)
        assert (example.question, example.choices, example.answer) == (text, (), "B")
    for text in ("Is A. Smith heard?", "Is it plan A or plan B?"):
        assert load(folder, swift(("user", f"<audio>{text}"), solution="no"))[0].question == text


def test_rows_with_a_question_are_no_conversations(folder):
    row = {**swift(("user", "<audio>A?")), "question": "B?", "audio": "a.wav", "answer": "c"}
    (example,) = load(folder, row)
    assert example.question == "B?" and example.columns["messages"] == row["messages"]
    mapped = swift(("user", "<audio>A?"), gold="d", answer="x", ask="C?")
    assert load(folder, mapped, columns="answer=gold")[0].answer == "d"
    (example,) = load(folder, mapped, columns="question=ask,audio=audios")
    assert (example.question, example.answer) == ("C?", "x")
    (example,) = load(folder, {"messages": turns(("user", "<audio>A?")), "wav": "a.wav"}, columns="audio=wav")
    assert example.clips[0].path == str(folder / "a.wav")


def test_conversations_beside_plain_rows_in_tables_and_data_sets(folder):
    plain = {"id": "p", "audio": "a.wav", "question": "B?", "answer": "c"}
    chat = swift(("user", "<audio>A?"), ("assistant", "b"), id="s")
    examples = load(folder, plain, chat, trl(part(path="b.wav"), id="t", answer="d"))
    assert [(example.id, example.question, example.answer) for example in examples] == [
        ("p", "B?", "c"), ("s", "A?", "b"), ("t", "Which?", "d"),
    ]  # fmt: skip
    cells = [json.dumps(chat[name]).replace('"', '""') for name in ("messages", "audios")]
    (folder / "q.csv").write_text('id,messages,audios\ns,"{}","{}"\n'.format(*cells))
    assert load_examples(folder / "q.csv") == [examples[1]]
    datasets = pytest.importorskip("datasets")
    data = (folder / "a.wav").read_bytes()
    rows = [{**chat, "audios": [{"bytes": data, "path": "a.wav"}]}]
    table = datasets.Dataset.from_list(rows).cast_column("audios", datasets.List(datasets.Audio()))
    (example,) = load_examples(table)
    assert (example.question, example.answer, example.clips[0].data) == ("A?", "b", data)
