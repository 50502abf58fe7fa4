"""R_wer: 1 - min(1, word error rate) of the answer block against the row's answer, for transcription; needs jiwer.

    covo-rl rewards try wer --completion "<answer>the cat sat</answer>" --row row.json      (pip install 'covo-rl[wer]')

An error is a word too many, one too few, or another one: "the cat sat" against "the cat sat down" is 1 of 4, so 0.75.
Many insertions cost no more than the whole mark. No answer block is 0; a row whose transcript is empty, or only
punctuation, is None: there is nothing to count errors against. Of several right transcripts the nearest counts.

`unit`: by default a word is what stands between spaces, and each Chinese, Japanese or Korean character is a word: WER
for English, CER for Chinese, and their mixture for mixed text. `wer(unit='char')` counts all characters but spaces.

Both texts are levelled first: NFKC (full width, ligatures), case folded, apostrophes dropped (`don't` is `dont`), all
other punctuation a space, but for `.` `,` `:` between digits. Numbers stay as they are written, so `21` is not
`twenty-one`: a rule that turns one into the other has turned "twenty-one o'clock" into "210 clock".
"""

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.rules.transcript import error_rate, spoken_words

try:
    import jiwer  # noqa: F401 (said before a run begins, not at its first score)
except ImportError as error:
    raise ImportError("the reward wer needs jiwer: pip install 'covo-rl[wer]'") from error

UNITS = ("auto", "char")


def wer(completions, answer, parsed=None, unit="auto", explain=None, log_extra=None, log_missing=None, **kwargs):
    r"""
    >>> said = ["<answer>The cat sat.</answer>", "<answer>\u6211\u662f\u732b</answer>"]
    >>> wer(said, answer=["the cat sat down", "\u6211\u662f"])
    [0.75, 0.5]
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r}: there are {' and '.join(UNITS)}")
    scores, reasons = [], []
    for index, (parts, gold) in enumerate(completion_rows(completions, parsed, answer)):
        golds = gold if isinstance(gold, list | tuple) else [gold]
        references = [spoken for text in golds if text is not None and (spoken := spoken_words(str(text), unit))]
        said = spoken_words(parts.answer or "", unit)
        rates = [error_rate(reference, said) for reference in references]
        scores.append(1.0 - min(rates) if rates else None)
        reasons.append(f"error rate {min(rates):.3f}" if rates else "")
        if not rates and log_missing:
            why = "the row has no answer" if gold is None else f"the row's transcript {str(gold)!r:.80} holds no word"
            log_missing(index, why)
    if explain and log_extra:
        log_extra("wer_reason", reasons)
    return scores
