"""Chinese sentences -> pieces and tokens of the kind that reasoning.py reads in English.

Every character is a token, so an option is found wherever it stands, the longest first, without word boundaries.
What denies, hedges, concludes or orders becomes the English token that does (`不是` -> not, `所以` -> therefore), so
that one set of rules reads both languages. Numbers in words before a measure word are digits (`三声` -> 3 声); `一个`
and its like are an article. Traditional characters of these words are read as simplified ones.
"""
# ruff: noqa: RUF001  (full-width marks and characters are what this file is about)

from __future__ import annotations

import re
from functools import lru_cache

from covo_rl.rewards.rules.normalize import text_tokens
from covo_rl.rewards.rules.text import clean_text

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_OTHER = re.compile("[\u3040-\u30ff\uac00-\ud7af]")  # kana and hangul: not Chinese
_SIMPLIFIED = str.maketrans(
    "沒並選項應該聽見這還後會則實際結論確斷對錯誤個兩聲種過為於綜總終顯認說無開頭隨緊從雖儘盡卻嗎鐘時響樣樂沉語話粵門貓鳥鳴"
    "與難絕屬別區證據現傳來裡裏夠極問題組條陣節層歲號貝茲許設麼級調記幾間覺較離僅們輪長強遠輕剛",
    "没并选项应该听见这还后会则实际结论确断对错误个两声种过为于综总终显认说无开头随紧从虽尽尽却吗钟时响样乐沉语话粤门猫鸟鸣"
    "与难绝属别区证据现传来里里够极问题组条阵节层岁号贝兹许设么级调记几间觉较离仅们轮长强远轻刚",
)
#: English token(s) -> the words that mean it; "" is left out
_MEANINGS = {
    "not": "不是 并不是 并非 绝非 绝不是 而非 而不是 不属于 不 没有 没 并没有 并未 未 并无 毫无 无法 不可能 "
    "不大可能 不太可能 不会 不会是 不像 不太像 不能 难以",
    "ruled": "排除 排除掉 可以排除 被排除 不存在 没有出现 没出现 未出现 不符合 不符 不吻合 不匹配 错误 有误",
    "wrong": "不对 不正确 不成立 不合适 不合理 说不通 错的 不可信",
    "except": "除了 除去",
    "unlike": "不同于 有别于 区别于",
    "might": "可能 有可能 也许 或许 说不定 疑似 以为 误以为 看似 貌似 乍听 有人说 有人认为",
    "perhaps": "大概",
    "if": "如果 假如 假设 倘若 若是",
    "whether": "是否 是不是 有没有 会不会 能不能",
    "either": "要么",
    "unsure": "不确定 不清楚 不能确定 无法确定 难以确定 无法判断 难以判断 拿不准 说不准",
    "therefore": "所以 因此 因而 故而 于是 可见 由此 由此可见 综上 综上所述 综合 总之 总而言之 那么 那就是 也就是说",
    "conclude": "结论 得出 判断 判定 断定 认定 确定 确认 推断 可知 说明 表明 证明 意味着",
    "answer": "答案",
    "must": "应该 应当 应是 应为 必然 必定 一定 肯定 只能 不得不",
    "clearly": "显然 显而易见",
    "finally": "最终 最后 末尾 结尾 最末",
    "correct": "正确",
    "choose": "选 选择 应选 挑选 选定",
    "actually": "其实 实际上 事实上",
    "then": "然后 接着 随后 紧接着 接下来 后来 其后 之后 以后 跟着",
    "before": "之前 以前 先于 早于",
    "after": "晚于",
    "start": "首先 最先 最早 最初 开头 开始 一开始 先出现 先响起 先听到 先发生",
    "is": "是 就是 才是",
    "i": "我", "we": "我们", "hear": "听到 听见 听出 听得到", "it sounds": "听起来 听上去 听着",
    "it sounds like": "听起来像 听上去像 听着像 听起来像是 听起来很像 听起来更像 听起来就像",
    "option": "选项",
    "s": "秒 秒钟", "ms": "毫秒", "min": "分钟", "h": "小时", "hz": "赫兹", "khz": "千赫", "db": "分贝",
    "": "的 了 吗 呢 吧 啊 可以 能 能够 可能性 最可能 最有可能 很可能 极有可能 大概率 毫无疑问 无疑 不容置疑 没错 "
    "没问题 不错 不仅 不但 不只 不光 不止 不断 不停 不时 不久 不同 不少 不禁 不妨 不论 不管 不难 不一会 不绝 不由 "
    "不外乎 不出所料 毫不 忍不住 止不住 差不多 非常 无论",
}  # fmt: skip
_WORDS = {word: meaning.split() for meaning, words in _MEANINGS.items() for word in words.split()}
_MEASURES = (
    "声 次 下 个 位 人 种 段 拍 遍 只 名 首 句 回 响 记 轮 组 秒 毫秒 分钟 小时 天 岁 年 月 号 倍 度 赫兹 千赫 分贝 "
    "条 台 件 架 把 匹 头 阵 串 节 步 层 小节 音符 八度 半音"
).split()
_MEASURE = "|".join(sorted(_MEASURES, key=len, reverse=True))
_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_NUMERAL = f"[{''.join(_DIGITS)}{''.join(_SCALES)}]"
_MARK = "\ue000"  # before the letter of an option
_PIECE = re.compile(
    rf"{_MARK}(?P<letter>[A-Z])"
    rf"|第(?P<ordinal>{_NUMERAL}+)"
    rf"|(?<![这那前后每各第几]|{_NUMERAL})(?P<number>{_NUMERAL}{{1,15}})(?=(?P<measure>{_MEASURE})|[^\u3400-\u9fff]|$)"
    rf"|(?P<word>{'|'.join(sorted(_WORDS, key=len, reverse=True))})"
    r"|(?P<char>[\u3400-\u9fff\uf900-\ufaff])"
    rf"|(?P<other>[^{_MARK}\u3400-\u9fff\uf900-\ufaff]+|{_MARK})"
)
#: between names of which the same is said
JOINED = frozenset(((), ("和",), ("与",), ("及",), ("跟",), ("或",), ("以", "及"), ("都",)))
_COUNTS = re.compile("[只仅共才]")
_CONCLUDES = re.compile(
    "|".join(word for meaning in ("therefore", "conclude", "answer", "must", "clearly", "finally", "correct", "choose")
             for word in _MEANINGS[meaning].split())
)  # fmt: skip
_ANYWHERE = frozenset("是 否 有 没有 无 对 错 不是 正确 错误 能 不能 会 不会 可以 不可以".split())
#: with these "one" is an article, with others only where nothing is concluded
_ARTICLES = frozenset("个 种 段 阵 位 名 首 只 把 架 条 台 件 头 匹 串".split())
_LETTER = re.compile(
    r"(?<![A-Za-z0-9#\u266f])(?<![A-Za-z] )([A-Z])(?![A-Za-z0-9#\u266f'])(?! ?[a-z])(?!大|小|降|升|调|弦|音|和弦|级|段)"
)
_REWRITES = [
    (re.compile("答案(?:在|介于)"), "是否"),  # one of two
    (re.compile("答案(?:应该|应当|应|就|只能|显然|肯定|一定|最终)*(?:是|为|选)?[:：]?"), "答案是 "),
    (re.compile("(?:选项|选择|选)(?= ?[A-Z])"), "选择"),
    (
        re.compile("(?:与|和|跟)([^，,]{1,15}?)(?:不同|不一样|有别|不符|不一致|不匹配|(?:差别|相差)[较很]?[大远])"),
        r"不同于\1",
    ),
    (
        re.compile("^在?([^，,]{1,12}?)(?:之前|以前|前面)先?(?:是|有|出现|传来|响起|听到)了?([^，,]{1,12})$"),
        r"\2然后\1",
    ),
    (re.compile("^在([^，,]{1,12}?)(?:之后|以后|后面)"), r"\1然后"),
    (re.compile("在([^，,]{1,12}?)(?:之后|以后|后面)"), r"晚于\1"),
    (re.compile("在([^，,]{1,12}?)(?:之前|以前|前面)"), r"早于\1"),
    (re.compile("先(?:是|听到|有|响)?([^，,]{1,12}?)(?:后|再)(?=是|听|有|响|传|出|来)"), r"\1然后"),
    (re.compile("([^，,]{1,15})的可能性(?:可以)?(?:被)?(?:排除|不大|很小|很低)"), r"排除\1"),
    (re.compile("不(?:能|可以|可)?排除"), "可能"),  # cannot be ruled out
    (re.compile("大概(?=[0-9]|" + _NUMERAL + ")"), "约"),
    (re.compile("^(?:等等|等一下|不对)"), "其实"),
    (re.compile("选项(?:里|中)?(?:有|包括|包含|分别是|为)"), "是否"),  # a list of them asserts none
    (re.compile("^故(?!事|障|意|乡)"), "所以"),
]
_RATHER = re.compile("与其说([^，,]{1,20}?)[，,]?(?:还|倒)?不如说")
#: 除了甲以外没有别的: only that; 除了甲还有乙: both
_EXCEPT = "除了?([^，,。]{1,15}?)(?:(?:以外|之外|外)[，,]?)?"
_ONLY = re.compile(
    f"{_EXCEPT}(?:(?:就|再|都|也)?(?:没有?|无|听不[到见])(?:任何)?(?:别的|其他|其它)"
    "|(?:其他|其它|别的|其余)[^，,。]{0,6}?[都均](?:不|没)|[都均](?:不|没))[^，,。]*"
)
_BESIDES = re.compile(f"{_EXCEPT}[，,]?(?=[还也又])")
_BREAK = re.compile(
    r"(?:[，;；!！?？。]|,(?!\d))+(?!(?:然后|接着|随后|紧接着|接下来|后来(?!发现|才|听出)|之后|最后|再))"
    "|(?<![不非])(?=但是|但(?!是)|然而|不过|可是|虽然|尽管|因为|由于|所以|因此|因而|只有|只听|反而|却)"
    "|(?<!然)(?=而(?:是|听|有|出现|传来))"
)
_NOT_THIS = re.compile("((?:不是|并非)[^，,]{1,20}?)(?<![不但还而于可只要就都也总若凡并])(?=是)")
_ASKS = re.compile('(?:[?？]|[吗么呢][。.!！]?)["”』」)）]*\\s*$')


