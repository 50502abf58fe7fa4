# ruff: noqa: RUF001  (full-width marks are what some of it is about)
"""Documents of pre-training: the worked table id by id, where fragments end, what is taught, and the way back."""

import dataclasses
import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrain_data import UNHURRIED

from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.speech.grid import CodeError
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain import builder
from covo_rl.supervised.pretrain.builder import PATTERNS, cut_text, interleaved, text_document
from covo_rl.supervised.pretrain.document import BuildOptions, Document, SkippedError, Vocabulary
from covo_rl.supervised.pretrain.fragments import (
    Fragment,
    WordsError,
    phrase_fragments,
    sentence_fragments,
    whole_row,
)
from covo_rl.supervised.pretrain.reader import ReadError, document_problems, read_pieces, segments
from covo_rl.supervised.pretrain.tasks import TASKS
from covo_rl.types import Clip

TEXTS = {
    "f1": [11], "f2": [12, 13], "f3": [14, 15], "g": [*range(21, 28)], "11 12 13": [11, 12, 13],
    "asr\n": [31, 32], "tts\n": [33, 34], "continuation\n": [35], "audio-only\n": [36],
}  # fmt: skip
TABLE_IDS = (0, 1, 2, 3, 4, 5, 100, 300)
TABLE = Vocabulary(TEXTS.__getitem__, *TABLE_IDS)
F1 = Fragment("f1", 0, 8, "r", range(0, 8))
F2 = Fragment("f2", 8, 20, "r", range(8, 20))
F3 = Fragment("f3", 20, 28, "r", range(20, 28))
G = Fragment("g", 100, 140, "s", range(100, 140))
F = [F1, F2, F3]


def run(text):
    """The table's notation: "3 4 120..127" and "-" for what is not taught, "8x-" for eight of them."""
    ids = []
    for part in text.split():
        first, _, last = part.partition("..")
        count = int(part[:-2]) if part.endswith("x-") else 0
        if count or part == "-":
            ids += [IGNORE] * (count or 1)
        else:
            ids += range(int(first), int(last or first) + 1)
    return ids


