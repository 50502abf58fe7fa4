"""Text as the official scripts level it before errors are counted, one function per rule.

whisper_english(text)         OpenAI's English normaliser (arXiv 2212.04356, appendix C): words
spoken_numbers(text)          digits -> Chinese numerals as cn2an 0.5.24 writes them (`transform(text, "an2cn")`)
without_marks(text, kept)     zhon 2.1.1's and ASCII's punctuation deleted, two spaces squeezed to one, once
simplified(text)              traditional -> simplified characters, one by one
half_width(text)              full-width letters, digits, marks and the ideographic space -> ASCII
"""
# ruff: noqa: RUF001, RUF002  (full-width marks and numerals are what this file is about)

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.types import shown, visible

VENDOR = Path(__file__).parent / "vendor"
#: zhon 2.1.1, `zhon.hanzi.punctuation`
CHINESE_MARKS = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰"
    "\u303e\u303f–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
_MARKS = CHINESE_MARKS + string.punctuation
_HALF_WIDTH = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_NUMERALS = "零一二三四五六七八九"
_PLACES = ("", "十", "百", "千", "万", "十", "百", "千", "亿", "十", "百", "千", "万", "十", "百", "千")
_MEASURES = (
    "斤|克|千克|公斤|吨|米|厘米|毫米|公里|升|毫升|元|角|分|个|只|条|张|块|瓶|杯|份|本|"
    "辆|台|匹|头|位|亩|小时|分钟|秒|天|半"
)


@cache
def _english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(json.loads((VENDOR / "whisper_english.json").read_text(encoding="utf-8")))


@lru_cache(maxsize=1 << 15)  # a row is scored alone, and with all others
def whisper_english(text: str) -> str:
    """Lower-cased American words, numbers as digits, no fillers, nothing in brackets. Of text with a number of more
    digits than Python reads (4,300), which would end the normaliser, the lower-cased words.

    >>> whisper_english("Um, he's paid twenty-five cents (aside) for the colour.")
    'he is paid ¢25 for the color'
    """
    try:
        return _english()(text)
    except ValueError:
        return " ".join(re.findall(r"\w+", text.lower()))


def without_marks(text: str, kept: str = "") -> str:
    """Without zhon's and ASCII's punctuation but for `kept`; then each two spaces are one, in a single pass.

    >>> without_marks("你好，  世界!"), without_marks("don't!", kept="'")
    ('你好 世界', "don't")
    """
    return text.translate({ord(mark): None for mark in _MARKS if mark not in kept}).replace("  ", " ")


def half_width(text: str) -> str:
    return text.translate(_HALF_WIDTH)


@cache
def _simplified() -> dict[int, str]:
    lines = (VENDOR / "opencc_characters.txt").read_text(encoding="utf-8").splitlines()
    return {ord(pair[0]): pair[1].split()[0] for line in lines if len(pair := line.split("\t")) == 2}


def simplified(text: str) -> str:
    """Characters alone (OpenCC's list), no phrases.

    >>> simplified("聽見鐘聲")
    '听见钟声'
    """
    return text.translate(_simplified())


def asr_text(language: str, text: str, numbers: str = "written") -> str:
    """A transcript as corpus error rates compare it. `numbers` "words": digits of Chinese text as numerals.

    >>> asr_text("zh", "聽，ＡＢＣ 3聲"), asr_text("zh", "3.5米", numbers="words")
    ('听abc3声', '三点五米')
    """
    check_language(language)
    if numbers not in ("written", "words"):
        raise ValueError(f"numbers {numbers!r}: there are written and words")
    if language == "en":
        return whisper_english(text)
    text = simplified(half_width(text)).lower()
    text = spoken_numbers(text) if numbers == "words" else text
    return "".join(c for c in without_marks(text) if not c.isspace() and unicodedata.category(c)[0] != "P")


def check_language(language: object) -> None:
    if language not in ("en", "zh"):
        given = visible(shown(language))
        raise MalformedRow(f"language {given!r}: the error rates are defined for en (words) and zh (characters)")


# -- Chinese numerals ------------------------------------------------------------------------------------------------


def spoken_numbers(text: str) -> str:
    """Digits as Chinese numerals: years digit by digit, the rest as numbers; more than 16 digits stay as they are.

    >>> spoken_numbers("2020年3月有105个，-3.5，1/4，50%，3-5个")
    '二零二零年三月有一百零五个，负三点五，四分之一，百分之五十，三到五个'
    """
    # (?<!\d) changes no match: what fails at the first digit of a run fails at the others, one by one, slowly
    rules: list[tuple[str, Callable[[str], str]]] = [
        (rf"(?<!\d)\d+(\.\d+)?-\d+(\.\d+)?(?=({_MEASURES}))", lambda said: "到".join(map(_number, said.split("-")))),
        (r"(\d{2,4}年)?(\d{1,2}月)?(\d{1,2}日)?", _date),
        (r"(?<!\d)\d+/\d+", lambda said: "分之".join(map(_number, reversed(said.split("/"))))),
        (r"-?(?<!\d)(\d+\.)?\d+%", lambda said: "百分之" + _number(said[:-1])),
        (r"(?<!\d)\d+℃", lambda said: _number(said[:-1]) + "摄氏度"),
        (r"-?(\d+\.)?\d+", _number),
    ]
    for pattern, spoken in rules:
        text = re.sub(pattern, lambda match, spoken=spoken: _or_as_written(spoken, match[0]), text)
    return text


class _NotANumeral(ValueError):
    """Digits that cn2an leaves as they are: of other scripts, or too many."""


def _or_as_written(spoken: Callable[[str], str], written: str) -> str:
    try:
        return spoken(written) if written else ""
    except _NotANumeral:
        return written


def _digits(written: str) -> str:
    written = half_width(written)
    if not written.isascii():
        raise _NotANumeral(written)
    return written


def _date(written: str) -> str:
    year = re.sub(r"\d+(?=年)", lambda match: "".join(_NUMERALS[int(d)] for d in _digits(match[0])), written)
    return re.sub(r"\d+", lambda match: _number(match[0]), year)


def _number(written: str) -> str:
    """`-105.20` -> 负一百零五点二零; of a fraction at most 16 digits."""
    written = _digits(written)
    whole, _, fraction = written.removeprefix("-").partition(".")
    spoken = _whole_number(whole) + ("点" if fraction else "") + "".join(_NUMERALS[int(d)] for d in fraction[:16])
    return ("负" if written.startswith("-") else "") + spoken


def _whole_number(digits: str) -> str:
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(_PLACES):
        raise _NotANumeral(digits)
    spoken = ""
    for place, digit in zip(reversed(range(len(digits))), digits, strict=True):
        if digit != "0" or place % 4 == 0:
            spoken += _NUMERALS[int(digit)] + _PLACES[place]
        if digit == "0" and spoken and spoken[-1] != "零":
            spoken += "零"
    for wrong, right in (("零零", "零"), ("零万", "万"), ("零亿", "亿"), ("亿万", "亿")):
        spoken = spoken.replace(wrong, right)
    spoken = re.sub(r"([万亿])零([一二三四五六七八九]千)", r"\1\2", spoken.strip("零"))
    return spoken[1:] if spoken.startswith("一十") else spoken or "零"