def is_chinese(text: str) -> bool:
    """It holds Chinese characters, and no Japanese or Korean ones.

    >>> is_chinese("钟声 bell"), is_chinese("鐘の音"), is_chinese("bell")
    (True, False, False)
    """
    return not text.isascii() and bool(_HAN.search(text)) and not _OTHER.search(text)


def asks(sentence: str) -> bool:
    """A question."""
    return bool(_ASKS.search(sentence))


def pieces(sentence: str) -> list[str]:
    """The clauses of a Chinese sentence; `不是甲是乙` are two, what comes `然后` stays with what was before.

    >>> pieces("不是钟声是敲门声所以选B。")
    ['不是钟声', '是敲门声', '所以选B']
    """
    sentence = _RATHER.sub(r"不是\1，而是", sentence.translate(_SIMPLIFIED))
    sentence = _BESIDES.sub(r"有\1，", _ONLY.sub(r"只有\1", sentence))
    sentence = _NOT_THIS.sub(r"\1，", sentence)
    return [piece.strip() for piece in _BREAK.split(sentence) if piece and piece.strip()]


@lru_cache(maxsize=16384)
def chinese_tokens(text: str, is_name: bool = False) -> tuple[str, ...]:
    """Tokens of a clause, or of a name (an option, the value of a fact), in which `一` is always a number.

    >>> chinese_tokens("所以不是三声钟响")
    ('therefore', 'not', '3', '声', '钟', '响')
    >>> chinese_tokens("听到一个钟声"), chinese_tokens("只有一个钟声")
    (('hear', '个', '钟', '声'), ('只', '有', '1', '个', '钟', '声'))
    """
    text = clean_text(text).translate(_SIMPLIFIED)
    if not is_name:
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _LETTER.sub(rf"{_MARK}\1", text)
    concludes = bool(_CONCLUDES.search(text))
    result: list[str] = []
    for piece in _PIECE.finditer(text):
        said = piece[0]
        if piece["letter"]:
            result += ["option", piece["letter"].lower()]
        elif piece["ordinal"]:
            result.append(_ordinal(_value(piece["ordinal"])))
        elif piece["number"]:
            measure = piece["measure"]
            article = said == "一" and measure and (measure in _ARTICLES or not concludes)
            if is_name or not article or _COUNTS.search(text[: piece.start()]):
                result.append(str(_value(said)))
        else:
            result += _WORDS[said] if piece["word"] else [said] if piece["char"] else text_tokens(said)
    return tuple(result)


