"""Streams as documents of pre-training: ids and labels by hand, there and back, heard by the streaming encoder."""

import json
import random
from dataclasses import replace

import numpy as np
import pretrain_cases as cases
import pytest
import torch
import yaml
from accelerate import Accelerator
from typer.testing import CliRunner

from covo_rl.config import ConfigError
from covo_rl.data.read import DataError
from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn, parse_stream, stream_content
from covo_rl.duplex.layout import ChunkDecision, DuplexHistory, build, system_block
from covo_rl.duplex.stream_files import EVENTS, STEREO, write_stream
from covo_rl.duplex.targets import plan_stream
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.policy import Policy
from covo_rl.run.commands.data import app
from covo_rl.supervised.pretrain.built import StoredRow
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.document import BuildOptions, Vocabulary
from covo_rl.supervised.pretrain.duplex_reader import read_decisions, stream_problems, stream_runs
from covo_rl.supervised.pretrain.forward import Taught, packed_embeddings, packed_logps
from covo_rl.supervised.pretrain.freezing import train_parts
from covo_rl.supervised.pretrain.full_duplex import NOT_ANSWERED, build_full_duplex
from covo_rl.supervised.pretrain.inspection import show_row
from covo_rl.supervised.pretrain.mixture import Draw, Drawn
from covo_rl.supervised.pretrain.packing import PackedRow, collate_rows
from covo_rl.supervised.pretrain.stream import PackedStream, TaskData
from covo_rl.supervised.pretrain.stream_features import StreamFeatures
from covo_rl.supervised.pretrain.stream_rows import StreamStore
from covo_rl.supervised.pretrain.trainer import PretrainTrainer

SECTION = {"think": 20, "shift": 21, "break": 22, "silence_codes": [1, 2, 3, 4]}
CHUNK, RATE = 3840, 24_000


def duplex_family(seed=0):
    made = cases.tiny_family(seed)
    made.model.config.duplex = type(made.model.config)(**{**made.model.config.to_dict(), "duplex": SECTION}).duplex
    return made


def heard_at(chunk):
    """When the codes of a chunk begin to sound."""
    return (CHUNK * (chunk + 1) + 308) / RATE


def user(start, end, *inner):
    edges = [start, *inner, end]
    return DuplexTurn("user", start, end, "hello", tuple(zip(edges[::2], edges[1::2], strict=True)))


def reply(chunk, codes, text="", broken=None):
    """Its first codes are those of `chunk`; `broken`: the chunk of BREAK."""
    stop = None if broken is None else heard_at(broken)
    start = heard_at(chunk)
    return DuplexTurn("model", start, stop or start + 0.04 * len(codes), text, codes=tuple(codes), interrupted_at=stop)


def stream(name, chunks, turns, marks=()):
    made = DuplexStream(name, chunks * CHUNK / RATE, "en", tuple(sorted(turns, key=lambda t: t.start)), tuple(marks))
    return parse_stream(stream_content(made))


def worked():
    """The user stops at 0.70 s, in chunk 4; he cuts the reply at 1.92 s, in chunk 12; his turn is answered in 20."""
    cut = reply(6, [code % 32 for code in range(48)], "a dog", broken=15)  # 12 chunks, 9 of which are said
    barge = DuplexMark("barge_in", "user", 1.92, 2.9)
    return stream("w", 25, [user(0.1, 0.7), cut, user(1.92, 2.9), reply(21, [9, 8, 7, 6, 5, 4])], [barge])


def write(folder, made, seed=0):
    rng = np.random.default_rng(seed)
    write_stream(folder / made.id, made, rng.normal(0, 0.1, (round(made.seconds * RATE), 2)).clip(-1, 1))
    return folder


def store(folder, made, **options):
    return StreamStore(folder, Vocabulary.of(made), **options)


def drawn(made, row):
    document = build_full_duplex(row, Vocabulary.of(made), random.Random(0), BuildOptions())
    return Drawn(replace(document, task="full_duplex"), Draw("full_duplex", 0, 0), row)


