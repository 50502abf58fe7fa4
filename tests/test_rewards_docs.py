"""The plugin that docs/rewards.md and README.md print runs exactly as printed."""

import re
from pathlib import Path

import pytest

from covo_rl.config import RewardConfig
from covo_rl.rewards import lint, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.worker import close

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- reward-plugin -->\s*```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["docs/rewards.md", "README.md"])
def test_the_printed_plugin_runs(page, tmp_path, monkeypatch):
    printed = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert printed or page == "README.md"
    monkeypatch.chdir(tmp_path)
    for code in printed:
        assert len(code.strip().splitlines()) <= 10
        (tmp_path / "brevity.py").write_text(code)
        assert lint(["./brevity.py:brevity"], full=True) == []
        texts = [f"<think>{'word ' * n}</think><answer>x</answer>" for n in (30, 90, 200)] + ["x"]
        group = group_from_completions(example_from_row({"question": "?", "answer": "x"}), texts)
        table = score([group], RewardConfig(rewards="accuracy,./brevity.py:brevity=0.5"))
        assert table.rewards_PGR[0, :, 1].tolist() == [1.0, 0.5, 0.0, 0.0]
        assert table.rewards_PG[0].tolist() == [1.5, 1.25, 1.0, 0.0]
    close()