# name -> what is written, ids, labels, clips
WORKED = {
    "sequential, phrase, ac>t>ad (f1,f2,f3)": (
        lambda: interleaved(F, "ac>t>ad", TABLE),
        "3 4 4 5 12 13 120..127 0", "- - - - 12 13 120..127 0", [("r", 0, 8)],
    ),
    "sequential, sentence, ad>t>ad (f1,f2,f3 are utterances)": (
        lambda: interleaved(F, "ad>t>ad", TABLE),
        "100..107 12 13 120..127 0", "8x- 12 13 120..127 0", [],
    ),
    "sequential ac>t>ac (f3 dropped)": (
        lambda: interleaved(F, "ac>t>ac", TABLE),
        "3 4 4 5 12 13 0", "- - - - 12 13 -", [("r", 0, 8)],
    ),
    "parallel, phrase, ac>t|ad (f1,g)": (
        lambda: interleaved([F1, G], "ac>t|ad", TABLE),
        "3 4 4 5 21..25 200..214 26 27 215..239 0", "4x- 21..25 200..214 26 27 215..239 0", [("r", 0, 8)],
    ),
    "ASR f1 (instruction 31 32)": (
        lambda: builder.asr(F1, TABLE, "asr"), "31 32 3 4 4 5 11 0", "6x- 11 0", [("r", 0, 8)],
    ),
    "TTS f1 (33 34)": (
        lambda: builder.tts(F1, TABLE, "tts"), "33 34 11 100..107 0", "- - - 100..107 0", [],
    ),
    "continuation (35; f1 then f2,f3)": (
        lambda: builder.continuation(F, TABLE, "continuation"),
        "35 3 4 4 5 12 13 14 15 0", "5x- 12 13 14 15 0", [("r", 0, 8)],
    ),
    "audio-only ac>ad (36; f1,f2)": (
        lambda: builder.audio_only([F1, F2], TABLE, "ac", "audio-only"),
        "36 3 4 4 5 108..119 0", "5x- 108..119 0", [("r", 0, 8)],
    ),
    "audio-only ad>ad (36; f1,f2)": (
        lambda: builder.audio_only([F1, F2], TABLE, "ad", "audio-only"),
        "36 100..107 108..119 0", "9x- 108..119 0", [],
    ),
    "text-only 11 12 13": (lambda: text_document("11 12 13", TABLE), "11 12 13 0", "- 12 13 0", []),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_worked(name):
    write, ids, labels, clips = WORKED[name]
    document = write()
    assert document.ids == run(ids)
    assert document.labels == run(labels)
    assert document.clips == tuple(clips)
    assert document.complete is ("dropped" not in name)


def fragment(text, codes, row="r"):
    return Fragment(" ".join(map(str, text)), 0, len(codes), row, codes)


WORDS = Vocabulary(lambda text: [int(word) for word in text.split()], 0, 1, 2, 3, 4, 5, 1000, 500)


@pytest.mark.parametrize(
    ("text", "codes", "blocks"),
    [
        (5, 15, [5, 15]), (10, 30, [5, 15, 5, 15]), (6, 15, [5, 15, 1]), (5, 16, [5, 16]),  # on a block, one more
        (12, 4, [5, 4, 7]), (11, 20, [5, 15, 5, 5, 1]),  # codes out first: the text follows at once
        (3, 50, [3, 50]), (5, 1, [5, 1]), (1, 1, [1, 1]), (10, 31, [5, 15, 5, 16]),
    ],
)  # fmt: skip
def test_text_and_codes_run_out(text, codes, blocks):
    ids = interleaved([F1_WORDS, fragment(range(20, 20 + text), range(codes))], "ac>t|ad", WORDS).ids[4:-1]
    runs = [1]
    for before, id in pairwise(ids):
        if (before >= 1000) == (id >= 1000):
            runs[-1] += 1
        else:
            runs.append(1)
    assert runs == blocks
    assert [id for id in ids if id < 1000] == [*range(20, 20 + text)]
    assert [id for id in ids if id >= 1000] == [*range(1000, 1000 + codes)]


F1_WORDS = fragment([7], range(8))


def test_kinds_go_round_and_only_audio_at_the_end_is_dropped():
    chain = [fragment([10 + i], range(i * 3, i * 3 + 5)) for i in range(7)]
    documents = {pattern: interleaved(chain, pattern, WORDS) for pattern in PATTERNS}
    assert {pattern: [p.kind for p in read_pieces(d, WORDS, pattern)] for pattern, d in documents.items()} == {
        "ac>t>ad": ["ac", "t", "ad", "ac", "t", "ad"],
        "ad>t>ad": ["ad", "t", "ad", "t", "ad", "t", "ad"],
        "ac>t>ac": ["ac", "t", "ac", "t", "ac", "t"],
        "ac>t|ad": ["ac", "t|ad", "ac", "t|ad", "ac", "t|ad"],
    }
    ends = {pattern: document.labels[-1] for pattern, document in documents.items()}
    assert ends == {"ac>t>ad": IGNORE, "ad>t>ad": 0, "ac>t>ac": IGNORE, "ac>t|ad": IGNORE}
    assert all(interleaved(chain[:6], pattern, WORDS).complete for pattern in PATTERNS)


def test_repeated_content_is_one_fragment_in_every_kind():
    document = interleaved([F1, F2], "ac>t>ad", TABLE, content="repeat")
    assert document.ids == run("3 4 4 5 11 100..107 3 4 4 4 5 12 13 108..119 0")
    assert document.labels == run("4x- 11 100..107 5x- 12 13 108..119 0")
    assert interleaved([F1], "ac>t|ad", TABLE, content="repeat").ids == run("3 4 4 5 11 100..107 0")


def test_a_slot_holds_4_codes_and_the_last_may_be_begun_only():
    for codes, slots in ((1, 1), (4, 1), (5, 2), (13, 4), (750, 188)):
        assert builder.asr(Fragment("f1", 0, codes, "r"), TABLE, "asr").ids == run("31 32 3") + [4] * slots + run(
            "5 11 0"
        )


def test_one_fragment_asks_nothing():
    for pattern in PATTERNS:
        with pytest.raises(SkippedError, match="r: fewer than two fragments"):
            interleaved([F1], pattern, TABLE)
    with pytest.raises(SkippedError, match="fewer than two fragments"):
        builder.continuation([F1], TABLE, "continuation")
    with pytest.raises(SkippedError, match="fewer than two fragments"):
        builder.audio_only([], TABLE)
    with pytest.raises(ValueError, match=r"pattern 't>ac' does not exist; write one of ac>t>ad"):
        interleaved(F, "t>ac", TABLE)


def test_a_fragment_needs_codes_that_there_are():
    with pytest.raises(CodeError, match="r: code 300 at position 1; there are 0 to 299"):
        interleaved([F1, F2, Fragment("f3", 0, 2, "r", [1, 300])], "ac>t>ad", TABLE)
    with pytest.raises(SkippedError, match="no codes"):
        builder.tts(Fragment("f1", 0, 8, "r"), TABLE, "tts")
    with pytest.raises(SkippedError, match="no codes"):
        builder.asr(Fragment("f1", 8, 8, "r", []), TABLE, "asr")
    with pytest.raises(SkippedError, match="not as many codes"):
        builder.tts(Fragment("f1", 0, 8, "r", [1]), TABLE, "tts")


def test_long_text_is_cut_and_only_the_last_part_has_the_end():
    document = dataclasses.replace(text_document(" ".join(map(str, range(10, 30))), WORDS), task="text")
    parts = cut_text(document, 8)
    assert [part.ids for part in parts] == [[*range(10, 18)], [*range(18, 26)], [*range(26, 30), 0]]
    assert [part.labels for part in parts] == [[-100, *range(11, 18)], [-100, *range(19, 26)], [-100, 27, 28, 29, 0]]
    assert [part.complete for part in parts] == [False, False, True]
    assert {part.task for part in parts} == {"text"}
    assert cut_text(document, 21) == [document]
    last = cut_text(document, 20)[-1]  # the end by itself is a first id, and not taught
    assert (last.ids, last.labels, last.complete) == ([0], [-100], True)
    with pytest.raises(ValueError, match="only text is cut"):
        cut_text(interleaved(F, "ac>t>ad", TABLE), 8)


# ---------------------------------------------------------------------------------------------------------- fragments


def row(text, words, codes, name="r", **fields):
    """words: (text, start, end); codes: how many."""
    return SpeechRow(name, text, words=tuple(words), codes=np.arange(codes) % 500, **fields)


def spans(fragments):
    return [(f.text, f.a, f.b) for f in fragments]


def evenly(text, seconds, pause=0.0):
    """Every word of a text as long, with as long a pause after each."""
    step = seconds + pause
    return [(word, round(i * step, 6), round(i * step + seconds, 6)) for i, word in enumerate(text.split())]


def test_a_phrase_ends_at_punctuation_once_it_has_800_ms():
    text = "no, one two, three four. five six"
    # "no," ends at 0.5 s: too short. "two," ends at 1.5 s, code 37.5 -> 38; "four." at 2.5 s, code 62.5 -> 63
    assert spans(phrase_fragments(row(text, evenly(text, 0.5), 88))) == [
        ("no, one two,", 0, 38), (" three four.", 38, 63), (" five six", 63, 88),
    ]  # fmt: skip


def test_punctuation_may_stand_in_the_text_alone_with_quotes_around_it():
    text = '«no, one two», "three four." five six'
    words = evenly("no one two three four five six", 0.5)
    assert spans(phrase_fragments(row(text, words, 88))) == [
        ("«no, one two»,", 0, 38), (' "three four."', 38, 63), (" five six", 63, 88),
    ]  # fmt: skip


def test_a_phrase_ends_at_a_pause_of_250_ms_in_its_middle():
    words = [("one", 0.0, 1.0), ("two", 1.24, 2.2), ("three", 2.45, 3.5)]
    # 0.24 s is no pause; 2.2 to 2.45 is: floor(25 * 4.65 / 2 + 0.5) = floor(58.625)
    assert spans(phrase_fragments(row("one two three", words, 90))) == [("one two", 0, 58), (" three", 58, 90)]
    # 1.05 - 0.8 is a hair below 0.25 for a computer
    words = [("one", 0.0, 0.8), ("two", 1.05, 2.0)]
    assert spans(phrase_fragments(row("one two", words, 50))) == [("one", 0, 23), (" two", 23, 50)]


def test_a_phrase_has_exactly_800_ms_or_goes_on():
    for end, expected in ((0.8, [20, 20]), (0.76, [40])):
        words = [("one", 0.0, end), ("two", end, 1.6)]
        assert [len(f) for f in phrase_fragments(row("one, two", words, 40))] == expected


def test_a_phrase_is_cut_before_it_exceeds_4_s():
    text = "a b c d e f g h i j"
    assert [(f.a, f.b) for f in phrase_fragments(row(text, evenly(text, 0.9), 225))] == [(0, 90), (90, 180), (180, 225)]
    text = "a b c d e f g h"  # 1 s each: 4 s are not over 4 s
    assert [(f.a, f.b) for f in phrase_fragments(row(text, evenly(text, 1.0), 200))] == [(0, 100), (100, 200)]
    words = [("a", 0.0, 3.0), ("b", 3.0, 4.04), ("c", 4.04, 5.04)]  # 101 codes are
    assert [(f.a, f.b) for f in phrase_fragments(row("a b c", words, 126))] == [(0, 75), (75, 126)]


def test_a_word_over_4_s_stays_whole_and_what_is_before_it_ends():
    words = [("one", 0.0, 0.2), ("looong", 0.2, 5.2), ("two", 5.2, 6.4)]
    assert spans(phrase_fragments(row("one looong two", words, 160))) == [
        ("one", 0, 5), (" looong", 5, 130), (" two", 130, 160),
    ]  # fmt: skip


def test_a_last_phrase_under_800_ms_joins_the_one_before():
    words = [("one", 0.0, 1.0), ("two", 1.0, 2.0), ("three", 2.0, 2.6)]
    assert spans(phrase_fragments(row("one, two, three", words, 65))) == [("one,", 0, 25), (" two, three", 25, 65)]
    assert spans(phrase_fragments(row("one, three", [("one", 0.0, 1.0), ("three", 1.0, 1.5)], 38))) == [
        ("one, three", 0, 38)
    ]


def test_no_phrase_is_without_codes():
    # words without length, and words that the codes do not reach
    words = [
        ("one,", 0.0, 1.0),
        ("-", 1.0, 1.0),
        ("two,", 1.0, 1.0),
        ("three", 1.0, 2.0),
        ("four,", 2.0, 2.04),
        ("five", 2.04, 2.04),
    ]
    fragments = phrase_fragments(row("one, - two, three four, five", words, 50))
    assert spans(fragments) == [("one,", 0, 25), (" - two, three four, five", 25, 50)]
    words = [("one,", 0.0, 1.0), ("two", 1.0, 1.0)]
    assert spans(phrase_fragments(row("one, two", words, 25))) == [("one, two", 0, 25)]


def test_chinese_has_no_spaces():
    text = "你好，今天天气很好。我们走吧"
    words = [(character, i * 0.25, (i + 1) * 0.25) for i, character in enumerate("你好今天天气很好我们走吧")]
    # 你好 has 0.5 s and goes on; 好。 ends at 2 s
    assert spans(phrase_fragments(row(text, words, 75))) == [("你好，今天天气很好。", 0, 50), ("我们走吧", 50, 75)]
    attached = [
        ("你好，", 0.0, 0.8),
        ("今天天气", 0.8, 1.6),
        ("很好。", 1.6, 2.0),
        ("“我们", 2.0, 2.5),
        ("走吧", 2.5, 3.0),
    ]
    assert spans(phrase_fragments(row("你好，今天天气很好。“我们走吧”", attached, 75))) == [
        ("你好，", 0, 20), ("今天天气很好。", 20, 50), ("“我们走吧”", 50, 75),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("one two", ["one", "three"], "r: its words are not those of its text: word 1, 'three', is not next in ' two'"),
        ("I can a", ["I", "a"], "word 1, 'a', is not next in ' can a'"),
        ("two one", ["one", "two"], "word 0, 'one', is not next in 'two one'"),
        ("one two three", ["one", "two"], "after the last word comes ' three'"),
        ("one", ["one", ""], "word 1, '', is not next in ''"),
    ],
)
def test_words_are_those_of_the_text(text, words, message):
    with pytest.raises(WordsError, match=message) as raised:
        phrase_fragments(row(text, [(word, i, i + 1) for i, word in enumerate(words)], 100))
    assert (raised.value.reason, raised.value.row) == ("its words are not those of its text", "r")