def batch_of(made, rows):
    length = max(sum(map(len, row)) for row in rows)
    packed = [PackedRow(tuple(row), length) for row in rows]
    return collate_rows(packed, Vocabulary.of(made), made.pad_token_id, made.processor.feature_extractor)


@pytest.fixture(scope="module")
def family():
    return duplex_family()


@pytest.fixture(scope="module")
def rows(family, tmp_path_factory):
    """The worked example, and a short stream; every second is another noise."""
    folder = tmp_path_factory.mktemp("streams")
    short = stream("v", 9, [user(0.1, 0.5), reply(5, range(8), "a")])
    write(folder, worked(), 1)
    return list(store(write(folder, short, 2), family))  # in order of their names: v, w


def test_ids_and_labels_of_the_worked_example(family, rows):
    vocabulary = Vocabulary.of(family)
    document = drawn(family, rows[1]).document
    U, T, S, B, _ = vocabulary.slot, 20, 21, 22, vocabulary.text_end
    first, w = vocabulary.first_code, vocabulary.text("a dog")
    assert 2 <= len(w) <= 9
    said = [*w, *[_] * (9 - len(w))]
    expected = [U, T] * 5 + [U, S]  # 4: U T | 5: U S
    for k, token in enumerate(said):  # 6: U w0 cccc ... 14
        expected += [U, token, *(first + (4 * k + i) % 32 for i in range(4))]
    expected += [U, B] + [U, T] * 4 + [U, S]  # 15: U B | 16: U T ... | 20: U S
    expected += [U, _, *(first + code for code in (9, 8, 7, 6))]
    expected += [U, _, *(first + code for code in (5, 4, 3, 4))]  # silence is 1 2 3 4 in turn; codes 6 and 7 of it
    expected += [U, B, U, T]
    prefix = list(system_block(family, SPOKEN_SYSTEM, vocabulary.duplex))
    assert document.ids == [*prefix, *expected, vocabulary.audio_end]
    labels = [IGNORE if id == U else id for id in expected]
    assert document.labels == [*[IGNORE] * len(prefix), *labels, IGNORE]
    assert document.clips == (("w", 0, 100),) and document.streamed and document.complete
    assert document.supervised == 25 + 4 * 11  # a decision for each chunk, codes for those in which it speaks


def test_a_back_channel_and_a_long_pause_change_nothing_of_what_is_taught(family, tmp_path):
    vocabulary = Vocabulary.of(family)
    mark = DuplexMark("back_channel", "user", 1.95, 2.2)  # "mm" in chunks 12 and 13
    marked = stream("b", 20, [user(0.1, 0.7), reply(6, [1] * 40)], [mark])
    tokens = [decision.token for decision in plan_stream(marked, vocabulary.duplex, vocabulary.text)[1]]
    assert tokens == [20] * 5 + [21] + [vocabulary.text_end] * 10 + [22] + [20] * 3  # 16: B
    pause = stream("p", 40, [user(0.1, 5.0, 1.5, 4.9), reply(34, [1] * 8)])  # silent in chunks 10 to 29
    tokens = [decision.token for decision in plan_stream(pause, vocabulary.duplex, vocabulary.text)[1]]
    assert tokens[:34] == [20] * 33 + [21]


def test_a_reply_that_the_end_of_the_stream_cuts_is_not_complete(family, tmp_path):
    folder = write(tmp_path, replace(worked(), seconds=round(heard_at(22) + 0.08, 4)))  # in chunk 23
    document = drawn(family, store(folder, family)[0]).document
    assert not document.complete and document.clips == (("w", 0, 92),)
    assert read_decisions(document, Vocabulary.of(family))[-1].codes == (5, 4, 3, 4)  # BREAK would be in 23