def _value(numeral: str) -> int:
    """`二十一` is 21; without a scale, digit by digit."""
    if _SCALES.keys().isdisjoint(numeral):
        return int("".join(str(_DIGITS[char]) for char in numeral))
    total = section = digit = 0
    for char in numeral:
        scale = _SCALES.get(char, 0)
        if scale >= 10**4:
            total, section, digit = total + max(section + digit, 1) * scale, 0, 0
        elif scale:
            section, digit = section + (digit or 1) * scale, 0
        else:
            digit = _DIGITS[char]
    return total + section + digit


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


#: characters that bring no evidence: of any sentence, and of a bare statement of the answer
EMPTY = frozenset(
    "的了着过在和与或是有这那一个为以因此所答案选项择正确应该最终综上述就也都很我你他她它们什么"
    "哪不没吗呢吧啊把被对从到让能可会得认觉判断定题问"
)
_FREQUENT = frozenset(
    "的了着过在和与是有这那一个为因所以此就也都很我你他她它们不没到得听说会能可上下中来去而且但先后然从被把"
)


def _share(text: str, chars: frozenset[str]) -> float:
    han = _HAN.findall(text)
    return sum(char in chars for char in han) / max(len(han), 1)


def chinese_flaw(text: str) -> str | None:
    """A list of keywords, or words without content: what no sentence is."""
    han, marks = len(_HAN.findall(text)), len(re.findall("[、，,；;/|]", text))
    if han >= 8 and _share(text, _FREQUENT) > 0.8:
        return "word salad: only function words"
    if han >= 8 and _share(text, _FREQUENT) < 0.05 and marks > 0.2 * han:
        return "keyword list: almost no function words"
    return None


def measureless(tokens: tuple[str, ...]) -> tuple[str, ...] | None:
    """The bare number of a name that is a number and its measure word, `三次`."""
    return tokens[:1] if len(tokens) == 2 and tokens[0].isdigit() and tokens[1] in _MEASURES else None


def says_nothing_alone(text: str) -> bool:
    """A name whose characters stand in any sentence, `是` or `有`: it counts only behind `答案是`."""
    return text.strip().translate(_SIMPLIFIED) in _ANYWHERE
