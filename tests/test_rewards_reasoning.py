"""R_consistency and R_thinking without a judge: what reasoning concludes, claims, and what is no reasoning."""

import pytest

from covo_rl.rewards import load_reward
from covo_rl.rewards.rules.criteria import CRITERIA, claims, flaw, judge_free
from covo_rl.rewards.rules.reasoning import clauses, concluded, supports

BELL_KNOCK = ("bell", "knock")
EMOTIONS = ("happy", "sad", "not sad")


@pytest.mark.parametrize(
    ("think", "option"),
    [
        ("It rings on, so it is a bell.", "bell"),
        ("It could be a knock, but the decay is long, so it is a bell.", "bell"),
        ("I think it is a bell. Wait, the attack is dull. It is a knock.", None),  # two assertions, neither concludes
        ("The answer is bell. Wait, no: actually the answer is knock.", "knock"),
        ("It is not a bell. It must be a knock.", "knock"),
        ("This is a bell, not a knock.", "bell"),
        ("It is a bell rather than a knock.", "bell"),
        ("Unlike a knock, this rings. I conclude that it is a bell.", "bell"),
        ("The knock can be ruled out, hence the bell.", "bell"),
        ("A bell is unlikely. Therefore knock.", "knock"),
        ("There is no doubt that this is a bell.", "bell"),
        ("The bell isn't present; what I hear is a knock.", "knock"),
        ("I can hear ringing, so option A is right.", "bell"),
        ("The sound decays slowly. The answer is (B).", "knock"),
        ("There is a bell and a knock.", None),
        ("It might be a bell.", None),
        ("Is it a bell?", None),
        ("I hear a low thud on wood.", None),
        ("So it is either a bell or a knock.", None),
        ("", None),
    ],
)
def test_what_reasoning_concludes(think, option):
    held = concluded(think, BELL_KNOCK)
    assert (None if held is None else BELL_KNOCK[held]) == option


@pytest.mark.parametrize(
    ("question", "think", "option"),
    [
        ("Which sound comes first?", "I hear a bell then a knock.", "bell"),
        ("Which sound comes last?", "I hear a bell then a knock.", "knock"),
        ("Which sound starts the clip?", "The bell comes after the knock.", "knock"),
        ("Which sound is louder?", "I hear a bell then a knock.", None),
    ],
)
def test_a_sequence_is_read_by_the_question(question, think, option):
    held = concluded(think, BELL_KNOCK, question)
    assert (None if held is None else BELL_KNOCK[held]) == option


def test_an_option_that_holds_a_negation_is_not_denied():
    assert concluded("So the speaker is not sad.", EMOTIONS) == 2
    assert concluded("So the speaker is sad.", EMOTIONS) == 1


@pytest.mark.parametrize(
    ("think", "answer", "verdict"),
    [("So it is a bell.", "A", True), ("So it is a bell.", "knock", False), ("So it is a bell.", "drum", False),
     ("A sound is heard.", "bell", None), (None, "bell", False), ("So it is a bell.", None, False)],
)  # fmt: skip
def test_supports(think, answer, verdict):
    assert supports(think, answer, BELL_KNOCK) is verdict


def test_consistency_ignores_whether_the_answer_is_right():
    reasons = {}
    completions = [f"<think>{t}</think><answer>{a}</answer>" for t, a in
                   [("So it is a bell.", "bell"), ("So it is a bell.", "knock"), ("Something sounds.",
                   "bell")]]  # fmt: skip
    scores = load_reward("consistency")(
        completions, choices=[BELL_KNOCK] * 3, answer=["knock"] * 3, log_missing=reasons.__setitem__
    )
    assert scores == [1.0, 0.0, None] and reasons == {2: "the reasoning commits to no answer"}


@pytest.mark.parametrize(
    ("think", "answer", "verdict"),
    [("5 beats in 2 seconds, so it is 150 bpm.", "150 BPM", True), ("So it is not 150 bpm.", "150 bpm", False),
     ("The answer is 90.", "150 bpm", False), ("Fast.", "150 bpm", None)],
)  # fmt: skip
def test_open_answers_must_be_stated(think, answer, verdict):
    assert supports(think, answer, ()) is verdict


FACTS = {"count": "three", "source": "knock"}
LEXICON = {"count": ["one", "two", "three", "four"], "source": ["bell", "buzzer", "knock"]}