def test_the_reader_gives_back_decisions_and_what_they_were_built_of(family, rows):
    vocabulary = Vocabulary.of(family)
    for row in rows:
        document = drawn(family, row).document
        decisions = read_decisions(document, vocabulary)
        assert decisions == plan_stream(row.stream, vocabulary.duplex, vocabulary.text)[1]
        features_CD = torch.zeros(len(decisions), 32)
        prefix = system_block(family, SPOKEN_SYSTEM, vocabulary.duplex)
        history = DuplexHistory(prefix, tuple(decisions), features_CD)
        assert list(build(history, vocabulary.duplex, ended=True).ids) == document.ids  # what a session holds
        assert stream_problems(document, vocabulary) == []
    runs = stream_runs(document, vocabulary)
    kinds = [(run.kind, run.chunk, len(run.decisions), run.reply) for run in runs[1:-1]]
    assert kinds == [("listen", 0, 5, None), ("shift", 5, 1, 0), ("reply", 6, 9, 0), ("break", 15, 1, 0),
                     ("listen", 16, 4, None), ("shift", 20, 1, 1), ("reply", 21, 2, 1), ("break", 23, 1, 1),
                     ("listen", 24, 1, None)]  # fmt: skip
    assert [run.end for run in runs[:-1]] == [run.start for run in runs[1:]] and runs[-1].end == len(document)


def test_the_reader_notices_what_breaks_the_rules(family, rows):
    vocabulary = Vocabulary.of(family)
    document = drawn(family, rows[1]).document
    start = document.ids.index(vocabulary.slot)
    changes = {
        "nobody chooses it": replace(document, labels=[*document.labels[:start], vocabulary.slot,
                                                       *document.labels[start + 1 :]]),
        "the model chooses it": replace(document, labels=[IGNORE] * len(document)),
        "25 chunks, and its clips": replace(document, clips=(("w", 0, 96),)),
        "THINK is not legal|legal: THINK, SHIFT": replace(document, ids=[*document.ids[: start + 1], 22,
                                                                         *document.ids[start + 2 :]]),
        "a system message, audio's start": replace(document, ids=document.ids[:-1], labels=document.labels[:-1]),
    }  # fmt: skip
    for message, changed in changes.items():
        problems = stream_problems(changed, vocabulary)
        assert any(part in problems[0] for part in message.split("|")), (message, problems)
    assert "no ids of full duplex" in stream_problems(document, replace(vocabulary, duplex=None))[0]


@torch.no_grad()
def test_packed_streams_have_the_log_probs_of_single_ones(family, rows):
    policy = Policy(family)
    policy.eval()
    first, second = (drawn(family, row) for row in rows)
    documents = [*cases.mixed(family)[:3], first, second, first]
    single = []
    for item in documents:
        batch = batch_of(family, [[item]])
        single.append(packed_logps(policy, batch, Taught.of(batch)))
    batch = batch_of(family, [documents[:4], documents[4:]])
    assert len(batch.streams) == 2 and len(batch.waves) == len(batch.streams) + len(
        batch.audio["segment_clips"].unique()
    )
    packed = packed_logps(policy, batch, Taught.of(batch))
    torch.testing.assert_close(packed, torch.cat(single), atol=1e-5, rtol=0)


@torch.no_grad()
def test_slots_hold_the_features_of_the_streaming_encoder_on_the_users_channel(family, rows):
    policy = Policy(family)
    policy.eval()
    batch = batch_of(family, [[drawn(family, rows[1])]])
    embeds_LD = packed_embeddings(policy, batch)[0]
    slots_L = batch.input_ids[0] == Vocabulary.of(family).slot
    wave_T = rows[1].wave()
    expected_KD = StreamingEncoder.of(family.model).offline_features(wave_T)
    torch.testing.assert_close(embeds_LD[slots_L], expected_KD, atol=1e-6, rtol=0)
    clip = family.clip_features(wave_T, RATE)
    assert (family.encode([clip])[0] - expected_KD).abs().max() > 1e-3  # the offline encoder hears it otherwise


