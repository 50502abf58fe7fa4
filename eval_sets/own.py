"""Rows of one's own, in any schema that training reads: `covo-rl eval --set own --data rows.json`. Scored as MMAU is.

A manifest file instead of `own` gives it a name, another rule, breakdown columns and prompts (docs/evaluation.md).
"""

from covo_rl.evaluate.sets import EvalSet

SETS = {"own": EvalSet(name="own", title="rows of one's own", how_to_get="give your rows", fields={})}
