"""Real time by a clock that only sleeping and computing move: every time is known."""

import json

import numpy as np
import pytest
import soundfile
from duplex_cases import SAMPLED, FixedFeatures, duplex_family
from speaking_cases import small_decoder

from covo_rl.cli import main
from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.realtime import LiveRun, WallClock, paced, rehearse
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.stream_files import read_stream
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.run.commands import duplex

HEARS, DECODES = 0.03, 0.02  # seconds of a chunk's encoder, and of a piece of sound
BLOCK = 480  # 20 ms: a chunk's look-ahead of 308 samples is there with the next block
#: after a chunk's end, until its decision is known: one block, and the encoder
DECIDED = BLOCK / 24_000 + HEARS
VOICE = small_decoder()
#: what the vocoder keeps back of a piece until it has heard the next one
KEPT = VOICE.wavegan.future_frames * 0.01
#: what a reply of the script is cut to: BREAK is known in the middle of its first piece, or the player waits by then
FIRST = 0.80 + DECIDED + DECODES
CUT = min(0.96 + DECIDED, FIRST + 0.16 - KEPT)


class SlowFeatures(FixedFeatures):
    def _until(self, end):
        new = super()._until(end)
        FakeClock.latest.time += HEARS * len(new)
        return new


class SlowVoice(Voice):
    def stream(self, codes):
        for piece in super().stream(codes):
            FakeClock.latest.time += DECODES
            yield piece


class FakeClock:
    latest: "FakeClock"

    def __init__(self):
        self.time, FakeClock.latest = 0.0, self

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


@pytest.fixture(autouse=True)
def clocks(monkeypatch):
    FakeClock()
    monkeypatch.setattr("covo_rl.duplex.realtime.WallClock", FakeClock)
    monkeypatch.setattr("covo_rl.duplex.session.perf_counter", lambda: FakeClock.latest.time)


FAMILY, IDS = duplex_family()
#: SHIFT in chunk 2, text in 3 and 4
SCRIPT = [ChunkDecision(token) for token in (IDS.think, IDS.think, IDS.shift, 40, 40, IDS.break_, IDS.think, IDS.think)]


def scripted(**options):
    live = DuplexSession(FAMILY, SlowFeatures(), text=SAMPLED, codes=SAMPLED, **options)
    live.follow(SCRIPT)
    return live


def blocks(chunks):
    return np.zeros((chunks * CHUNK_SAMPLES // BLOCK, BLOCK), np.float32)


def test_no_block_comes_before_it_was_spoken():
    clock = FakeClock()
    times = []
    for number, _ in enumerate(paced(blocks(1), clock)):  # type: ignore[arg-type]
        times.append(clock.now())
        clock.time += 0.05 if number == 2 else 0.0  # busy for longer than two blocks last
    assert times == pytest.approx([0.02, 0.04, 0.06, 0.11, 0.11, 0.12, 0.14, 0.16])


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_reply_sounds_as_its_blocks_are_decoded(interrupted):
    """The first piece is decoded with the codes of chunk 4, known at 0.85 s, the last with BREAK, known at 1.01 s."""
    session, clock = scripted(), FakeClock()
    live = LiveRun(session, SlowVoice(VOICE), clock, interrupted=lambda chunk: interrupted)  # type: ignore[arg-type]
    live.listen(paced(blocks(8), clock))  # type: ignore[arg-type]
    assert live.late == pytest.approx([DECIDED] * 7 + [HEARS])  # of the last chunk nothing more is to come
    ((start, wave_T),) = live.sounds
    assert start == pytest.approx(FIRST * 24_000, abs=1)
    # the second piece comes a chunk later, when all but what was kept back of the first has sounded
    assert live.gaps == pytest.approx(KEPT, abs=1e-4)
    length = CUT - FIRST if interrupted else 8 * 0.04
    assert len(wave_T) == pytest.approx(length * 24_000, abs=2)
    costs = {cost.chunk: cost for cost in live.costs}
    assert [costs[k].encoder for k in range(8)] == pytest.approx([HEARS] * 8)
    assert [costs[k].vocoder for k in (3, 4, 5, 6)] == pytest.approx([0, DECODES, DECODES, 0])
    assert live.record()["heard"] == [start / 24_000]


def test_a_file_in_real_time_from_end_to_end(tmp_path, monkeypatch, capsys):
    def rehearsed(session, *options):
        """As it is; then the session forgets what it was to decide, and is told again."""
        costs = rehearse(session, *options)
        session.follow(SCRIPT)
        return costs

    monkeypatch.setattr(duplex, "open_session", lambda *_, **options: scripted(**options))
    monkeypatch.setattr("covo_rl.speech.voices.open_voice", lambda *_, **__: SlowVoice(VOICE))
    monkeypatch.setattr("covo_rl.duplex.realtime.rehearse", rehearsed)
    rng = np.random.default_rng(0)
    loud_C = np.repeat([0.1, 0.001, 0.001, 0.001, 0.1, 0.1, 0.001, 0.001], CHUNK_SAMPLES)  # he speaks at the BREAK
    soundfile.write(tmp_path / "a.wav", loud_C * rng.standard_normal(len(loud_C)), 24_000)
    with pytest.raises(SystemExit) as stopped:
        main(["duplex", "run", "--model", "m", "--audio", str(tmp_path / "a.wav"), "--output", str(tmp_path / "out"),
              "--realtime", "--max-turn-seconds", "0.48"])  # fmt: skip
    assert not stopped.value.code and "0.48 s  begins to speak" in capsys.readouterr().out
    stream, both_T2 = read_stream(tmp_path / "out")
    (turn,) = stream.turns
    assert turn.start == pytest.approx(FIRST, abs=1e-3) and turn.interrupted_at == turn.end
    assert turn.end == pytest.approx(CUT, abs=1e-3)
    spoken = both_T2[:, 1].nonzero()[0]
    assert spoken[0] >= round(FIRST * 24_000) and spoken[-1] < round(turn.end * 24_000)
    latency = json.loads((tmp_path / "out" / "session.json").read_text())["latency"]
    assert latency["late"]["median"] == pytest.approx(DECIDED) and latency["heard"] == pytest.approx([FIRST], abs=1e-3)
    assert latency["real_time_factors"]["speaking"]["max"] == pytest.approx((HEARS + DECODES) / 0.16)


def test_the_real_clock_moves_by_itself():
    clock = WallClock()
    clock.sleep(0.01)
    assert clock.now() >= 0.01
