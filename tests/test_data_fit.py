"""Over-long clips are chunked or cropped with a note each, never silently; held-out rows share no clip."""

import numpy as np
import pytest

from covo_rl.audio import decode
from covo_rl.run.questions import fit_clips, hold_out
from covo_rl.types import Clip, Example


def row(name, seconds, rate=8000):
    ramp = np.linspace(-0.5, 0.5, int(seconds * rate), dtype=np.float32)
    return Example(id=name, clips=(Clip(array=ramp, sampling_rate=rate),), question="?")


def test_chunks_hold_every_sample_once_and_none_is_too_long():
    # 2.5 s in clips of at most 1 s: three equal pieces of 20,000 / 3 samples
    (fitted,), notes = fit_clips([row("a", 2.5)], 1.0, "chunk")
    assert [len(clip.array) for clip in fitted.clips] == [6667, 6667, 6666]
    whole = np.concatenate([decode(clip)[0] for clip in fitted.clips])
    np.testing.assert_array_equal(whole, row("a", 2.5).clips[0].array)
    assert notes == ["row a: <array>: 2.50 s long, cut into 3 clips"]


def test_crop_keeps_the_start_and_says_so():
    (fitted,), notes = fit_clips([row("a", 2.5)], 1.0, "crop")
    np.testing.assert_array_equal(fitted.clips[0].array, row("a", 2.5).clips[0].array[:8000])
    assert notes == ["row a: <array>: 2.50 s long, cropped to 1 s"]


@pytest.mark.parametrize("mode", ["chunk", "crop", "error"])
def test_a_clip_that_fits_is_left_alone(mode):
    example = row("a", 1.0)
    assert fit_clips([example], 1.0, mode) == ([example], [])


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'shrink': there are error, chunk, crop"):
        fit_clips([], 1.0, "shrink")


def test_rows_of_one_clip_stay_on_one_side_whatever_the_order():
    rows = [Example(id=f"{c}{q}", clips=(Clip(path=f"clip{c}.wav"),), question="?") for c in range(200) for q in "ab"]
    train, held_out = hold_out(rows, 0.2)
    assert {e.clips[0].path for e in train}.isdisjoint(e.clips[0].path for e in held_out)
    assert 50 < len(held_out) < 110  # 80 expected
    again, _ = hold_out(rows[::-1], 0.2)
    assert {e.id for e in again} == {e.id for e in train}
