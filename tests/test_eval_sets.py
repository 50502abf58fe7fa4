"""The files in eval_sets/: every set says what it must, versions are told apart, manifests work, imports are light."""

import json
import subprocess
import sys

import pytest

from covo_rl.evaluate.sets import (
    FILES,
    EvalInputError,
    EvalSet,
    PromptStyle,
    key_sha256,
    letter_rule,
    load_set,
    token_set_match,
    version_of,
)  # fmt: skip
from covo_rl.types import Example

LETTERS = [name for name in FILES if isinstance(load_set(name), EvalSet)]  # others: test_speech_sets.py


@pytest.mark.parametrize("name", LETTERS)
def test_every_set_says_what_it_must(name):
    found = load_set(name)
    assert found.name == name
    for value in (found.title, found.source, found.licence, found.how_to_get, found.official_drops):
        assert value
    own = name == "own"  # read as for training, whatever the fields are called
    assert set(found.fields) == (set() if own else {"id", "audio", "question", "choices", "answer"})
    assert found.breakdown
    assert found.scorer is {"token_set": token_set_match, "letter": letter_rule}[found.scorer_rule]


def test_scorers_and_keys_of_the_sets():
    assert load_set("mmsu").scorer is letter_rule
    assert load_set("mmau-test").grader is None, "its answers are with its host"
    assert load_set("mmau-test").submission
    assert load_set("mmar").all_reply_keys()[0] == "answer_prediction"
    accepted = {"model_output", "model_prediction", "answer_prediction", "response", "prediction"}
    assert all(set(load_set(name).all_reply_keys()) == accepted for name in LETTERS)


def test_official_wordings():
    row = Example("x", (), "What is it?", ("dog", "cat {list}"), "dog")
    prompts = load_set("mmau-test-mini").prompts
    assert prompts["official"].apply(row).question == (
        "What is it?  Select one option from the provided choices.\n['dog', 'cat {list}']."
    )
    assert prompts["official"].apply(row).choices == ()
    assert load_set("mmsu").prompts["official"].apply(row).question.endswith("What is it?\nA. dog\nB. cat {list}")
    assert load_set("mmar").prompts["official"].apply(row).question.endswith(":\ndog\ncat {list}")


def mini(options, phonemic, difficulty="medium"):
    """1,000 rows with these option counts, the first `phonemic` of them of one skill."""
    sizes = [n for n, count in options.items() for _ in range(count)]
    skills = ["Phonemic Stress Pattern Analysis"] * phonemic + ["Other"] * (1000 - phonemic)
    return [
        Example(str(i), (), "q", tuple(map(str, range(size))), "0", {"sub-category": skill, "difficulty": difficulty})
        for i, (size, skill) in enumerate(zip(sizes, skills, strict=True))
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (mini({4: 948, 2: 27, 5: 24, 8: 1}, 53), "v05.15.25, as of 2025-08-09"),
        (mini({4: 960, 2: 40}, 53), "v05.15.25, one of"),
        (mini({4: 960, 2: 40}, 153), "original, as of 2025-03-25"),
        (mini({4: 970, 5: 20, 2: 10}, 153), "original, October 2024"),
        (mini({4: 960, 2: 40}, 153, "Hard"), "original, October 2024"),
        (mini({4: 1000}, 7), "unknown"),
        (mini({4: 948, 2: 27, 5: 24, 8: 1}, 53)[:500], "unknown"),
    ],
)
def test_editions_of_mmau_are_told_apart_by_structure(rows, said):
    assert version_of(load_set("mmau-test-mini"), "0" * 64, rows).startswith(said)


def test_a_hash_on_record_comes_first(tmp_path):
    manifest = tmp_path / "mine.yaml"
    manifest.write_text(f"name: mine\nknown_files: {{'{'1' * 64}': second edition}}\n")
    mine = load_set(str(manifest))
    assert version_of(mine, "1" * 64, []) == "second edition"
    assert version_of(mine, "2" * 64, []).startswith("unknown")


def test_clean_columns():
    clean = load_set("mmau-test-mini").clean
    assert [clean("category", "['Reasoning']"), clean("difficulty", "Medium")] == ["Reasoning", "medium"]
    row = Example("x", (), "q", (), "a", {"task": "sound", "category": "['Reasoning']", "difficulty": None})
    assert load_set("mmau-test-mini").breakdown_of(row) == {"task": "sound", "category": "Reasoning"}


def test_key_hash_ignores_the_file_but_not_the_key():
    row = Example("x", (), "q", ("a", "b"), "a", {"task": "sound"})
    assert key_sha256([row]) == key_sha256([Example("x", (), "q", ("a", "b"), "a")])
    assert key_sha256([row]) != key_sha256([Example("x", (), "q", ("b", "a"), "a")])


def test_manifest(tmp_path):
    content = {"name": "mine", "scorer": "letter", "breakdown": ["room"], "reply_keys": ["said"],
               "prompts": {"short": {"template": "{question}\n{letters}"}}}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(content))
    mine = load_set(str(tmp_path / "mine.json"))
    assert (mine.scorer, mine.breakdown, mine.all_reply_keys()[0]) == (letter_rule, ("room",), "said")
    assert mine.prompts["short"] == PromptStyle("{question}\n{letters}")


def test_manifest_problems_are_all_told(tmp_path):
    (tmp_path / "bad.yaml").write_text("scorer: guess\nlicense: MIT\n")
    with pytest.raises(EvalInputError) as error:
        load_set(str(tmp_path / "bad.yaml"))
    for part in ("guess", "license", "needs a name"):
        assert part in str(error.value)


def test_importing_sets_and_the_command_loads_no_torch():
    code = (
        "import sys, covo_rl.evaluate, covo_rl.evaluate.cli, covo_rl.evaluate.report, covo_rl.evaluate.profile\n"
        "from covo_rl.evaluate.sets import FILES, load_set\n"
        "[load_set(name) for name in FILES]\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_a_set_is_a_plain_value():
    assert isinstance(load_set("builtin"), EvalSet)
    assert load_set("builtin").prepare is not None