def test_rows_without_text_or_words_are_skipped_by_reason():
    for text, words, reason in ((" ", [("a", 0, 1)], "no text"), ("one", [], "no words")):
        with pytest.raises(SkippedError) as raised:
            phrase_fragments(row(text, words, 30))
        assert raised.value.reason == reason
    with pytest.raises(SkippedError, match="r: no codes"):
        whole_row(row("one", [], 0))


def utterance(name, seconds, text="It goes on."):
    words = evenly(text, seconds / len(text.split()))
    return row(text, words, round(seconds * 25), name)


def test_an_utterance_of_a_document_is_a_sentence_fragment():
    rows = [utterance("a", 3), utterance("b", 0.6, "Yes. No."), utterance("c", 30)]
    assert [(f.row, f.text, f.a, f.b) for f in sentence_fragments(rows)] == [
        ("a", "It goes on.", 0, 75), ("b", " Yes. No.", 0, 15), ("c", " It goes on.", 0, 750),
    ]  # fmt: skip
    chinese = [utterance("a", 3, "你好。"), utterance("b", 3, "再见。"), utterance("c", 3, "안녕")]
    assert [f.text for f in sentence_fragments(chinese)] == ["你好。", "再见。", "안녕"]


def test_a_long_utterance_is_cut_where_sentences_end():
    text = "One two. Three, four five? Six. Seven eight."  # 5 s a word: ends at 10, 25, 30, 40 s
    rows = [utterance("a", 3), utterance("b", 40, text)]
    assert [(f.row, f.text, f.a, f.b) for f in sentence_fragments(rows)] == [
        ("a", "It goes on.", 0, 75), ("b", " One two.", 0, 250), ("b", " Three, four five?", 250, 625),
        ("b", " Six.", 625, 750), ("b", " Seven eight.", 750, 1000),
    ]  # fmt: skip
    # a recording by itself is, too; sentences under 2 s go on into the next, and the last into the one before
    text = "One. Two three. Four. Five six seven. Eight."  # 1 s a word
    assert spans(sentence_fragments([utterance("b", 8, text)])) == [
        ("One. Two three.", 0, 75), (" Four. Five six seven. Eight.", 75, 200),
    ]  # fmt: skip


