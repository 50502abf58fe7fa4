"""R_pattern: the share of blocks of a spoken reply that keep 5:15, five text ids and then fifteen codes of speech.

    covo-rl train --model MODEL --data rows.jsonl --rewards spoken,pattern    (it needs ids, which no log keeps)

A block is a run of text ids and the codes behind it. Every block has exactly 5 and 15 but the last, in which the text
ends: up to 5 text ids, and then all codes that remain. So 5+15, 5+15, 2+25 keeps three of three; 5+15, 4+15, 2+25 two.
A reply that begins with codes, or ends without them, loses that block; one that the length limit cut may end anywhere.
Fewer than 3 codes are no speech: 0. A row whose column `speak` is false asks for none: None.
"""

import re
from itertools import groupby

from covo_rl.speech.replies import score_silence
from covo_rl.types import shown


def pattern(
    completions, completion_ids, completion_codes, stop_reason=None, speak=None, block="5:15", log_extra=None,
    log_missing=None, **kwargs,
):  # fmt: skip
    """
    >>> ids = [*range(5), *range(100, 115), 5, 6, *range(115, 140)]
    >>> pattern(["seven"], completion_ids=[ids], completion_codes=[list(range(40))])
    [1.0]
    """
    if not (sizes := re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", str(block))):
        raise ValueError(f"block {block!r:.40}: write TEXT:CODES, the ids of each in a block, such as 5:15")
    text, codes = map(int, sizes.groups())
    scores, forms = score_silence(completion_codes, speak, log_missing), []
    reasons = stop_reason or ["stop"] * len(completions)
    for i, (ids, spoken, reason) in enumerate(zip(completion_ids, completion_codes, reasons, strict=True)):
        blocks = [] if i in scores else _blocks(ids, spoken, reason == "stop")
        kept = sum(block == (text, codes) for block in blocks[:-1])
        kept += sum(0 < texts <= text and (said > 0 or reason == "length") for texts, said in blocks[-1:])
        scores.setdefault(i, kept / max(len(blocks), 1))
        forms.append(", ".join(f"{texts}+{said}" for texts, said in blocks))
    if log_extra:
        log_extra("pattern_reason", forms)
    return [scores[i] for i in range(len(forms))]


def _blocks(ids, codes, ended):
    """(text ids, codes) of every block, without the end token. Codes are the last ids of a vocabulary, in order.

    Raises ValueError where these codes are not the ids' own.
    """
    first = max(ids, default=0) - max(codes)
    if [i - first for i in ids if i >= first] != list(codes):
        raise ValueError(f"pattern reads a reply's ids in `completion_ids`: these {len(ids)} do not hold the reply's "
                         f"{len(codes)} codes, {shown(list(codes[:5]))} ...")  # fmt: skip
    kinds = [bool(i >= first) for i in ids]
    runs = [(is_code, len(list(run))) for is_code, run in groupby(kinds[: len(kinds) - (ended and not kinds[-1])])]
    counts = [0] * runs[0][0] + [count for _, count in runs]
    counts += [0] * (len(counts) % 2)
    return list(zip(counts[::2], counts[1::2], strict=True))
