"""The five criteria of R_thinking, decided without a judge. Each is a documented, deterministic stand-in.

    soundness            the reasoning commits to the answer that is given, and to no other
    factual_correctness  every claim about the clip agrees with the row's facts, and there is at least one;
                         rows without facts: the *grounding proxy*, evidence that is heard and not from the question
    error_identification nothing wrong is left standing: the last claim about every fact is true, and the option that
                         the reasoning ends on is the right one
    coherence            no degenerate text
    conciseness          within the length window, without sentences said twice, and with some evidence or conclusion

Degenerate text (see degenerate.py) fails all five.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from covo_rl.rewards.rules.conclusion import concluded, concluded_text, supports
from covo_rl.rewards.rules.degenerate import flaw, own_words, repeated_share, words
from covo_rl.rewards.rules.facts import Claim, claims
from covo_rl.rewards.rules.options import find_gold

CRITERIA = ("soundness", "factual_correctness", "error_identification", "coherence", "conciseness")
MIN_WORDS, MAX_WORDS = 4, 300
_HEARING = re.compile(
    r"\b(?:hear|heard|hearing|listen\w*|sound\w*|audio|clip|recording|voice\w*|nois\w+|tone\w*|pitch\w*|note\w*|beat\w*|"
    r"rhythm\w*|loud\w*|quiet\w*|soft\w*|melod\w+|speak\w*|said|says|sings?|singing|instrument\w*|ring\w*|music\w*)\b",
    re.IGNORECASE,
)


def judge_free(
    think: str | None, answer: str | None, *, question: str = "", choices: Sequence[str] = (), gold: Any = None,
    facts: Mapping[str, Any] | None = None, lexicon: Mapping[str, Any] | None = None,
    min_words: int = MIN_WORDS, max_words: int = MAX_WORDS,
) -> dict[str, bool]:  # fmt: skip
    """Criterion -> met, for one completion."""
    options = ", ".join(choices)
    if not think or flaw(think, question, options):
        return dict.fromkeys(CRITERIA, False)
    said = claims(think, facts, lexicon)
    support = supports(think, answer, choices, question)
    evidence = any(claim.true and not claim.denied for claim in said)
    grounded = evidence if facts else _grounded(think, question, options)
    committed = support is not None
    return {
        "soundness": bool(answer) and (support is True or (not committed and grounded)),
        "factual_correctness": grounded and all(claim.true for claim in said),
        "error_identification": (committed or grounded) and _nothing_wrong_left(think, said, choices, gold, question),
        "coherence": grounded or committed or own_words(think, question, options) >= 3,
        "conciseness": (committed or grounded) and _concise(think, min_words, max_words),
    }


def _grounded(think: str, question: str, options: str) -> bool:
    """The grounding proxy: it speaks of hearing, and brings three content words of its own."""
    return bool(_HEARING.search(think[:2000])) and own_words(think, question, options) >= 3


def _nothing_wrong_left(think: str, said: Sequence[Claim], choices: Sequence[str], gold: Any, question: str) -> bool:
    last = {claim.fact: claim for claim in said if not claim.denied}
    if not all(claim.true for claim in last.values()):
        return False
    if choices:
        held = concluded(think, tuple(choices), question)
        right = find_gold(gold, choices)
        return held is None or right is None or held == right
    return gold is None or concluded_text(think, str(gold)) is not False


def _concise(think: str, min_words: int, max_words: int) -> bool:
    return min_words <= len(words(think)) <= max_words and repeated_share(think) <= 0.25