def test_what_cannot_be_cut_to_30_s_is_skipped():
    with pytest.raises(SkippedError, match="b: a sentence of more than 30 s"):
        sentence_fragments([utterance("a", 3), utterance("b", 31, "It goes on and on, yes.")])
    with pytest.raises(SkippedError, match="b: more than 30 s, and no words"):
        sentence_fragments([row("It goes on.", [], 751, "b")])
    assert len(sentence_fragments([row("It goes on.", [], 750, "b")])) == 1


def test_without_codes_a_recording_is_as_long_as_its_samples():
    spoken = dataclasses.replace(
        utterance("a", 3), codes=None, clip=Clip(array=np.zeros(960 * 75 + 1, np.float32), sampling_rate=24000)
    )
    assert spoken.code_count() == 76
    assert builder.asr(whole_row(spoken), LETTERS).clips == (("a", 0, 76),)


# ------------------------------------------------------------------------------------------------------------- tasks


LETTERS = Vocabulary(lambda text: [1000 + ord(c) % 500 for c in text], 7, 8, 9, 20, 21, 22, 5000, 500)
CALM = BuildOptions()


def story(name="d", rows=4):
    text = "One two three, four five. Six seven eight nine, ten?"
    return [utterance(f"{name}{i}", 5 + i / 10, text) for i in range(rows)]