def test_a_recording_that_is_heard_both_ways_is_encoded_both_ways(family, rows):
    """The same samples as a clip of ASR and as a stream are two entries, each with its own encoder."""
    policy = Policy(family)
    row = cases.speech_row(0, 36)
    mine = replace(row, clip=replace(row.clip, array=rows[0].wave()), codes=np.zeros(36, int))
    batch = batch_of(family, [[cases.drawn(family, "asr", mine), drawn(family, rows[0])]])
    assert len(batch.waves) == 2 and np.array_equal(*batch.waves) and list(batch.streams) == [1]
    assert torch.isfinite(packed_logps(policy, batch, Taught.of(batch))).all()


@pytest.mark.parametrize("parts", [["audio_adapter"], ["encoder", "audio_adapter"]])
def test_a_frozen_encoder_hears_a_stream_once_and_what_trains_gets_its_gradient(rows, parts):
    made = duplex_family()
    train_parts(made, parts)
    policy, batch = Policy(made), batch_of(made, [[drawn(made, rows[0])]])
    policy.train()

    def gradients(heard):
        policy.zero_grad(set_to_none=True)
        packed_logps(policy, batch, Taught.of(batch), heard).sum().backward()
        return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}

    heard = StreamFeatures(policy)
    first, again, small = gradients(heard), gradients(heard), StreamFeatures(policy, memory_mb=0)
    assert heard.encoded == (1 if parts == ["audio_adapter"] else 2)
    assert {name.split(".")[0] for name in first} == set(parts)
    assert max(float(gradient.abs().max()) for gradient in first.values()) > 0
    for found in (again, gradients(small), gradients(small)):
        for name, gradient in first.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert small.encoded == 2


def test_updates_teach_decisions_text_and_codes_of_streams_beside_other_tasks(rows):
    options = read_pretrain(
        None, {"model": "m", "tasks": {"asr": {}}, "length": 400, "learning_rate": 3e-3, "steps": 9}
    )
    trainer = PretrainTrainer(options, duplex_family(), None, Accelerator(cpu=True))
    batch = batch_of(
        trainer.family, [[*cases.mixed(trainer.family)[:2], *(drawn(trainer.family, row) for row in rows)]]
    )
    lines = [trainer.update([batch]) for _ in range(5)]
    assert trainer.heard.encoded == 2  # of 5 updates with two streams: the encoder is frozen
    for name in ("loss/full_duplex/text", "loss/full_duplex/codes", "loss/asr"):
        assert lines[-1][name] < lines[0][name] - 0.1
    assert trainer.measure([batch])["eval_loss/full_duplex"] < lines[0]["loss/full_duplex"]
    assert trainer.changed_parts() == []


def test_ids_of_streams_count_by_what_they_are_and_those_of_other_tasks_one(rows):
    options = {"model": "m", "tasks": {"asr": {}}, "length": 400, "duplex_weights": {"decision": 4, "code": 0.5}}
    norms = []
    for given in (options, {**options, "duplex_weights": None}):
        trainer = PretrainTrainer(read_pretrain(None, given), duplex_family(), None, Accelerator(cpu=True))
        batch = batch_of(trainer.family, [[*cases.mixed(trainer.family)[:1], drawn(trainer.family, rows[0])]])
        norms.append(trainer.update([batch])["grad_norm"])
    policy, taught = Policy(duplex_family()), Taught.of(batch)
    train_parts(policy.family, read_pretrain(None, options).train_parts)
    of_stream_M = taught.task == batch.tasks.index("full_duplex")
    weight_M = torch.ones(len(of_stream_M))
    weight_M[of_stream_M & (taught.targets >= Vocabulary.of(policy.family).first_code)] = 0.5
    weight_M[of_stream_M & (taught.targets >= 20) & (taught.targets <= 22)] = 4
    assert 0 < int((weight_M == 1).sum()) < int((weight_M != 1).sum())
    (-(weight_M * packed_logps(policy, batch, taught)).sum() / weight_M.sum()).backward()
    grads = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
    assert norms[0] == pytest.approx(float(torch.stack(grads).norm()), rel=1e-4)
    assert abs(norms[1] / norms[0] - 1) > 0.01
    with pytest.raises(ConfigError, match="expected numbers above 0, of decision, text, code"):
        read_pretrain(None, {**options, "duplex_weights": {"think": 0}})