@pytest.mark.parametrize(
    ("think", "truths"),
    [
        ("I hear three knocks.", [True]),  # "knocks" is another word than "knock"
        ("I hear a knock, 3 in all.", [True, True]),
        ("I hear a bell, three in all.", [True, False]),
        ("It is not a bell.", [True]),
        ("It is not a knock.", [False]),
        ("It might be a bell.", []),
        ("Is it a bell?", []),
        ("One of the sounds is a knock.", [True]),  # "one of" counts nothing
        ("No one speaks.", []),
        ("It rings.", []),
    ],
)
def test_claims_are_checked_against_the_facts(think, truths):
    assert sorted(c.true for c in claims(think, FACTS, LEXICON)) == sorted(truths)


def test_facts_without_a_lexicon():
    assert [c.true for c in claims("I hear 3 beeps.", {"beep_count": 3})] == [True]
    assert [c.true for c in claims("I hear four beeps.", {"beep_count": 3})] == [False]
    assert claims("It lasts 4 seconds.", {"beep_count": 3}) == []
    order = {"order": ["bell", "knock", "hiss"]}
    assert [c.true for c in claims("A bell then a hiss.", order)] == [True]
    assert [c.true for c in claims("A hiss followed by a bell.", order)] == [False]
    assert [c.true for c in claims("A hiss after a bell.", order)] == [True]


def test_columns_that_arrow_filled_with_none_are_no_facts():
    assert claims("It is slow.", {"tempo": None, "count": "one"}, {"tempo": None, "count": ["one"]}) == []


def met(think, answer="knock", **columns):
    given = {"question": "What is heard?", "choices": ["bell", "buzzer", "knock"], "gold": "knock", "facts": FACTS,
             "lexicon": LEXICON}  # fmt: skip
    found = judge_free(think, answer, **{**given, **columns})
    return [name for name in CRITERIA if found[name]]


def test_good_reasoning_meets_all_five():
    assert met("I hear a dull thud on wood, three in all, so it is a knock.") == list(CRITERIA)


@pytest.mark.parametrize(
    ("think", "unmet"),
    [
        ("I hear four dull thuds on wood, so it is a knock.", {"factual_correctness", "error_identification"}),
        ("I hear four, no wait, three thuds on wood, so it is a knock.", {"factual_correctness"}),
        ("I hear three dull thuds, so it is a bell.", {"soundness", "factual_correctness", "error_identification"}),
        ("I hear three dull thuds on wood, so it is a knock. " + "Let me go on and say a bit more. " * 2,
         {"conciseness"}),
        ("It is quite nice weather outside and I like the sun.", {"soundness", "factual_correctness",
                                                                  "error_identification", "conciseness"}),
    ],
)  # fmt: skip
def test_each_criterion_can_fail(think, unmet):
    assert set(CRITERIA) - set(met(think)) == unmet


def test_rows_without_facts_use_the_grounding_proxy():
    assert met("I hear wood struck with a short dull decay, so it is a knock.", facts=None) == list(CRITERIA)
    assert "factual_correctness" not in met("So it is a knock, as it should be.", facts=None)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("a" * 60, "one character"),
        ("bell bell bell bell", "one word"),
        ("I hear a bell. " * 30, "repetition"),
        ("audio, pitch, rhythm, tempo, sound", "keyword list"),
        ("the of a is to the a of and the", "word salad"),
        ("?!?! #### $$$$ %%%%", "no words"),
        ("x ## $$ %% && !! ??", "symbols"),
        ("What rings? The answer is bell.", "echo"),
        ("bell or knock", "echo"),
        ("The bell has a long and clear decay.", None),
        ("I hear bell then knock.", None),
        ("鐘の音がはっきりと長く響いて聞こえるので鐘だと思う。", None),
    ],
)
def test_degenerate_text(text, what):
    found = flaw(text, "What rings?", "bell, knock")
    assert (found is None) if what is None else (found is not None and what in found)


def test_thinking_is_a_multiple_of_a_fifth_and_says_what_is_missing():
    said = {}
    texts = [
        "I hear a dull thud on wood, three in all, so it is a knock.",
        "I hear four dull thuds, so it is a knock.",
        "",
    ]
    scores = load_reward("thinking")(
        [f"<think>{text}</think><answer>knock</answer>" for text in texts], question=["What is heard?"] * 3,
        choices=[["bell", "knock"]] * 3, answer=["knock"] * 3, facts=[FACTS] * 3, fact_lexicon=[LEXICON] * 3,
        log_extra=said.__setitem__,
    )  # fmt: skip
    assert scores == [1.0, 0.6, 0.0]
    assert said["thinking_unmet"][1] == "factual_correctness, error_identification"