def build(task, unit, seed=0, options=CALM):
    return dataclasses.replace(TASKS[task].build(unit, LETTERS, random.Random(seed), options), task=task)


SPOKEN = ["asr", "tts", "audio_only", "continuation", "interleave_1", "interleave_2"]


@pytest.mark.parametrize("task", SPOKEN)
def test_a_task_keeps_to_the_rules_and_to_its_seed(task):
    unit = story(rows=1) if TASKS[task].unit == "row" else story()
    documents = [build(task, unit, seed) for seed in range(40)]
    assert documents == [build(task, unit, seed) for seed in range(40)]
    assert len({tuple(document.ids) for document in documents}) > 2  # instructions, patterns and levels vary
    for document in documents:
        assert document_problems(document, LETTERS) == []


def test_both_patterns_of_a_task_and_both_levels_come():
    def kinds(task):
        return {tuple(p.kind for p in read_pieces(build(task, story(), seed), LETTERS)[:3]) for seed in range(30)}

    assert kinds("interleave_1") == {("ac", "t|ad", "ac"), ("ac", "t", "ac")}
    assert kinds("interleave_2") == {("ad", "t", "ad"), ("ac", "t", "ad")}
    assert kinds("audio_only") == {("ac", "ad"), ("ad", "ad")}
    first = [build("interleave_1", story(), seed).clips[0][2] for seed in range(80)]
    assert set(first) == {38, 125}  # "One two three," and the utterance
    assert 25 < first.count(125) < 55
    only = {build("interleave_1", story(), s, BuildOptions(sentence_share=1.0)).clips[0][2] for s in range(20)}
    assert only == {125}