# -- rows ------------------------------------------------------------------------------------------------------------


def stream_of(made, folder, length=400, **tasks):
    data = {"full_duplex": TaskData(5, str(folder)), **tasks}
    return PackedStream(data, Vocabulary.of(made), seed=0, length=length, pad_id=0)


def test_a_model_without_the_ids_is_refused_before_rows_are_read(rows):
    with pytest.raises(ConfigError, match=r"full_duplex: the model says no ids .*`covo-rl duplex prepare"):
        stream_of(cases.tiny_family(), rows[0].folder.parent)


def test_everything_that_is_wrong_with_streams_is_said_at_once(family, tmp_path):
    made = worked()
    silent = tuple(replace(turn, codes=None) for turn in made.turns)
    wrong = {
        "a": replace(made, id="a", turns=silent),
        "b": replace(made, id="b", turns=(*made.turns[:1], replace(made.turns[1], codes=(99,) * 48), *made.turns[2:])),
        "c": replace(made, id="c"),
        "d": replace(made, id="d"),
    }
    for each in wrong.values():
        write(tmp_path, each)
    (tmp_path / "c" / STEREO).unlink()
    events = json.loads((tmp_path / "d" / EVENTS).read_text())
    (tmp_path / "d" / EVENTS).write_text(json.dumps({**events, "id": "a", "surprise": 1}))
    with pytest.raises(DataError) as error:
        store(tmp_path, family)
    said = {problem.row_id.rsplit("/", 1)[-1]: problem.what for problem in error.value.problems}
    assert "events.json has no codes of it: make the streams from dialogues that `covo-rl speech encode`" in said["a"]
    assert said["b"] == "reply 0: code 99; there are 0 to 31" and said["c"] == "it has no stereo.wav"
    assert "surprise" in said["d"]


def test_where_there_are_no_streams_it_says_where_they_would_be(family, tmp_path):
    with pytest.raises(DataError, match="no such folder or pattern"):
        store(tmp_path / "sft", family)
    write(tmp_path / "sft", worked())
    with pytest.raises(DataError, match=r"no streams: expected folders that hold stereo.wav .* OUT/sft"):
        store(tmp_path, family)
    assert len(store(f"{tmp_path}/*", family)) == len(store([str(tmp_path / "sft")], family)) == 1


def test_text_that_outlasts_its_codes_gets_silence_and_is_counted_and_much_of_it_is_an_error(family, tmp_path):
    long = stream("long", 20, [user(0.1, 0.5), reply(5, [7] * 4, "the bell")])
    vocabulary = Vocabulary.of(family)
    count = len(vocabulary.text("the bell"))
    assert count >= 2
    spoken = [decision for decision in plan_stream(long, vocabulary.duplex, vocabulary.text)[1] if decision.codes]
    assert [decision.token for decision in spoken] == vocabulary.text("the bell")
    assert spoken[1] == ChunkDecision(spoken[1].token, (1, 2, 3, 4))  # codes 4 to 7 of silence
    with pytest.raises(DataError, match="the text of 1 of 1 replies outlasts their codes, over 5%"):
        store(write(tmp_path, long), family)
    for number in range(10):
        write(tmp_path, replace(worked(), id=f"w{number}"))
    rows = stream_of(family, tmp_path)
    assert rows.padded_replies() == [f"{tmp_path}: the text of 1 of 21 replies outlasts their codes: silence follows"]


