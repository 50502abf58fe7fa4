"""docs/data.md: every layout is tried as it is printed there."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from covo_rl.data import SCHEMAS, load_examples

TEXT = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"^`([\w/.]+)`(?:, with `--columns ([^`]+)`)?:\n\n```\w+\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE
)
ROW = re.compile(r"^\| [^|]+ \| `([\w/.]+)` \|", re.MULTILINE)


@pytest.mark.parametrize(("name", "columns", "content"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_every_layout_of_the_documentation_says_the_same(tmp_path, name, columns, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    soundfile.write(path.parent / "a.wav", np.zeros(1_600), 16_000)
    source = path.parent if path.name.startswith("metadata") else path
    (example,) = load_examples(source, columns=columns or None)
    assert (example.id, example.question, example.choices, example.answer) == (
        "r1", "Which animal?", ("dog", "cat"), "cat",
    )  # fmt: skip
    assert [clip.path for clip in example.clips] == [str(path.parent / "a.wav")]
    assert len(content.splitlines()) <= 3


def test_the_table_has_an_example_of_every_layout():
    assert ROW.findall(TEXT) == [name for name, _, _ in EXAMPLES] and len(EXAMPLES) == 14
    for name in SCHEMAS:
        assert f"(`{name}`)" in TEXT
