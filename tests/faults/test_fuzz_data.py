"""Data files with anything in them: rows are read, or one DataError names what is wrong; nothing else is raised."""

import json
import os

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covo_rl.data import SCHEMAS, DataError, load_examples, overlap, row_problems, to_rows, write
from covo_rl.types import Clip, Example

QUICK = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True
)
FIELDS = sorted(
    {n for s in SCHEMAS.values() for n in (*s.marks, *s.id, *s.audio, *s.question, *s.choices, *s.answer, *s.options)}
    | {"answer_letter", "answer_index", "extra", ""}
)  # fmt: skip
PATHS = st.sampled_from(
    ["a.wav", "./a.wav", "../a.wav", "/etc/passwd", "sub/../../x.wav", "", ".", "..", "a\0b", "~", "x" * 300, "//a.wav"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12) | PATHS
    | st.sampled_from(["dog", "cat", "A", "(B)", "b.", "['dog', 'cat']", '["dog"]', "[", "[" * 2000, "\ud800"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["path", "bytes", "array", "sampling_rate", "A", "B"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def sensible(name):
    """A value that such a field has."""
    if name in ("choices", "multi_choice", "options"):
        return ["dog", "cat"]
    return "a.wav" if name.startswith("audio") else 0 if name == "answer_index" else "dog"


LAYOUTS = [
    {n: sensible(n) for n in (*s.marks, s.id[0], s.audio[0], s.question[0], *s.choices[:1], s.answer[0])}
    for s in SCHEMAS.values()
]
#: A row of some layout with up to two fields changed or added.
ROWS = st.tuples(st.sampled_from(LAYOUTS), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)).map(
    lambda pair: {**pair[0], **pair[1]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    soundfile.write(path / "a.wav", np.full(800, 0.1, np.float32), 16_000)
    return path


def loaded(path, folder, **options):
    """What load returns, checked: or the DataError's problems."""
    try:
        examples = load_examples(path, folder, **options)
    except DataError as error:
        assert error.problems and all(p.row_id and p.what for p in error.problems)
        str(error).encode("utf-8")
        return []
    for example in examples:
        assert isinstance(example, Example) and example.id and example.question.strip()
        json.dumps([example.id, example.question, example.choices, example.answer]).encode("utf-8")
        for clip in example.clips:
            if clip.path is not None and not options.get("allow_outside"):
                assert os.path.realpath(clip.path).startswith(str(folder.resolve()) + os.sep)
    return examples


def test_rows_with_anything_in_them(folder):
    outcomes = {True: 0, False: 0}

    @settings(QUICK, max_examples=200)
    @given(content=st.lists(ROWS, min_size=1, max_size=3), lines=st.booleans(), strict=st.booleans())
    def run(content, lines, strict):
        content = [{**row, "id": f"r{i}"} if row.get("id") == "dog" else row for i, row in enumerate(content)]
        path = folder / ("rows.jsonl" if lines else "rows.json")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
        examples = loaded(path, folder, strict=strict)
        outcomes[bool(examples)] += 1
        assert len(examples) in (0, len(content))
        if strict:
            assert len({example.id for example in examples}) == len(examples)
            assert all(e.answer is None or not e.choices or e.answer in e.choices for e in examples)
        assert {problem.row_id for problem in row_problems(examples)} <= {example.id for example in examples}
        overlap(examples, examples)

    run()
    assert min(outcomes.values()) > 20, outcomes


@settings(QUICK, max_examples=200)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".json", ".jsonl", ".parquet", ".txt", ""]))
def test_any_bytes(folder, data, suffix):
    path = folder / f"bytes{suffix}"
    path.write_bytes(data)
    loaded(path, folder)


@settings(QUICK, max_examples=200)
@given(
    cut=st.integers(0, 400),
    place=st.integers(0, 400),
    byte=st.integers(0, 255),
    suffix=st.sampled_from(["json", "jsonl"]),
)
def test_half_written_and_damaged_files(folder, cut, place, byte, suffix):
    row = {"id": "r", "audio_id": "a.wav", "question": "Which?", "choices": ["dog", "cat"], "answer": "dog"}
    content = [{**row, "id": f"r{i}"} for i in range(3)]
    text = "\n".join(map(json.dumps, content)) if suffix == "jsonl" else json.dumps(content)
    data = bytearray(text.encode()[: len(text) - cut])
    if place < len(data):
        data[place] = byte
    path = folder / f"cut.{suffix}"
    path.write_bytes(data)
    loaded(path, folder)


@settings(QUICK, max_examples=100)
@given(place=st.integers(0, 3000), value=st.binary(min_size=1, max_size=8))
def test_damaged_parquet(folder, place, value):
    original = folder / "good.parquet"
    if not original.exists():
        row = {"id": "r0", "audio_id": "a.wav", "question": "Which?", "choices": ["dog", "cat"], "answer": "dog"}
        write([row, {**row, "id": "r1"}], original)
    data = bytearray(original.read_bytes())
    at = place % len(data)
    data[at : at + len(value)] = value
    path = folder / "damaged.parquet"
    path.write_bytes(data)
    loaded(path, folder)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(QUICK, max_examples=100)
@given(
    contents=st.lists(
        st.tuples(TEXTS, st.lists(TEXTS, min_size=2, max_size=4), st.integers(0, 3), TEXTS), min_size=1, max_size=4
    ),
    schema=st.sampled_from(sorted(SCHEMAS)),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_what_is_written_is_read_back(folder, contents, schema, suffix):
    clip = Clip(path=str(folder / "a.wav"))
    examples = [
        Example(f"r{i}", (clip,), question, tuple(choices), choices[place % len(choices)], {"note": note})
        for i, (question, choices, place, note) in enumerate(contents)
    ]
    path = folder / f"written{suffix}"
    write(to_rows(examples, schema, folder), path)
    again = load_examples(path, folder)
    assert [(e.id, e.clips, e.question, e.choices, e.answer, e.columns["note"]) for e in again] == [
        (e.id, e.clips, e.question, e.choices, e.answer, e.columns["note"]) for e in examples
    ]