def test_the_level_that_is_possible_is_taken():
    short = [utterance(f"s{i}", 1.5, "One two.") for i in range(3)]  # no phrase ends within one: 3 fragments by either
    assert {len(build("interleave_2", short, seed).clips) for seed in range(20)} <= {0, 1}
    unaligned = [dataclasses.replace(one, words=None) for one in story()]
    assert {build("continuation", unaligned, seed).clips for seed in range(20)} == {(("d0", 0, 125),)}
    with pytest.raises(SkippedError, match="d0: no words"):
        build("continuation", unaligned, options=BuildOptions(sentence_share=0.0))
    with pytest.raises(SkippedError, match="no words"):
        build("continuation", unaligned[:1])
    with pytest.raises(SkippedError, match="d0: fewer than two fragments"):
        build("interleave_1", [utterance("d0", 3)])
    assert build("interleave_2", [utterance("d0", 3)], options=BuildOptions(content="repeat")).complete


def test_text_needs_text():
    class Row:
        id, text = "t", "One."

    assert build("text", Row()).ids == [*LETTERS.text("One."), 7]
    Row.text = ""
    with pytest.raises(SkippedError, match="t: no text"):
        build("text", Row())


# -------------------------------------------------------------------------------------------------------- properties


MARKS = ["", "", "", ",", ".", "?", "，", "。", '."', "”", "…"]


def any_row(seed):
    """Words of any length and pause, with punctuation in the words or in the text alone, and a tail of any length."""
    rng = random.Random(seed)
    words, text, second = [], rng.choice(["", " ", "“"]), rng.random()
    for _ in range(rng.randint(1, 20)):
        word, mark = "".join(rng.choices("abcdeéß你好今", k=rng.randint(1, 4))), rng.choice(MARKS)
        end = second + rng.choice([0.0, 0.04, 0.3, 0.7, 1.1, 5.0])
        words.append((word + mark if rng.random() < 0.5 else word, second, end))
        second = end + rng.choice([0.0, 0.0, 0.1, 0.25, 1.0])
        text += word + mark + rng.choice([" ", " ", "", " - ", ' "', "  "])
    codes = max(1, math.ceil(second * 25) + rng.randint(-1, 30))
    return SpeechRow("r", text, words=tuple(words), codes=np.arange(codes) * 7 % 500)