def test_streams_that_make_no_document_are_counted_by_reason(family, tmp_path):
    """One is longer than a row, and is not cut; one is unanswered, as those for RL are."""
    write(tmp_path, stream("short", 9, [user(0.1, 0.5), reply(5, range(8))]))
    write(tmp_path, stream("long", 60, [user(0.1, 0.5), reply(5, range(8))]))
    write(tmp_path, stream("open", 9, [user(0.1, 0.5)]))
    mixture = stream_of(family, tmp_path, length=130).packer().mixture
    assert {mixture.draw().unit.id for _ in range(3)} == {"short"}  # of every epoch
    skipped = mixture.states["full_duplex"].skipped
    assert {reason: (entry["rows"], entry["first"]) for reason, entry in skipped.items()} == {
        "longer than 130 positions": (1, ["long"]), NOT_ANSWERED: (1, ["open"])
    }  # fmt: skip


def test_events_that_change_and_recordings_that_do_not_fit_are_named(family, tmp_path):
    folder = write(tmp_path, worked())
    rows = store(folder, family)
    assert rows.heard_problems() == [] and rows.heard_problems(1, 2) == []
    write(folder, replace(worked(), seconds=25 * CHUNK / RATE + 1.0))
    kept = rows.fingerprint
    with pytest.raises(DataError, match=r"w/events.json.*\n.*changed since"):
        rows[0]
    again = store(folder, family)
    assert again.fingerprint != kept
    data = (folder / "w" / STEREO).read_bytes()
    (folder / "w" / STEREO).write_bytes(data[:-400])
    (problem,) = again.heard_problems()
    assert "truncated" in problem.what and problem.row_id == "w"
    with pytest.raises(DataError, match="its codes are of tokenizer None, not of x"):
        store(folder, family, tokenizer="x")


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(family, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("duplex")
    family.model.save_pretrained(folder / "model")
    family.processor.save_pretrained(folder / "model")
    options = {"model": str(folder / "model"), "duplex_data": str(rows[0].folder.parent), "length": 400,
               "tasks": {"full_duplex": {}}}  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(options))
    return folder / "c.yaml"


def test_build_writes_streams_and_inspect_shows_them(config, family, tmp_path):
    built = tmp_path / "built"
    run = CliRunner().invoke(app, ["build", "--config", str(config), "--output", str(built), "--rows", "1"])
    assert run.exit_code == 0, run.output
    shown = show_row(str(built))
    assert not any(document.problems for document in shown.documents)
    document = next(document for document in shown.documents if document.rows[0][0] == "w")
    listens, shift, says = document.spans[1:4]
    assert [span.kind for span in document.spans[1:5]] == ["listen", "shift", "reply", "break"]
    assert listens.content == "5 chunks from 0, 0.00 to 0.80 s" and shift.content == "1 chunk from 5, 0.80 to 0.96 s"
    ids = len(Vocabulary.of(family).text("a dog"))
    codes = "36 codes: 0 1 2 3 4 5 6 7 8 9 10 11 ..."
    assert says.content == f"9 chunks from 6, 0.96 to 2.40 s; {codes}; {ids} ids of text: a dog"
    assert (says.start - document.spans[1].start, says.end - says.start, says.fragment) == (12, 9 * 6, 0)
    line = json.loads((built / "rows-00000.jsonl").read_text().splitlines()[0])
    stored = StoredRow.read(line)
    assert all(document.streamed for document in stored.documents)
    vocabulary = Vocabulary.of(family)
    assert read_decisions(stored.documents[0], vocabulary)[0] == ChunkDecision(20)
    first = stored.documents[0].ids.index(vocabulary.slot)
    line["labels"][first] = vocabulary.slot  # the user's chunk is taught
    (built / "rows-00000.jsonl").write_text(json.dumps(line) + "\n")
    broken = CliRunner().invoke(app, ["inspect", str(built)])
    assert broken.exit_code == 1 and "listening" in broken.output and "nobody chooses" in broken.output


def test_build_refuses_a_model_without_the_ids_and_writes_nothing(config, tmp_path):
    out = tmp_path / "built"
    arguments = ["build", "--config", str(config), "--model", "builtin:tiny_spoken", "--output", str(out)]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 2 and "covo-rl duplex prepare" in run.output and not out.exists()
