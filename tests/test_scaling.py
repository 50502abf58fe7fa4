"""The table of docs/scaling.md, by the lines below it."""

import math
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def sampling_s(rows: float) -> float:
    """Seconds until the longest of `rows` completions is done: 1,024 tokens of max(7 ms, rows left / 10,000 s)."""
    slow = 0.007 * 10_000
    if rows <= slow:
        return 1024 * 0.007
    return (rows - slow) * 300 / 10_000 + (1024 - 300 * math.log(rows / slow)) * 0.007


def test_the_formula_of_sampling_is_the_sum_over_tokens():
    for rows in (64, 128, 171, 341):
        tokens = sum(max(0.007, rows * math.exp(-n / 300) / 10_000) for n in range(1024))
        assert sampling_s(rows) == pytest.approx(tokens, rel=5e-3)


TABLE = re.findall(r"^\| (\d+) \| (\d+) / (\d+), (in turn|one ahead) \| ([\d,]+) \| (.*) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(row[:5]))
def test_the_capacity_table_is_what_its_formulas_give(row):
    gpus, engines, trainers, how, prompts, figures = row
    assert int(gpus) in (int(engines), int(engines) + int(trainers))
    groups, rows = int(prompts.replace(",", "")), int(prompts.replace(",", "")) * 8 / int(engines)
    positions = groups / int(trainers) * (300 + 8 * 300)
    encoding = groups / int(trainers) * 2 * 0.64e9 * 1500 / 4e14
    old, update = (flops * 7.6e9 * positions / 4e14 for flops in (2, 6))
    sampling, training = sampling_s(rows), encoding + old + update
    step = sampling + training + 2.5 if how == "in turn" else max(sampling, training) + 1
    idle = "-" if how == "in turn" else f"{1 - (training + 1) / step:.0%}".replace("%", " %")
    rate = groups * 8 / step
    made = f"{rows:.0f} | {sampling:.1f} s | {old:.1f} s | {update:.1f} s | {step:.1f} s | {rate:.0f} | {idle}"
    assert encoding < 0.2 and made == figures


def test_the_page_has_a_table_and_commands_for_1_8_and_64_gpus():
    assert {row[0] for row in TABLE} == {"1", "8", "64"} and len(TABLE) == 8