@settings(UNHURRIED, max_examples=45)
@given(st.integers(0, 2**32))
def test_joined_fragments_give_the_transcript_and_the_codes(seed):
    row = any_row(seed)
    for fragments in (phrase_fragments(row), sentence_fragments([row]) if len(row.codes) <= 750 else [whole_row(row)]):
        assert "".join(f.text for f in fragments) == row.text
        assert np.concatenate([f.codes for f in fragments]).tolist() == row.codes.tolist()
        assert [f.a for f in fragments] == [0, *(f.b for f in fragments[:-1])]
        assert all(len(f) >= 1 and len(f.codes) == len(f) and f.row == "r" for f in fragments)
        assert all(any(c.isalnum() for c in f.text) for f in fragments)


@settings(UNHURRIED, max_examples=45)
@given(st.integers(0, 2**32))
def test_phrases_are_as_long_as_they_may_be(seed):
    row = any_row(seed)
    fragments = phrase_fragments(row)
    longest = max(end - start for _, start, end in row.words)
    assert len(fragments) == 1 or len(fragments[-1]) >= 20
    for f in fragments[:-1]:
        # one word may be longer, with the pauses around it
        assert len(f) <= max(100, 25 * (longest + 2))
        if len(f) < 20:
            assert longest > 3  # only a long word ends a fragment so early


FRAGMENTS = st.lists(
    st.tuples(st.integers(1, 14), st.integers(1, 50)), min_size=2, max_size=9
)  # fmt: skip


def chain(sizes):
    """Fragments of so many text ids and codes."""
    place, made = 0, []
    for i, (text, codes) in enumerate(sizes):
        made.append(Fragment("xyz"[i % 3] * text, place, place + codes, "r", [(place + c) % 500 for c in range(codes)]))
        place += codes
    return made


