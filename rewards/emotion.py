"""R_emotion: does the voice of a spoken reply express the emotion that the row wants? It is heard, not read.

    covo-rl rewards try emotion --completion "Oh no." --codes reply.npy --row row.json --scorer-model ./emotions

The row's column `emotion` names it. Who hears the decoder's sound of the reply's codes is

    scorer_model      the folder of a transformers checkpoint that classifies audio, or module:function (also
                      ./file.py:function): f([wave, ...], 24000) -> [{label: probability}, ...]; or command:PROGRAM,
                      {"id", "path"} -> {"id", "score": {label: probability}}, a line each. The score is the probability
                      of the row's emotion; `emotion(scorer_labels={'happy': 'hap'})` says what it is called
    a judge           that hears (judge: openai:MODEL@URL with judge_audio: true), sent the row's clips and the reply:
                      1 or 0. A row without `emotion` asks whether the voice fits what was heard, as a listener's would

`emotion(decoder_folder=..., speaker_prompt=...)` says whose voice it is. A reply of fewer than 3 codes is silence: 0.
None where the row names no emotion for a scorer, where its column `speak` is false, and where scorer or judge fail.
"""

from collections.abc import Mapping
from numbers import Real

from covo_rl.rewards.columns import completion_text
from covo_rl.rewards.judging import Question, ask_verdicts
from covo_rl.rewards.replies import AnswerError
from covo_rl.speech import SHIPPED_DECODER
from covo_rl.speech.replies import ears_at, hear_sound, score_silence, voice_at
from covo_rl.types import Clip, shown

DEAF = "nobody hears it: there is no scorer_model, and no judge with judge_audio"
NO_NAME = "the row names no `emotion`"


def emotion(
    completions, completion_codes, emotion=None, question=None, clips=None, speak=None, scorer_model=None, judge=None,
    decoder_folder=SHIPPED_DECODER, speaker_prompt=None, scorer_labels=None, log_extra=None, log_missing=None,
    log_metric=None, **kwargs,
):  # fmt: skip
    """
    >>> emotion(["Oh no.", "Oh no."], completion_codes=[[], [7]], emotion=["sad", "sad"])
    [0.0, 0.0]
    """
    scores = score_silence(completion_codes, speak, log_missing)
    names = [str(name or "") for name in emotion or [""] * len(completions)]
    by_judge = scorer_model is None and getattr(judge, "hears", False)
    asked = [i for i, name in enumerate(names) if i not in scores and (by_judge or (name and scorer_model))]
    heard = {}
    if asked:
        ears, voice = ears_at(scorer_model or _as_clips, "score"), voice_at(decoder_folder, speaker_prompt)
        heard = dict(zip(asked, hear_sound([completion_codes[i] for i in asked], ears, voice, "scorer"), strict=True))
    if by_judge and judge is not None:
        before, asking = clips or [()] * len(names), question or [""] * len(names)
        texts = list(map(completion_text, completions))
        questions = {i: _question(names[i], asking[i], texts[i], before[i], heard[i]) for i in asked}
        verdicts = ask_verdicts(judge, "emotion", questions, len(names), log_missing, log_extra, log_metric)
        return [scores.get(i, verdict) for i, verdict in enumerate(verdicts)]
    for i, name in enumerate(names):
        if i in scores:
            continue
        missing = NO_NAME if scorer_model else DEAF
        result = _probability(heard[i], name, scorer_labels or {}) if i in heard else missing
        scores[i] = None if isinstance(result, str) else result
        if isinstance(result, str) and log_missing:
            log_missing(i, result)
    if log_extra:
        log_extra("emotion_reason", [_likeliest(heard.get(i)) for i in range(len(names))])
    return [scores[i] for i in range(len(names))]


emotion.isolation = "process"  # the decoder and whoever hears it stay out of the trainer's process


def _as_clips(waves, rate):
    return [Clip(array=wave, sampling_rate=rate) for wave in waves]


def _question(wanted, question, text, clips, reply):
    if isinstance(reply, AnswerError):
        return Question(problem=reply)
    fields = {"wanted": wanted or "whatever fits", "question": question or "none", "reply": text or "none"}
    return Question.about("emotion_audio.v1", [*(lazy.clip for lazy in clips), reply], **fields)


def _probability(heard, wanted, labels):
    """That the scorer gives the wanted emotion, or why there is none."""
    if isinstance(heard, AnswerError):
        return f"failed: {heard}"
    if not isinstance(heard, Mapping) or not all(isinstance(p, Real) and 0 <= float(p) <= 1 for p in heard.values()):
        return f"failed: the scorer gave {shown(heard)}, not {{label: probability}}"
    probabilities = {str(label).casefold(): float(p) for label, p in heard.items()}
    if (label := str(labels.get(wanted, wanted)).casefold()) in probabilities:
        return probabilities[label]
    there = ", ".join(map(shown, heard))
    return f"failed: the scorer has no label {label!r:.80}, but {there}; say which by emotion(scorer_labels={{...}})"


def _likeliest(heard):
    if not isinstance(heard, Mapping) or not heard:
        return ""
    label = max(heard, key=lambda name: heard[name])
    return f"{label} {heard[label]:.2f}"