def test_clauses_mark_conclusions_and_hedges():
    found = clauses("It may ring, but it is dull. So a knock.")
    assert [(c.strong, c.hedged) for c in found] == [(False, True), (False, False), (True, False)]


def test_the_evidence_of_the_built_in_set_scores_full_marks():
    from covo_rl.prompt import reference_completion
    from covo_rl.rewards import score
    from covo_rl.rewards.columns import example_from_row, group_from_completions
    from covo_rl.synth import render_sample

    rows = [render_sample("train", i)[0] for i in range(110)]
    right = [
        group_from_completions(example_from_row(r), [reference_completion(r["evidence"], r["answer"])]) for r in rows
    ]
    assert (score(right).rewards_PGR == 1).all()
    wrong = [
        group_from_completions(example_from_row(r), [reference_completion(r["evidence"], c)])
        for r in rows for c in r["choices"] if c != r["answer"]
    ]  # fmt: skip
    table = score(wrong)
    assert (table.rewards_PGR[..., table.names.index("accuracy")] == 0).all()
    assert (table.rewards_PGR[..., table.names.index("consistency")] == 0).all()
    assert (table.rewards_PGR[..., table.names.index("thinking")] < 1).all()


def test_the_fast_way_to_tokens_agrees_with_the_slow_one():
    import random

    from covo_rl.rewards.rules import normalize

    rng = random.Random(0)
    pieces = [
        "a",
        "A",
        "The",
        "bell",
        "isn't",
        "'",
        "rock'n'roll",
        "one",
        "hundred",
        ",",
        ".",
        "?",
        "\n",
        " ",
        "  ",
        "minor",
        "an",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=8))
        slow = normalize.level_numbers(
            [t.casefold() for t in normalize.drop_articles(normalize.raw_tokens(normalize.clean_text(text)))]
        )
        assert list(normalize.text_tokens(text)) == slow, text


def test_without_gold_neither_facts_nor_the_right_answer_move_thinking():
    row = {"choices": [["one", "two"]], "facts": [{"count": "two"}], "fact_lexicon": [{"count": ["one", "two"]}]}
    said = ["<think>I hear one low knock ring on the wood, so the answer is one.</think><answer>one</answer>"]
    blind = load_reward("thinking(use_gold=False)")
    assert load_reward("thinking")(said, answer=["two"], **row) == [0.6]  # a false claim, left standing
    assert blind(said, answer=["two"], **row) == blind(said, answer=["one"], **row) == [1.0]


DANISH = {"choices": ["Danish", "German"], "gold": "Danish", "facts": {"language": "Danish"},
          "lexicon": {"language": ["Danish", "German"]}}  # fmt: skip


@pytest.mark.parametrize("facts", [DANISH["facts"], None])
@pytest.mark.parametrize(
    ("question", "plain", "think"),
    [
        ("What language do you hear?", "Name the language.", "I hear Danish. So the answer is Danish."),
        ("Which language can be heard?", "Name it.", "Danish can be heard here. It is Danish."),
        ("What does it sound like?", "Name it.", "It sounds like Danish, so it is Danish."),
        ("What do you clearly hear?", "Name it.", "I can clearly hear Danish, not German."),
    ],
)
def test_short_evidence_counts_whatever_verb_the_question_has(question, plain, think, facts):
    """finding 44: "I hear Danish" was an echo where the question asks what "you hear"."""
    columns = {**DANISH, "facts": facts}
    asked = met(think, "Danish", question=question, **columns)
    assert asked == met(think, "Danish", question=plain, **columns) and len(asked) >= 4
    assert facts is None or asked == list(CRITERIA)


@pytest.mark.parametrize(
    "think",
    ["What language do you hear? Danish.", "So the answer is Danish.", "Danish.", "Do I hear Danish?",
     "Danish or German.", "I hear Danish or German.", "Language: Danish. You hear Danish.", "I do hear a language.",
     "The language is Danish."],
)  # fmt: skip
def test_an_echo_stays_one(think):
    """finding 44: the question again, the answer alone, all options, or a question: nothing is said to be heard."""
    assert "echo" in (flaw(think, "What language do you hear?", "Danish, German", DANISH["choices"]) or "")
    assert met(think, "Danish", question="What language do you hear?", **DANISH) == []


@pytest.mark.parametrize(
    "think", ["NO DOUBT, so it is a bell.", "Not only loud: it is a bell.", "No wonder it is a bell."]
)
def test_a_turn_of_phrase_denies_nothing_in_any_case(think):
    """finding 36: "Not only" and "NO DOUBT" were read as negations."""
    assert concluded(think, BELL_KNOCK) == 0
