"""The order of rows: complete, seeded, resumable, independent of the number of ranks."""

import pytest

from covo_rl.train.sampler import PromptSampler, share
from covo_rl.types import Example

ROWS = [Example(id=str(i), clips=(), question="?") for i in range(5)]


def ids(examples):
    return [e.id for e in examples]


def test_every_row_once_per_epoch():
    sampler = PromptSampler(ROWS, seed=1)
    assert sorted(ids(sampler.take(5))) == list("01234")
    assert sorted(ids(sampler.take(5))) == list("01234")


def test_resume_across_an_epoch_boundary_gives_the_same_rows():
    whole = PromptSampler(ROWS, seed=1)
    whole.take(7)
    resumed = PromptSampler(ROWS, seed=1)
    resumed.load_state_dict(whole.state_dict())
    assert ids(resumed.take(9)) == ids(whole.take(9))


def test_state_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match="5 rows and seed 1, this run has 4 rows"):
        PromptSampler(ROWS[:4], seed=1).load_state_dict(PromptSampler(ROWS, seed=1).state_dict())


def test_shares_are_whole_and_even():
    # 5 rows on 2 ranks: 3 and 2; on 7 ranks two ranks have none
    assert [share("abcde", r, 2) for r in range(2)] == [["a", "b", "c"], ["d", "e"]]
    assert [len(share("abcde", r, 7)) for r in range(7)] == [1, 1, 1, 1, 1, 0, 0]
