"""Our accuracy rule against five others on tests/fixtures/tricky_answers.jsonl; writes the table of docs/rewards.md.

    python tests/accuracy_rules.py          (prints it)
    python tests/accuracy_rules.py --write  (replaces it in docs/rewards.md)

The verdicts of the maths verifier are recorded in the file: math-verify 0.9.0, `verify(parse(gold), parse(answer))`.
"""

import json
import re
import sys
from pathlib import Path

from covo_rl.evaluate.sets import token_set_match
from covo_rl.rewards.rules.answers import grade

CASES = Path(__file__).parent / "fixtures" / "tricky_answers.jsonl"
DOCS = Path(__file__).parent.parent / "docs" / "rewards.md"
BEGIN, END = "<!-- accuracy-table -->", "<!-- /accuracy-table -->"


def cases():
    return [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]


def ours(case):
    return grade(case["answer"].strip() or None, case["gold"], case["choices"]) == 1.0


def exact(case):
    return case["answer"] == case["gold"]


def substring(case):
    answer, gold = case["answer"].strip().lower(), case["gold"].lower()
    return answer in gold or gold in answer


def mmau(case):
    return bool(token_set_match(case["answer"], case["choices"], case["gold"]))


def letter_search(case):
    found = re.search(r"\b([A-H])\b", case["answer"])
    index = ord(found.group(1)) - ord("A") if found else -1
    return 0 <= index < len(case["choices"]) and case["choices"][index] == case["gold"]


def maths(case):
    return case["math_verify"]


RULES = {
    "ours": ours,
    "exact": exact,
    "substring": substring,
    "MMAU official": mmau,
    "letter search": letter_search,
    "math-verify 0.9.0": maths,
}


def errors(rule):
    """(wrong answers paid for, right answers refused)."""
    verdicts = [(rule(case), case["right"]) for case in cases()]
    return sum(v and not right for v, right in verdicts), sum(right and not v for v, right in verdicts)


def table():
    def code(text):
        return (
            "`" + json.dumps(text, ensure_ascii=not text.isprintable())[1:-1].replace("|", "\\|") + "`"
            if text
            else "(empty)"
        )

    lines = [
        "| answer | right answer | among | trap | should be | " + " | ".join(RULES) + " |",
        "|---" * (5 + len(RULES)) + "|",
    ]
    for case in cases():
        marks = ["1" if rule(case) else "0" for rule in RULES.values()]
        want = "1" if case["right"] else "0"
        shown = [mark if mark == want else f"**{mark}**" for mark in marks]
        among = ", ".join(code(choice) for choice in case["choices"]) or "open"
        cells = [code(case["answer"]), code(case["gold"]), among, case["trap"], want, *shown]
        lines.append("| " + " | ".join(cells) + " |")
    paid, refused = zip(*(errors(rule) for rule in RULES.values()), strict=True)
    lines.append("| | | | **wrong answers paid for** | 0 | " + " | ".join(map(str, paid)) + " |")
    lines.append("| | | | **right answers refused** | 0 | " + " | ".join(map(str, refused)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        text = DOCS.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    else:
        print(table())
