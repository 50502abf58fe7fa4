"""R_spoken: 1 - word error rate of what a spoken reply is heard to say, against its own text; needs jiwer.

    covo-rl rewards try spoken --completion "three seven" --codes reply.npy        (pip install 'covo-rl[speech]')

Whether the text is right plays no part. Both are levelled as for `wer`, and an error costs as much: "three seven" heard
as "three" is 0.5. Who hears is `recogniser`:

    codes             the speech tokenizer's own reading of the codes, without audio (default)
    wave              the decoder's sound of the codes, heard by the tokenizer: codes again, and their words
    module:function   also ./file.py:function, given that sound: f([wave, ...], 24000) -> [text, ...]
    command:PROGRAM   a program, given a file of it: {"id", "path"} -> {"id", "text"}, a line each
    transformers:PATH a Whisper checkpoint; funasr:PATH a Paraformer

The arguments `tokenizer_folder`, `decoder_folder` and `speaker_prompt` (a prompt's folder, or a recording) name what is
used. `spoken(part='answer')` compares with the answer block alone, for replies that reason in silence; by default all
text counts, without tags.

A reply of fewer than 3 codes is silence: 0. None where no text says what to hear, where the row's column `speak` is
false, and where the recogniser fails: an error of its own is not the policy's.
"""

import re

from covo_rl.rewards.columns import completion_rows, completion_text
from covo_rl.rewards.replies import AnswerError
from covo_rl.rewards.rules.transcript import error_rate, spoken_words
from covo_rl.speech import SHIPPED_DECODER, SHIPPED_TOKENIZER
from covo_rl.speech.replies import hear_words, score_silence
from covo_rl.types import TAG_TOKENS, shown

try:
    import jiwer  # noqa: F401 (said before a run begins, not at its first score)
except ImportError as error:
    raise ImportError("the reward spoken needs jiwer: pip install 'covo-rl[speech]'") from error

PARTS = ("text", "answer")


def spoken(
    completions, completion_codes, parsed=None, speak=None, recogniser="codes", tokenizer_folder=SHIPPED_TOKENIZER,
    decoder_folder=SHIPPED_DECODER, speaker_prompt=None, part="text", log_extra=None, log_missing=None, **kwargs,
):  # fmt: skip
    """
    >>> spoken(["three seven", ""], completion_codes=[[], [4, 4, 8, 8]])  # silence; speech that no text says
    [0.0, None]
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: there are {' and '.join(PARTS)}")
    scores = score_silence(completion_codes, speak, log_missing)
    said, missing = _said(completions, parsed, part), {}
    asked = [i for i, words in enumerate(said) if words and i not in scores]
    answers = hear_words(
        [completion_codes[i] for i in asked], recogniser, tokenizer_folder, decoder_folder, speaker_prompt
    )
    heard = dict(zip(asked, answers, strict=True))
    for i in range(len(said)):
        if isinstance(heard.get(i), str):
            scores[i] = 1.0 - error_rate(said[i], spoken_words(heard[i]))
        elif i in heard:
            failure = isinstance(heard[i], AnswerError)
            missing[i] = f"failed: {heard[i] if failure else f'the recogniser gave {shown(heard[i])}, not text'}"
        elif i not in scores:
            missing[i] = "the reply has no text that could be said"
    for i, why in missing.items():
        if log_missing:
            log_missing(i, why)
    if log_extra:
        texts = [f"heard {text!r}" if isinstance(text := heard.get(i), str) else "" for i in range(len(said))]
        log_extra("spoken_reason", texts)
    return [scores.get(i) for i in range(len(said))]


spoken.isolation = "process"  # models, and what hears in the user's own function, stay out of the trainer's process


def _said(completions, parsed, part):
    """The words that each reply should be heard to say."""
    if part == "answer":
        texts = [parts.answer or "" for (parts,) in completion_rows(completions, parsed)]
    else:
        texts = [re.sub("|".join(TAG_TOKENS), " ", text) for text in map(completion_text, completions)]
    return list(map(spoken_words, texts))
