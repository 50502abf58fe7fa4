"""Packed rows as files and on the screen: those of the training, whole, and harmless whatever a row says."""

import dataclasses
import json
from html.parser import HTMLParser
from itertools import islice

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from covo_rl.config import ConfigError
from covo_rl.models import ModelError
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.records.console import console
from covo_rl.run.commands.data import app
from covo_rl.supervised.pretrain import built
from covo_rl.supervised.pretrain.built import BuiltError, build_rows, packer_of, read_built, written_vocabulary
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.inspection import KINDS, show_row, terminal_view, write_page
from covo_rl.synth.speech import write_wav

MODEL = "builtin:tiny_spoken"
EVIL = "eve\x1b[31m\x07\u202e<script>alert(1)</script>"
TASKS = {"asr": 1, "tts": 1, "audio_only": 1, "interleave_1": 1, "text": 1, "speech_generation": 1}
ROWS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two recordings of 4 s in two phrases, one without words; texts; a dialogue."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = [["one", 0.1, 0.5], ["two", 0.6, 1.4], ["three", 2.4, 3.0], ["four", 3.1, 3.6]]
    rows = []
    for name in ("a", "b", f"c{EVIL}"):
        write_wav(folder / f"{name[0]}.wav", rng.normal(0, 0.1, 96_000).astype(np.float32))
        codes = rng.integers(0, 256, 100).tolist()
        row = {"id": name, "audio": f"{name[0]}.wav", "text": "one two three four", "codes": codes, "tokenizer": "x"}
        rows.append({**row, "speaker": f"{name[0]}-{EVIL}", "words": words if name != "b" else None})
    texts = [{"id": f"t{i}", "text": f"six {EVIL} {i}"} for i in range(3)]
    turns = [{"role": "user", "text": "one"}, {"role": "assistant", "text": "two", "codes": [5] * 30, "tokenizer": "x"}]
    files = {"rows": rows, "texts": texts, "dialogues": [{"id": "d", "speaker": EVIL, "turns": turns}]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "model": MODEL, "data": str(folder / "rows.jsonl"), "text_data": str(folder / "texts.jsonl"),
        "dialogue_data": str(folder / "dialogues.jsonl"), "length": 256, "seed": 5,
        "tasks": {name: {"weight": weight} for name, weight in TASKS.items()},
    }  # fmt: skip
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(options))
    return folder / "pretrain.yaml"


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "rows"
    build_rows(read_pretrain(config), folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return [show_row(str(folder), number) for number in range(ROWS)]


def test_built_rows_are_those_of_the_training_with_its_counts(config, folder):
    vocabulary, _ = written_vocabulary(MODEL)
    packer = packer_of(read_pretrain(config), vocabulary)
    lines = [json.loads(line) for line in (folder / "rows-00000.jsonl").read_text().splitlines()]
    tokens = taught = 0
    for number, line in enumerate(lines):
        packed = packer.next_row()
        stored, summary = read_built(folder, number)
        assert stored.documents == packed.documents and (stored.number, stored.length) == (number, 256)
        assert line["ids"] == [id for document in packed.documents for id in document.ids]
        assert line["labels"] == [label for document in packed.documents for label in document.labels]
        assert line["positions"] == [i for document in packed.documents for i in range(len(document))]
        units = [drawn.unit if isinstance(drawn.unit, (list, tuple)) else [drawn.unit] for drawn in packed.drawn]
        assert [[row["id"] for row in part["rows"]] for part in line["documents"]] == [[r.id for r in u] for u in units]
        tokens += packed.tokens
        taught += sum(document.supervised for document in packed.documents)
    assert (summary["rows"], len(lines), summary["tokens"]) == (ROWS, ROWS, tokens)
    assert sum(task["taught"] for task in summary["tasks"].values()) == taught > 0
    assert set(summary["tasks"]) == set(TASKS) and summary["vocabulary"]["first_code"] == vocabulary.first_code
    assert summary["tasks"]["interleave_1"]["skipped"]["no words"]["first"][0] == "b"


def test_runs_cover_a_document_and_say_what_its_ids_are(config, folder, rows):
    vocabulary, _ = written_vocabulary(MODEL)
    codes = range(vocabulary.first_code, vocabulary.first_code + vocabulary.codes)
    kinds = set()
    for number, row in enumerate(rows):
        stored, _ = read_built(folder, number)
        for document, shown in zip(stored.documents, row.documents, strict=True):
            assert [span.start for span in shown.spans] == [0, *(span.end for span in shown.spans[:-1])]
            assert shown.spans[-1].end == len(document) == shown.length and shown.problems == ()
            for span in shown.spans:
                part = slice(span.start, span.end)
                assert {label != IGNORE for label in document.labels[part]} == {span.taught}
                assert {id in codes for id in document.ids[part]} == {span.kind == "ad"}
                assert (vocabulary.slot in document.ids[part]) == (span.kind == "ac")
                kinds.add(span.kind)
            assert sum(span.end - span.start for span in shown.spans if span.taught) == shown.taught
    assert kinds == set(KINDS) - {"listen", "shift", "reply", "break"}  # of streams
    assert show_row(str(config), 2).documents == rows[2].documents


def test_numbers_of_a_run_can_be_checked(rows):
    heard = next(document for row in rows for document in row.documents if document.task == "asr")
    slots = next(span for span in heard.spans if span.kind == "ac")
    id, speaker = heard.rows[0]
    assert slots.end - slots.start == 27 and slots.fragment == 0 and not slots.taught  # 100 codes, 25 slots, a frame
    assert slots.content == f"25 slots, 0.00 to 4.00 s of {id}, {speaker}"
    text = next(span for span in heard.spans if span.kind == "t")
    assert text.content == "one two three four" and text.taught
    instruction, end = heard.spans[0], heard.spans[-1]
    assert (instruction.kind, instruction.taught, end.kind, end.taught) == ("instruction", False, "end", True)


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words += data


def _harmful(text):
    return sorted({c for c in text if not (c.isprintable() or c == "\n")})


def test_what_rows_say_reaches_neither_the_terminal_nor_the_page(rows, tmp_path, capsys):
    pages = ""
    for row in rows:
        write_page(row, tmp_path / "p.html")
        page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
        assert not {"script", "img", "iframe", "link", "object"} & page.tags and not {"src", "href"} & page.attributes
        assert not any(name.startswith("on") for name in page.attributes)
        pages += page.words
        for part in terminal_view(row, 40):
            console.print(part)
    printed = capsys.readouterr().out
    assert _harmful(printed) == _harmful(pages) == []
    for text in (printed.replace("\n", ""), pages):
        assert r"\x1b[31m\x07\u202e<script>alert(1)</script>" in text.replace(" ", "")  # it folds where a line ends


def test_colour_is_not_needed_to_read_a_row(folder, rows, tmp_path):
    row = rows[0]
    words = ["inspect", str(folder), "--html", str(tmp_path / "p.html")]
    result = CliRunner().invoke(app, words, env={"NO_COLOR": "1"})
    lines = result.output.splitlines()
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8")).words
    for kind in KINDS.values():
        assert kind.name in result.output and kind.meaning in " ".join(result.output.split()) and kind.meaning in page
    for document in row.documents:
        for span in document.spans:
            first, last = document.start + span.start, document.start + span.end - 1
            label = "taught" if span.taught else "context"
            line = next(line for line in lines if line.split()[:1] == [f"{first}-{last}"])
            assert KINDS[span.kind].name in line and label in line
            fragment = "" if span.fragment is None else f", fragment {span.fragment + 1}"
            assert f"{KINDS[span.kind].name}{fragment}, {label}, ids {first} to {last}" in page
    for text in (result.output, page):
        assert "no words" in text and "fewer than two fragments" not in text


def test_the_command_builds_and_does_not_write_over_what_is_there(config, tmp_path, monkeypatch):
    monkeypatch.setattr(built, "SHARD_ROWS", 2)
    words = ["build", "--config", str(config), "--rows", "3", "--output", str(tmp_path / "rows")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "drawn for 3 rows" in result.output and "no words" in result.output
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == [
        "build.json", "rows-00000.jsonl", "rows-00001.jsonl",
    ]  # fmt: skip
    assert read_built(tmp_path / "rows", 2)[0].number == 2
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists: give a new folder" in again.output


def test_damaged_files_and_rows_that_break_the_rules_are_named(folder, tmp_path):
    (tmp_path / "build.json").write_text((folder / "build.json").read_text())
    lines = [json.loads(line) for line in islice((folder / "rows-00000.jsonl").open(), 4)]
    lines[1]["ids"] = lines[1]["ids"][:-1]
    del lines[2]["documents"]
    place = next(i for i, label in enumerate(lines[3]["labels"]) if label == IGNORE and i)
    lines[3]["labels"][place] = lines[3]["ids"][place] + 1
    (tmp_path / "rows-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"row": \n')
    assert show_row(str(tmp_path), 0).number == 0
    for number, what in (
        (1, "line 2: no packed row"),
        (2, "line 3: no packed row"),
        (4, "line 5"),
        (9, "has no row 9"),
    ):
        with pytest.raises(BuiltError, match=what):
            show_row(str(tmp_path), number)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--row", "3"])
    assert (
        result.exit_code == 1 and f"label {lines[3]['ids'][place] + 1} of id {lines[3]['ids'][place]}" in result.output
    )


def test_a_foreign_folder_is_refused_or_shown_and_never_fails(folder, tmp_path):
    """Numbers that are none, documents that overlap, counts that are missing, ids of another model."""
    good = json.loads((folder / "rows-00000.jsonl").open().readline())
    first, second = ({**part} for part in good["documents"][:2])
    counts = json.loads((folder / "build.json").read_text())
    clip = [["a", 0, 10**40]]
    rest = good["ids"][1:]
    rows = [
        {"ids": [float("inf"), *rest]}, {"ids": [1.5, *rest]}, {"ids": [10**30, *rest]},
        {"documents": [first, {**second, "start": 0}]}, {"documents": [first]}, {"row": None}, {"length": "8"},
        {"documents": [{**first, "start": -len(good["ids"])}]}, {"documents": [{**first, "clips": clip}]},
        {"documents": None},
    ]  # fmt: skip
    unknown = [{"ids": [id, *rest]} for id in (2**31 - 1, -1)]
    (tmp_path / "build.json").write_text(json.dumps(counts))
    (tmp_path / "rows-00000.jsonl").write_text(
        "".join(json.dumps({**good, **row}) + "\n" for row in [*rows, {}, *unknown])
    )
    for number in range(len(rows)):
        with pytest.raises(BuiltError, match=f"line {number + 1}: no packed row"):
            show_row(str(tmp_path), number)
    assert show_row(str(tmp_path), len(rows)).tokens == len(good["ids"])
    for number in range(len(rows) + 1, len(rows) + 3):
        assert show_row(str(tmp_path), number).documents[0].problems
    other = {"vocabulary": {**counts["vocabulary"], "first_code": 7}}
    for wrong, what in (
        ({"model": None}, "names no model"),
        ({"tasks": 3}, "no counts"),
        ({"rows": "x"}, "no counts"),
        (other, f"ids of another model than {MODEL}: first_code 7, not"),
    ):
        (tmp_path / "build.json").write_text(json.dumps({**counts, **wrong}))
        with pytest.raises(BuiltError, match=what):
            show_row(str(tmp_path), len(rows))


def test_what_is_very_long_is_cut_on_the_terminal_and_said(rows, tmp_path, capsys):
    document = next(document for row in rows for document in row.documents if document.task == "asr")
    span = dataclasses.replace(document.spans[0], content="\u05d0" * 9_999 + "Z")
    names = tuple((f"r{i}", "\u05d0") for i in range(500))
    wrong = ("it is wrong",) * 300
    long = dataclasses.replace(document, spans=(span,), rows=names, problems=wrong)
    row = dataclasses.replace(rows[0], documents=(long,))
    for part in terminal_view(row, 40):
        console.print(part)
    write_page(row, tmp_path / "new" / "p.html")
    printed = capsys.readouterr().out
    assert "9,000 characters more" in " ".join(printed.split()) and "Z" not in printed
    assert "and 490 more" in " ".join(printed.split()) and "and 260 more problems" in printed
    assert span.content in (tmp_path / "new" / "p.html").read_text(encoding="utf-8")


def test_only_covo_audio_has_such_rows(config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ModelError, match="qwen2_audio model writes no codes of speech"):
        show_row(str(config), model=str(tmp_path))
    with pytest.raises(ModelError, match="builtin:tiny: it has no codes of speech"):
        show_row(str(config), model="builtin:tiny")
    with pytest.raises(ConfigError, match="no such file"):
        show_row(str(tmp_path / "none.yaml"))
