"""A packed row for the eye: every run of one modality with its fragment, whether it is taught, and whose voice it is.

What rows say is untrusted: `visible` writes controls, ANSI and bidi marks out, the page escapes what HTML reads, names
are cut, and what may be written from right to left stands last in its line. Colours only repeat what words say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from covo_rl.data.files import write_atomically
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.records.console import ProgressDisplay
from covo_rl.speech.grid import CODE_SECONDS
from covo_rl.supervised.pretrain.built import (
    SUMMARY,
    BuiltError,
    StoredRow,
    built_vocabulary,
    is_built,
    packer_of,
    read_built,
    written_vocabulary,
)
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.document import Document, Vocabulary
from covo_rl.supervised.pretrain.duplex_reader import FIRST_CODES, run_content, stream_problems, stream_runs
from covo_rl.supervised.pretrain.reader import ReadError, document_problems, segments
from covo_rl.supervised.pretrain.stream import stream_report
from covo_rl.types import shown, visible


@dataclass(frozen=True)
class Kind:
    """How a modality is called, what it is, and its colours: rich's, and the page's in light and dark."""

    name: str
    meaning: str
    style: str
    light: str
    dark: str


KINDS: dict[str, Kind] = {
    "ac": Kind("audio in", "audio slots, filled by encoder and adapter", "blue", "#cfe3ff", "#153a66"),
    "t": Kind("text", "text ids", "green", "#d8f3d3", "#1c4a1a"),
    "ad": Kind("codes", "codes of speech", "magenta", "#f3d9f7", "#512058"),
    "instruction": Kind("instruction", "what asks for the task", "yellow", "#fdf0c4", "#534410"),
    "chat": Kind("chat", "what frames a turn: role, newline, end", "cyan", "#d3f1f1", "#124a4a"),
    "end": Kind("end", "end of the document", "red", "#fbd7d3", "#5c211b"),
    "listen": Kind("listening", "chunks of the user, THINK after each", "blue", "#cfe3ff", "#153a66"),
    "shift": Kind("shift", "a chunk, and SHIFT: the model begins to speak", "yellow", "#fdf0c4", "#534410"),
    "reply": Kind("reply", "chunks, text or text_pad after each, four codes", "magenta", "#f3d9f7", "#512058"),
    "break": Kind("break", "a chunk, and BREAK: the model is silent", "red", "#fbd7d3", "#5c211b"),
}
TAUGHT, CONTEXT = "taught", "context"
#: characters of a name, rows of a document, and characters of a run on the terminal: what is more is said, not shown
MOST_NAME, MOST_ROWS, MOST_CONTENT = 80, 10, 1000


@dataclass(frozen=True)
class Span:
    """Positions [start, end) of a document, of one kind and one label; `content` is printable."""

    kind: str
    start: int
    end: int
    fragment: int | None
    taught: bool
    content: str


@dataclass(frozen=True)
class ShownDocument:
    """A document of a packed row; `rows` are (id, speaker), `problems` what is wrong with it. All text is printable."""

    task: str
    start: int
    length: int
    taught: int
    complete: bool
    rows: tuple[tuple[str, str], ...]
    spans: tuple[Span, ...]
    problems: tuple[str, ...] = ()

    @property
    def made_of(self) -> str:
        """Its first rows with their speakers, as one line."""
        names = [f"{id} ({speaker})" if speaker else id for id, speaker in self.rows[:MOST_ROWS]]
        more = [f"and {len(self.rows) - MOST_ROWS} more"] if len(self.rows) > MOST_ROWS else []
        return ", ".join([*names, *more])


@dataclass(frozen=True)
class ShownRow:
    """A packed row, and what was drawn up to it or, of a built folder, in all: see `stream_report`."""

    number: int
    length: int
    documents: tuple[ShownDocument, ...]
    report: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return sum(document.length for document in self.documents)


def show_row(path: str, number: int = 0, model: str | None = None, stage: int | None = None) -> ShownRow:
    """Row `number` of a YAML of pre-training, or of a folder of `covo-rl data build`.

    `model` gives ids and words; default: the one of the options. A built folder has the ids of its own.

    Raises:
        ConfigError, DataError, ModelError, BuiltError: what cannot be read.
    """
    if is_built(Path(path)):
        stored, report = read_built(Path(path), number)
        vocabulary, tokenizer = built_vocabulary(Path(path), report, model)
        try:
            list(count_tables(report))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = visible(shown(error))
            raise BuiltError(f"{Path(path) / SUMMARY} has no counts ({what}); build it again") from None
    else:
        config = read_pretrain(path, {"model": model, "stage": stage})
        vocabulary, tokenizer = written_vocabulary(str(config.model))
        packer = packer_of(config, vocabulary)
        with ProgressDisplay("packing", number, stderr=True) as display:
            for done in range(number):
                packer.next_row()
                display.update(done + 1, "")
        stored = StoredRow.of(number, packer.next_row())
        report = stream_report(packer.state_dict())
    return ShownRow(number, stored.length, tuple(shown_documents(stored, vocabulary, tokenizer)), report)


def shown_documents(row: StoredRow, vocabulary: Vocabulary, tokenizer: Any) -> Iterator[ShownDocument]:
    """The documents of a row in order."""
    start = 0
    for document, rows in zip(row.documents, row.rows, strict=True):
        speakers = {id: _name(speaker or "") for id, speaker in rows}
        problems = (stream_problems if document.streamed else document_problems)(document, vocabulary)
        try:
            spans = tuple(_spans(document, vocabulary, tokenizer, speakers))
        except ReadError:  # document_problems says so
            spans = ()
        yield ShownDocument(
            _name(document.task), start, len(document), sum(label != IGNORE for label in document.labels),
            document.complete, tuple((_name(id), speakers[id]) for id, _ in rows), spans,
            tuple(map(visible, problems)),
        )  # fmt: skip
        start += len(document)


def _spans(document: Document, vocabulary: Vocabulary, tokenizer: Any, speakers: Mapping[str, str]) -> Iterator[Span]:
    for run in stream_runs(document, vocabulary) if document.streamed else ():
        content = visible(run_content(run, document, vocabulary, tokenizer))
        taught = any(label != IGNORE for label in document.labels[run.start : run.end])
        yield Span(run.kind, run.start, run.end, run.reply, taught, content)
    for segment in () if document.streamed else segments(document, vocabulary):
        start = segment.start
        for i in range(segment.start, segment.end):
            taught = document.labels[i] != IGNORE
            if i + 1 < segment.end and (document.labels[i + 1] != IGNORE) == taught:
                continue
            ids = document.ids[start : i + 1]
            if segment.kind == "ac":
                content = _clip(segment.clip, ids.count(vocabulary.slot), speakers)
            elif segment.kind == "ad":
                content = _codes([id - vocabulary.first_code for id in ids])
            else:
                content = tokenizer.decode(ids, skip_special_tokens=False)
            yield Span(segment.kind, start, i + 1, segment.fragment, taught, visible(content))
            start = i + 1


def _clip(clip: tuple[str, int, int] | None, slots: int, speakers: Mapping[str, str]) -> str:
    assert clip is not None  # `segments` gives one to every audio
    name, a, b = clip
    voice = f", {speakers[name]}" if speakers.get(name) else ""
    return f"{slots} slots, {a * CODE_SECONDS:.2f} to {b * CODE_SECONDS:.2f} s of {_name(name)}{voice}"


def _name(text: str) -> str:
    return visible(shown(text, MOST_NAME))


def _codes(codes: Sequence[int]) -> str:
    more = " ..." if len(codes) > FIRST_CODES else ""
    return f"{len(codes)}: {' '.join(map(str, codes[:FIRST_CODES]))}{more}"


# -- counts ------------------------------------------------------------------------------------------------------


def task_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(task, documents, tokens, share, weight, epochs), as text."""
    return [
        (_name(name), f"{task['documents']:,}", f"{task['tokens']:,}", f"{100 * task['share']:.1f} %",
         f"{task['weight']:g}", f"{task['epochs']:.2f}")
        for name, task in report["tasks"].items()
    ]  # fmt: skip