@settings(UNHURRIED, max_examples=40)
@given(FRAGMENTS, st.sampled_from(list(PATTERNS)), st.sampled_from(["continue", "repeat"]))
def test_every_pattern_is_read_back(sizes, pattern, content):
    fragments = chain(sizes)
    document = interleaved(fragments, pattern, LETTERS, content)
    kinds = PATTERNS[pattern]
    if content == "repeat":
        dealt = [(kind, f) for f in fragments for kind in kinds]
    else:
        dealt = list(zip(list(kinds) * len(fragments), fragments, strict=False))
    if dealt[-1][0] == "ac":
        dealt.pop()
    found = read_pieces(document, LETTERS, pattern)
    assert [piece.kind for piece in found] == [kind for kind, _ in dealt]
    for i, (piece, (kind, f)) in enumerate(zip(found, dealt, strict=True)):
        assert list(piece.text) == (LETTERS.text(f.text) if "t" in kind else [])
        assert list(piece.codes) == (list(f.codes) if "ad" in kind else [])
        assert piece.clip == ((f.row, f.a, f.b) if kind == "ac" else None)
        assert piece.taught == (i > 0 and kind != "ac")
    assert document_problems(document, LETTERS, fragments, pattern) == []
    slots = sum(-(-(b - a) // 4) for _, a, b in document.clips)
    assert document.ids.count(LETTERS.slot) == slots
    assert all(0 <= id < 5500 for id in document.ids)


@settings(UNHURRIED, max_examples=25)
@given(FRAGMENTS, st.sampled_from(["asr", "tts", "continuation", "ac", "ad"]), st.integers(0, 3))
def test_every_task_is_read_back(sizes, task, drawn):
    fragments = chain(sizes)
    name = "audio_only" if task in ("ac", "ad") else task
    instruction = builder.INSTRUCTIONS[name][drawn]
    if task in ("asr", "tts"):
        fragments = fragments[:1]
        document = getattr(builder, task)(fragments[0], LETTERS, instruction)
    elif task == "continuation":
        document = builder.continuation(fragments, LETTERS, instruction)
    else:
        document = builder.audio_only(fragments, LETTERS, task, instruction)
    document = dataclasses.replace(document, task=name)
    assert document_problems(document, LETTERS, fragments) == []
    assert segments(document, LETTERS)[0].kind == "instruction"
    assert segments(document, LETTERS)[0].end == len(instruction) + 1
    asked, answered = read_pieces(document, LETTERS)
    assert not asked.taught
    assert answered.taught
    taught = [label for label in document.labels if label != IGNORE]
    response = [*answered.text, *(5000 + code for code in answered.codes), 7]
    assert taught == response


def test_segments_cover_every_position_once():
    document = dataclasses.replace(interleaved([F1, G, F2, F3], "ac>t|ad", TABLE), task="interleave_1")
    found = [
        (s.kind, s.start, s.end, s.fragment, s.taught)
        for s in segments(document, Vocabulary(lambda _: [50], *TABLE_IDS))
    ]
    assert found == [
        ("ac", 0, 4, 0, False), ("t", 4, 9, 1, True), ("ad", 9, 24, 1, True), ("t", 24, 26, 1, True),
        ("ad", 26, 51, 1, True), ("ac", 51, 56, 2, False), ("t", 56, 58, 3, True), ("ad", 58, 66, 3, True),
        ("end", 66, 67, None, True),
    ]  # fmt: skip


def test_a_dialogue_is_read_with_its_frame():
    names = {"system": [60], "user": [61], "assistant": [62], "\n": [6]}
    vocabulary = Vocabulary(lambda text: names.get(text, [50]), *TABLE_IDS)
    ids = run("1 60 6 40 41 2 6 1 61 6 3 4 4 5 2 6 1 62 6 21..25 100..114 26 27 115..139 2")
    labels = run("24x- 100..114 - - 115..139 2")
    found = segments(Document(ids, labels, (("u", 0, 8),), "pseudo_dialogue"), vocabulary)
    assert [(s.kind, s.end - s.start, s.fragment) for s in found] == [
        ("chat", 3, None), ("t", 2, 0), ("chat", 2, None), ("chat", 3, None), ("ac", 4, 1), ("chat", 2, None),
        ("chat", 3, None), ("t", 5, 2), ("ad", 15, 2), ("t", 2, 2), ("ad", 25, 2), ("chat", 1, None),
    ]  # fmt: skip
    assert document_problems(Document(ids, labels, (("u", 0, 8),)), vocabulary) == []
    # a newline that is one id with the text after it, and a role that nobody has: the text begins earlier
    others = Document(run("1 60 40 2 6 1 70 6 40 2"), [IGNORE] * 10)
    assert [(s.kind, s.start) for s in segments(others, vocabulary)] == [
        ("chat", 0), ("t", 2), ("chat", 3), ("chat", 5), ("t", 6), ("chat", 9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "clips", "message"),
    [
        ("3 4 4 12 0", [("r", 0, 8)], "position 0: audio is its start, slots, its end"),
        ("12 3 5 12 0", [("r", 0, 8)], "position 1: audio is its start, slots, its end"),
        ("12 400 0", [], "position 1: id 400; the last is 399"),
        ("3 4 4 5 12 0", [], "position 0: audio beyond the 0 clips"),
        ("12 0", [("r", 0, 8)], "no audio for its clip"),
    ],
)
def test_ids_that_no_document_has_are_named(ids, clips, message):
    document = Document(run(ids), [IGNORE] * len(run(ids)), tuple(clips))
    with pytest.raises(ReadError, match=message):
        segments(document, TABLE)
    assert message in document_problems(document, TABLE)[0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("- - - - 12 13 120..126 12 0", "position 13: label 12 of id 127"),
        ("3 - - - 12 13 120..127 0", "position 0: the first id is taught"),
        ("- - - 5 12 13 120..127 0", "position 3: ac is taught"),
        ("- - - - 12 13 120..127 -", "position 14: the end"),
    ],
)
def test_labels_that_break_the_rules_are_named(labels, message):
    ids = run("3 4 4 5 12 13 120..127 0")
    assert any(message in problem for problem in document_problems(Document(ids, run(labels), (("r", 0, 8),)), TABLE))


def test_a_document_that_says_other_fragments_is_told():
    document = interleaved(F, "ac>t>ad", TABLE)
    assert document_problems(document, TABLE, F, "ac>t>ad") == []
    for others in ([F1, F3, F2], [F1, F2], [F1, F2, F3, G], [G, F2, F3]):
        assert document_problems(document, TABLE, others, "ac>t>ad") == ["its pieces are not its fragments"]
    wrong = Document(document.ids, document.labels, (("r", 0, 12),))
    assert document_problems(wrong, TABLE) == ["position 0: 2 slots, its clip has 3"]