def skipped_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(task, reason, rows, how often, ids of the first), as text; a row is skipped again in every epoch."""
    return [
        (
            _name(name),
            visible(shown(reason)),
            f"{skipped['rows']:,}",
            f"{skipped['times']:,}",
            ", ".join(map(_name, dict.fromkeys(skipped["first"]))),
        )
        for name, task in report["tasks"].items()
        for reason, skipped in task["skipped"].items()
    ]


TASK_COLUMNS = ("task", "documents", "tokens", "share", "weight", "epochs")
SKIPPED_COLUMNS = ("task", "skipped because", "rows", "times", "for example")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def count_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """What was drawn, and what was skipped if anything was."""
    title = f"{report['rows']:,} rows, {report['tokens']:,} tokens, {100 * report['padding']:.1f} % padding"
    yield _table(f"drawn for {title}", TASK_COLUMNS, task_rows(report))
    if rows := skipped_rows(report):
        yield _table("rows of which a task makes no document", SKIPPED_COLUMNS, rows)


# -- terminal ----------------------------------------------------------------------------------------------------


def terminal_view(row: ShownRow, most: int) -> Iterator[RenderableType]:
    """The row, at most `most` runs of each document, then the counts."""
    yield Text(f"row {row.number}: {len(row.documents)} documents, {row.tokens} of {row.length} ids")
    yield Text.assemble("a run is ", *_legend(), f"; {TAUGHT} (bold): a label, {CONTEXT} (dim): none")
    for number, document in enumerate(row.documents):
        title = (
            f"document {number}: {document.task}, {document.length} ids, {document.taught} {TAUGHT}"
            f"{'' if document.complete else ', not complete'}; {document.made_of}"
        )
        table = Table(*("ids", "what", "fragment", "label", Column("content", overflow="fold")), title=Text(title),
                      title_justify="left", box=None)  # fmt: skip
        for span in document.spans[:most]:
            style = f"{KINDS[span.kind].style} {'bold' if span.taught else 'dim'}"
            place = f"{document.start + span.start}-{document.start + span.end - 1}"
            fragment = "" if span.fragment is None else str(span.fragment + 1)
            label = TAUGHT if span.taught else CONTEXT
            cells = (place, KINDS[span.kind].name, fragment, label, _cut(span.content))
            table.add_row(*(Text(cell, style=style) for cell in cells))
        yield table
        if len(document.spans) > most:
            yield Text(f"... and {len(document.spans) - most} more runs; --runs {len(document.spans)} shows all")
        yield from (Text(f"problem: {_cut(problem)}", style="red") for problem in document.problems[:most])
        if len(document.problems) > most:
            yield Text(f"... and {len(document.problems) - most} more problems")
    yield from count_tables(row.report)


def _cut(content: str) -> str:
    more = f" ... {len(content) - MOST_CONTENT:,} characters more, which --html shows"
    return content if len(content) <= MOST_CONTENT else content[:MOST_CONTENT] + more


def _legend() -> Iterator[Any]:
    for number, kind in enumerate(KINDS.values()):
        yield from [", "] if number else []
        yield kind.name, kind.style
        yield f" ({kind.meaning})"


# -- page --------------------------------------------------------------------------------------------------------


def write_page(row: ShownRow, file: Path) -> None:
    """One HTML file that needs no other and runs no scripts."""
    import jinja2

    source = Path(__file__).with_name("inspection.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    page = template.render(
        row=row, kinds=KINDS, taught=TAUGHT, context=CONTEXT, tasks=task_rows(row.report),
        task_columns=TASK_COLUMNS, skipped=skipped_rows(row.report), skipped_columns=SKIPPED_COLUMNS,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda out: out.write(page))
