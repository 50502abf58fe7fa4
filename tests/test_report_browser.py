"""The report in a browser: what a reader sees is what the payload holds, and nothing in it runs."""

import itertools
import math
import re
import statistics

import pytest
from browser import chromium, missing, until, visit
from report_contract import problems
from report_pages import EVIL, harmful, payload, timed

from covo_rl.run.report.page import render
from covo_rl.types import visible

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing()), reason=missing())]

FLAGS = ["wrong_high_thinking", "right_broken_reasoning", "consistency_missing", "truncated", "early_answer",
         "no_answer", "longest", "copy", "biggest_change", "no_variance"]  # fmt: skip
#: every row of the virtual list, by scrolling through it
LISTED = """
const list = document.querySelector(".list"), seen = new Set();
for (let top = 0; ; top += 200) {
  list.scrollTop = top;
  list.dispatchEvent(new Event("scroll"));
  for (const row of list.querySelectorAll(".row")) seen.add(Number(row.id.slice(6)));
  if (top > list.scrollHeight) break;
}
return [...seen].sort((a, b) => a - b);
"""


@pytest.fixture(scope="module")
def driver():
    with chromium() as browser:
        yield browser


@pytest.fixture(autouse=True)
def no_console_errors(driver):
    driver.get_log("browser")
    yield
    assert driver.get_log("browser") == []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Writes a payload as a page; the same payload only once."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def write(**sizes):
        key = str(sizes)
        if key not in made:
            content = payload(**sizes)
            assert problems(content) == []
            path = folder / f"page {len(made)}.html"
            path.write_text(render(content), encoding="utf-8")
            made[key] = path, content
        return made[key]

    return write


def flags_of(group):
    return {*group["flags"], *(flag for rollout in group["rollouts"] for flag in rollout["flags"])}


def interval(share):
    """50.0 [45.1, 54.9]; halves are rounded up, as a browser does."""
    mean, low, high = (f"{math.floor(1000 * value + 0.5) / 10:.1f}" for value in (share["accuracy"], *share["ci95"]))
    return f"{mean} [{low}, {high}]"


def press(driver, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def one(driver, selector):
    return driver.find_element("css selector", selector)


def texts(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def opened(driver):
    return one(driver, ".group-bar h2").text


# -- what it shows -----------------------------------------------------------------------------------------------


def test_two_thousand_rollouts_open_in_three_seconds_and_fetch_nothing(driver, page):
    path, content = page(steps=25)
    assert content["counts"]["rollouts"] == 2000
    assert min(visit(driver, path) for _ in range(3)) < 3.0
    resources = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in resources if not name.startswith("data:")] == []
    assert "2,000 rollouts · 250 groups · 25 steps" in one(driver, "#counts").text
    assert driver.execute_script("return document.getElementById('payload')") is None  # its memory is free


def test_the_head_tells_accuracy_before_and_after_with_intervals_notes_and_advice(driver, page):
    path, content = page(steps=6)
    visit(driver, path)
    text = one(driver, "#overview").text
    for row in content["runs"][0]["evaluations"]:
        assert interval(row) in text
    assert "metrics.jsonl, line 3 is left out" in text and "Half of the groups teach nothing." in text
    links = [a.get_attribute("href") for a in driver.find_elements("css selector", ".advice a")]
    assert links == [content["runs"][0]["advice"][0]["link"]]
    assert "KL runs away. docs/troubleshooting.md#kl" in text  # no link: it leads nowhere from a run folder
    assert texts(driver, ".advice li > code") == ["covo-rl sft"]
    one(driver, ".advice summary").click()
    assert one(driver, ".advice details").text == "what to do\nIt tries nothing.\n- One.\n- Two."
    for button, step in zip(driver.find_elements("css selector", ".step-link"), (2, 4, 6), strict=True):
        driver.execute_script("arguments[0].click()", button)  # of the step, or of the nearest that was logged
        assert opened(driver).startswith(f"step {step} ·")


def test_a_group_that_says_when_has_a_timeline_of_both_channels_and_a_bar_for_each_stop(driver, tmp_path):
    content = timed(payload(runs=1, steps=1, groups=1, rollouts=4))
    group = content["groups"][0]
    group["clips"], group["timing"]["turns"][0]["text"] = ["clip0"], EVIL
    content["runs"][0].update(evaluations=[], result={"before": {"delay_p50": 0.59}, "after": {"delay_p50": 0.4}})
    assert problems(content) == []
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html")
    assert texts(driver, ".figure") == ["median delay of answers, s0.59→0.40"]
    visit(driver, tmp_path / "page.html", "view=groups")
    assert texts(driver, ".timeline .word") == [visible(EVIL), "five"] and texts(driver, ".pause") == ["2.00 s"]
    assert texts(driver, ".lane-name") == ["user", "P(SHIFT)", "✗ 2\u00d7", "✓ 1\u00d7", "✗ 1\u00d7", ""]
    titles = [one.get_attribute("title") for one in driver.find_elements("css selector", ".stop")]
    assert titles == ["rollouts 1, 4: SHIFT at 1.60 s, R 0.00", "rollouts 2: SHIFT at 4.80 s, R 2.00",
                      "rollouts 3: no SHIFT, R 0.00"]  # fmt: skip
    place = "const box = (name) => document.querySelector(name).getBoundingClientRect();"
    lane, mark, pause = driver.execute_script(place + "return ['.lane', '.mark', '.pause'].map(box)")
    assert mark["x"] + mark["width"] / 2 == pytest.approx(lane["x"] + lane["width"] * 4.0 / 6.4, abs=2)
    assert pause["width"] == pytest.approx(lane["width"] * 2.0 / 6.4, abs=2)
    assert texts(driver, ".toolbar > b")[0].startswith("1 of 4 right") and texts(driver, ".segments") == []
    assert texts(driver, ".rollout .completion")[0] == "SHIFT at 1.60 s"
    driver.execute_script("arguments[0].click()", one(driver, ".prompt .play"))
    until(driver, "return parseFloat(document.querySelector('.over .head').style.left) > 0")
    assert driver.execute_script("return window.hacked === undefined")


def test_a_spoken_reply_has_a_player_and_raw_its_codes(driver, tmp_path):
    content = payload(runs=1, steps=1, groups=1)
    rollouts, clips = content["groups"][0]["rollouts"], content["clips"]
    clips["reply 1"] = next(clip for clip in clips.values() if clip["src"]) | {"name": "the reply"}
    rollouts[0].update(codes=[3, 1, 4], reply="reply 1")
    rollouts[1].update(codes=[5], reply=None)
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html", "view=groups")
    assert texts(driver, ".rollout .player .sound-name span:first-child") == ["the reply"]
    facts = texts(driver, ".rollout footer")
    assert "3 audio codes" in facts[0] and "1 audio code" in facts[1] and "audio" not in facts[2]
    assert texts(driver, ".rollout .codes") == []
    visit(driver, tmp_path / "page.html", "view=groups&text=raw")
    assert texts(driver, ".rollout .codes") == ["3 1 4", "5"]
    driver.execute_script("arguments[0].click()", one(driver, ".rollout .play"))
    until(driver, "return document.querySelector('.rollout audio').currentTime > 0")


def test_rows_of_two_data_sets_with_one_id_are_two_prompts(driver, tmp_path):
    content = payload(runs=2, steps=1, groups=1)
    content["groups"][0].update(id="1", question="Which bell?")
    content["groups"][1].update(id="1", question="Which dog?")
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html", "view=groups&beside=1.1.0")
    assert "drawn once" in one(driver, ".history").text
    assert not driver.find_elements("css selector", "#beside") and not driver.find_elements("css selector", ".two")


def test_a_long_fact_of_the_row_is_unfolded_by_a_key(driver, tmp_path):
    from selenium.webdriver import Keys

    content = payload(steps=1, groups=1)
    content["groups"][0]["columns"] = {"task": "sound", "facts": "bell, " * 40}
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html", "view=groups")
    short, long = driver.find_elements("css selector", ".fact")
    assert short.tag_name == "span" and long.size["height"] == short.size["height"]
    long.send_keys(Keys.ENTER)
    assert long.size["height"] > short.size["height"] and long.get_attribute("aria-expanded") == "true"


def test_names_that_every_object_of_the_browser_has_are_names(driver, tmp_path):
    """A metric that only one run has, and a component without a reason."""
    content = payload(runs=2, steps=2, groups=1)
    names = ("constructor", "__proto__", "toString")
    for row in content["runs"][0]["metrics"]:
        row |= dict.fromkeys(names, 0.25 * row["step"])
    rollout = content["groups"][0]["rollouts"][0]
    rollout["rewards"] = {"accuracy": 1.0, **dict.fromkeys(names, 0.5)}
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html")
    one(driver, ".others summary").click()
    until(driver, "return [...document.querySelectorAll('.others strong')].some((n) => n.textContent === 'toString')")
    visit(driver, tmp_path / "page.html", "view=groups")
    card = one(driver, ".rollout").text
    assert all(f"{name}\n0.50" in card for name in names) and "native code" not in card


def test_a_run_that_is_not_at_its_end_says_how_far_it_is(driver, tmp_path):
    content = payload(steps=4, groups=1)
    content["runs"][0]["config"]["max_steps"] = 120
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html")
    assert "4 of 120 steps" in one(driver, ".verdict-card").text


def test_accuracy_with_arguments_is_accuracy(driver, tmp_path):
    content = payload(steps=1, groups=1)
    rollouts = content["groups"][0]["rollouts"]
    right = sum(rollout["rewards"]["accuracy"] for rollout in rollouts)
    for rollout in rollouts:
        rollout["rewards"] = {"accuracy(strict=True)": rollout["rewards"]["accuracy"]}
    for row in content["runs"][0]["metrics"]:
        row["reward_accuracy(strict=True)"] = row.pop("reward_accuracy")
    (tmp_path / "page.html").write_text(render(content))
    visit(driver, tmp_path / "page.html", "view=groups")
    assert f"{right:.0f} of 8 right" in one(driver, ".toolbar").text
    assert len(driver.find_elements("css selector", ".rollout.right")) == right
    press(driver, "1")
    assert "Accuracy" in texts(driver, ".chart strong")


def test_curves_are_those_that_the_metrics_have_and_a_click_opens_the_step(driver, page):
    path, _ = page(steps=6)
    visit(driver, path)
    until(driver, "return document.querySelectorAll('.plot canvas').length > 5")
    titles = texts(driver, ".chart strong")
    assert "Total reward" in titles and "KL to the start" in titles and "Seconds by phase" in titles
    assert "Entropy" not in titles and "Listening" not in titles  # the run did not measure them
    assert "reward_total" not in str(titles) and "1.50" not in titles
    driver.execute_script(
        """const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
        const at = {clientX: box.left + 0.6 * box.width, clientY: box.top + 20, bubbles: true};
        for (const kind of ["mouseenter", "mousemove"]) over.dispatchEvent(new MouseEvent(kind, at));"""
    )
    until(driver, "return [...document.querySelectorAll('.u-cursor-x')].every((line) => line.style.transform)")
    one(driver, ".u-over").click()  # in the middle: between steps 3 and 4
    assert re.match(r"step [34] · group 0", opened(driver))


@pytest.mark.parametrize("view", ["parts", "tokens", "raw"])
def test_the_text_of_a_group_is_that_of_the_payload(driver, page, view):
    path, content = page(steps=6)
    group = content["groups"][7]
    visit(driver, path, f"view=groups&at=0.{group['step']}.{group['group']}&text={view}")
    rollouts = group["rollouts"]
    if view == "parts":
        assert texts(driver, ".rollout .think") == [rollout["think"] for rollout in rollouts]
        assert texts(driver, ".rollout .answer") == [rollout["answer"] for rollout in rollouts]
    else:
        selector = ".rollout .tokens" if view == "tokens" else ".rollout .completion"
        assert texts(driver, selector) == [rollout["completion"] for rollout in rollouts]
    assert texts(driver, ".question") == [group["question"]]
    assert texts(driver, ".choices .key span:first-child") == [group["answer"]]
    verdicts = [
        rollout.get_attribute("class").split()[2] for rollout in driver.find_elements("css selector", ".rollout")
    ]
    assert verdicts == ["right" if rollout["rewards"]["accuracy"] else "wrong" for rollout in rollouts]
    assert texts(driver, ".rollout .reason") == [rollout["reasons"]["thinking"] for rollout in rollouts]
    names = [name for rollout in rollouts for name in rollout["rewards"]]
    assert texts(driver, ".component dt") == names
    values = [value for rollout in rollouts for value in rollout["rewards"].values()]
    shown = ["none" if value is None else f"{value:g}" if value in (0, 1) else f"{value:.2f}" for value in values]
    assert texts(driver, ".component b") == shown
    advantages = [float(text[2:].replace("\u2212", "-")) for text in texts(driver, ".advantage")]
    assert advantages == pytest.approx([rollout["advantage"] for rollout in rollouts], abs=0.0051)


def test_tokens_are_darker_the_less_likely_they_were(driver, page):
    path, content = page(steps=6)
    visit(driver, path, "view=groups&at=0.1.0&text=tokens")
    centinats = content["groups"][0]["rollouts"][0]["tokens"][1]
    costs = driver.execute_script(
        "return [...document.querySelector('.rollout').querySelectorAll('.token')]"
        ".map((token) => Number(getComputedStyle(token).backgroundColor.match(/([\\d.]+)\\)$/)[1]))"
    )
    assert len(costs) == len(centinats)
    for (a, logp_a), (b, logp_b) in itertools.pairwise(zip(costs, centinats, strict=True)):
        assert (a - b) * (min(-logp_a, 500) - min(-logp_b, 500)) >= 0
    assert "p = 1" in one(driver, ".token-legend").text


def test_the_same_prompt_over_training_links_its_groups_and_stands_beside(driver, page):
    path, content = page(steps=6)
    ids = [group["id"] for group in content["groups"]]
    first = next(group for group in content["groups"] if ids.count(group["id"]) >= 3)
    same = [group for group in content["groups"] if group["id"] == first["id"]]
    visit(driver, path, f"view=groups&at=0.{first['step']}.{first['group']}")
    means = [statistics.mean(rollout["total"] for rollout in group["rollouts"]) for group in same]
    assert texts(driver, ".visit") == [f"{g['step']}: {m:.2f}" for g, m in zip(same, means, strict=True)]
    assert len(driver.find_elements("css selector", ".prompt-curve .point")) == len(same)
    driver.find_elements("css selector", ".visit")[-1].click()
    assert opened(driver) == f"step {same[-1]['step']} · group {same[-1]['group']}"
    one(driver, f"#beside option[value='{content['groups'].index(first)}']").click()
    assert texts(driver, ".two .think") == [r["think"] for group in (same[-1], first) for r in group["rollouts"]]


# -- filters, search, order --------------------------------------------------------------------------------------


def test_every_filter_and_every_pair_gives_exactly_its_groups(driver, page):
    path, content = page(steps=6)
    groups = content["groups"]
    met = [flag for flag in FLAGS if any(flag in flags_of(group) for group in groups)]
    visit(driver, path, "view=groups")
    for chosen in [[], *([flag] for flag in FLAGS), *map(list, itertools.combinations(FLAGS, 2))]:
        expected = [i for i, group in enumerate(groups) if set(chosen) <= flags_of(group)]
        driver.execute_script("location.hash = arguments[0]", f"view=groups&flags={','.join(chosen)}")
        count = f"{len(expected)} of 60 groups" if len(expected) < 60 else "60 groups"
        until(driver, "return document.querySelector('.count').textContent === arguments[0]", 5, count)
        assert driver.execute_script(LISTED) == expected
        counts = [sum(flag in flags_of(groups[i]) for i in expected) for flag in met]
        assert [int(text) for text in texts(driver, ".filter b")] == counts


def test_filters_are_buttons_that_combine_mark_the_rollouts_and_are_cleared(driver, page):
    path, content = page(steps=6)
    visit(driver, path, "view=groups")
    for flag in ("truncated", "copy"):
        one(driver, f"[data-flag={flag}]").click()
    assert one(driver, "[data-flag=copy]").get_attribute("aria-pressed") == "true"
    expected = [i for i, group in enumerate(content["groups"]) if {"truncated", "copy"} <= flags_of(group)]
    assert driver.execute_script(LISTED) == expected and 0 < len(expected) < 60
    shown = content["groups"][expected[0]]["rollouts"]
    marked = [int(card.get_attribute("data-g")) for card in driver.find_elements("css selector", ".rollout.marked")]
    assert marked == [g for g, rollout in enumerate(shown) if {"truncated", "copy"} & set(rollout["flags"])]
    order = [int(card.get_attribute("data-g")) for card in driver.find_elements("css selector", ".rollout")]
    assert order == [*marked, *(g for g in range(8) if g not in marked)]
    one(driver, ".clear").click()
    assert len(driver.execute_script(LISTED)) == 60


@pytest.mark.parametrize(
    "query", ["ROW-01", "question 3:", "violin dog", "</think><answer>no", "響く dog rings", "nowhere at all"]
)
def test_search_finds_questions_completions_and_ids(driver, page, query):
    path, content = page(steps=6)
    visit(driver, path, "view=groups")
    press(driver, "/", query)

    def holds(group):
        fields = [group["id"], group["question"], *(rollout["completion"] for rollout in group["rollouts"])]
        return any(query.lower() in field.lower() for field in fields)

    expected = [i for i, group in enumerate(content["groups"]) if holds(group)]
    assert len(expected) < 60
    count = f"{len(expected)} of 60 groups"
    until(driver, "return document.querySelector('.count').textContent === arguments[0]", 5, count)
    assert driver.execute_script(LISTED) == expected
    if not expected:
        assert "No group matches" in one(driver, ".detail").text
    assert one(driver, "#search").get_attribute("value") == query


def test_orders_are_by_mean_and_spread(driver, page):
    path, content = page(steps=6)
    totals = [[rollout["total"] for rollout in group["rollouts"]] for group in content["groups"]]
    orders = {"high": (statistics.mean, True), "low": (statistics.mean, False), "spread": (statistics.pstdev, True)}
    for name, (measure, down) in orders.items():
        visit(driver, path, f"view=groups&sort={name}")
        ranked = sorted((round(measure(values), 9) for values in totals), reverse=down)
        first = int(one(driver, ".row[aria-posinset='1']").get_attribute("id")[6:])
        assert measure(totals[first]) == pytest.approx(ranked[0])


def test_thirty_thousand_rollouts_are_searched_in_200_ms(driver, tmp_path):
    content = payload(steps=25, words=40, prompts=200)
    groups = content["groups"]
    for rollout in itertools.chain.from_iterable(group["rollouts"] for group in groups):
        rollout["tokens"] = None  # not searched
    content["groups"] = [{**group, "step": group["step"] + 25 * turn} for turn in range(15) for group in groups]
    content["counts"].update(rollouts=30_000, groups=3750, steps=375)
    (tmp_path / "large.html").write_text(render(content))
    assert visit(driver, tmp_path / "large.html", "view=groups") < 15
    rows = driver.find_elements("css selector", ".row")
    assert 0 < len(rows) < 60  # the list holds what is in sight
    search = """
    const done = arguments[1], count = document.querySelector(".count"), start = performance.now();
    const shown = (_, watch) => { watch.disconnect(); done(performance.now() - start); };
    new MutationObserver(shown).observe(count, {childList: true});
    location.hash = "view=groups&q=" + arguments[0];
    """
    took = [
        driver.execute_async_script(search, query) for query in ("violin plays softly", "row-01", "zzz", "bell far")
    ]
    assert min(took) < 200, took


# -- sound, keys, address ----------------------------------------------------------------------------------------


def test_a_sound_plays_seeks_and_stops_for_the_next(driver, page):
    path, content = page(steps=6)
    at = next(i for i, group in enumerate(content["groups"]) if group["clips"] != ["away"])
    group = content["groups"][at]
    visit(driver, path, f"view=groups&at=0.{group['step']}.{group['group']}")
    time = "return document.querySelector('audio').currentTime"
    one(driver, ".play").click()
    assert until(driver, time, 5) > 0
    until(driver, "return parseFloat(document.querySelector('.head').style.left) > 5", 5)
    until(driver, "return document.querySelector('audio').ended", 10)
    one(driver, ".track").click()  # its middle
    assert driver.execute_script(time) == pytest.approx(0.4, abs=0.05)
    drawn = driver.execute_script(
        "const wave = document.querySelector('.wave');"
        "return wave.getContext('2d').getImageData(0, 0, wave.width, wave.height).data.some((value) => value)"
    )
    assert drawn and driver.execute_script("return document.querySelector('.mel').naturalWidth") == 60


def test_a_linked_sound_that_is_not_there_says_where_it_should_be(driver, page):
    path, content = page(steps=6)
    group = next(group for group in content["groups"] if group["clips"] == ["away"])
    visit(driver, path, f"view=groups&at=0.{group['step']}.{group['group']}")
    assert "linked, not embedded" in one(driver, ".player").text
    one(driver, ".play").click()
    until(driver, "return document.querySelector('.player').textContent.includes('sounds/away.wav')", 5)
    errors = [entry["message"] for entry in driver.get_log("browser")]  # this one is the browser's word on a link
    assert all("away.wav" in message for message in errors)


def test_keys_move_search_play_and_help(driver, page):
    from selenium.webdriver import Keys

    path, content = page(steps=6)
    visit(driver, path)
    press(driver, "2")
    assert opened(driver) == "step 1 · group 0"
    press(driver, "j", "j", Keys.ARROW_DOWN, "k")
    assert opened(driver) == "step 1 · group 2"
    press(driver, Keys.ARROW_RIGHT)
    assert opened(driver) == "step 2 · group 0"
    press(driver, Keys.ARROW_LEFT)
    assert opened(driver) == "step 1 · group 0"
    assert one(driver, ".row[aria-selected=true]").get_attribute("aria-posinset") == "1"
    press(driver, "l")
    assert texts(driver, ".token-legend")
    press(driver, "?")
    assert one(driver, "#keys").get_attribute("open") is not None
    press(driver, Keys.ESCAPE)
    assert one(driver, "#keys").get_attribute("open") is None
    sound = next(group for group in content["groups"] if group["clips"] != ["away"])
    visit(driver, path, f"view=groups&at=0.{sound['step']}.{sound['group']}")
    press(driver, " ")
    assert until(driver, "return document.querySelector('audio').currentTime", 5) > 0
    press(driver, "/", "jk?")
    assert one(driver, "#search").get_attribute("value") == "jk?"  # keys are text where one types
    press(driver, Keys.ESCAPE)
    before = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    press(driver, "t")
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") != before


def test_everything_is_reached_by_tab_and_the_focus_is_seen(driver, page):
    from selenium.webdriver import Keys

    path, _ = page(steps=6)
    visit(driver, path, "view=groups")
    seen = set()
    for _ in range(40):
        press(driver, Keys.TAB)
        name, outline = driver.execute_script(
            "const node = document.activeElement;"
            "return [node.id || node.className || node.tagName, getComputedStyle(node).outlineStyle]"
        )
        assert outline == "solid" or name == "BODY", name  # between the last and the first
        seen.add(name)
    assert {"theme", "help", "search", "step", "sort", "list", "play", "track", "filter"} <= seen
    unnamed = driver.execute_script(
        "return [...document.querySelectorAll('button, a, input, select, [role]:not([role=status])')]"
        ".filter((node) => !(node.textContent.trim() || node.getAttribute('aria-label'))).map((node) => node.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize(
    ("control", "keys", "name"),
    [
        ("[aria-label='next group']", "ENTER ENTER", "aria-label"),
        (".segments button:nth-child(2)", "ENTER ENTER", "textContent"),
        ("#beside", "ARROW_DOWN ARROW_DOWN", "id"),
        (".visit:not([aria-current])", "ENTER", "aria-label"),
        ("[data-flag=copy]", "ENTER ENTER", "data-flag"),
        (".play", "j", "className"),
        (".clear", "ENTER", "className"),
    ],
)
def test_a_control_keeps_the_focus_when_what_it_changes_is_drawn_anew(driver, page, control, keys, name):
    """A reader with a keyboard presses it again; where the control is gone, the focus stays in its part."""
    from selenium.webdriver import Keys

    path, content = page(steps=6)
    ids = [group["id"] for group in content["groups"]]
    group = next(g for g in content["groups"][1:-1] if ids.count(g["id"]) >= 3 and "away" not in g["clips"])
    flags = "&flags=truncated" if control == ".clear" else ""
    visit(driver, path, f"view=groups&at=0.{group['step']}.{group['group']}{flags}")
    driver.execute_script("document.querySelector(arguments[0]).focus()", control)
    what = "const n = document.activeElement; return n[arguments[0]] || n.getAttribute(arguments[0])"
    before, hashes = driver.execute_script(what, name), [driver.execute_script("return location.hash")]
    for key in keys.split():
        press(driver, getattr(Keys, key, key))
        hashes.append(driver.execute_script("return location.hash"))
    assert hashes[0] != hashes[1]
    assert name == "className" or driver.execute_script(what, name) == before
    part = ".filters" if control in (".clear", "[data-flag=copy]") else ".detail"
    assert driver.execute_script("return Boolean(document.activeElement.closest(arguments[0]))", part)


def test_the_address_holds_the_state(driver, page):
    path, _ = page(steps=6)
    visit(driver, path, "view=groups")
    one(driver, "[data-flag=consistency_missing]").click()
    one(driver, "#sort option[value=low]").click()
    one(driver, ".group-bar h2").click()  # out of the list of orders, in which keys choose
    press(driver, "j", "l", "/", "row-0")
    until(driver, "return location.hash.includes('q=row-0')", 5)
    state = [opened(driver), texts(driver, ".count"), driver.execute_script("return location.hash")]
    url = driver.current_url
    driver.get("about:blank")
    driver.get(url)
    until(driver, "return !document.getElementById('status')")
    assert [opened(driver), texts(driver, ".count"), driver.execute_script("return location.hash")] == state
    assert texts(driver, ".token-legend") and one(driver, "#sort").get_attribute("value") == "low"
    one(driver, "nav [data-view=setup]").click()
    driver.back()
    assert opened(driver) == state[0]
    visit(driver, path, "view=nowhere&at=9.9.9&flags=none,__proto__&only=x&text=constructor&sort=toString")
    assert one(driver, "nav [aria-current=page]").text == "Overview"


def test_the_slider_goes_to_the_step(driver, page):
    path, _ = page(steps=6)
    visit(driver, path, "view=groups")
    driver.execute_script("const s = document.getElementById('step'); s.value = 4; s.dispatchEvent(new Event('input'))")
    assert opened(driver) == "step 5 · group 0" and one(driver, ".steps output").text == "step 5 of 6"


# -- several runs, evaluations, setup ----------------------------------------------------------------------------


def test_runs_are_compared(driver, page):
    path, content = page(runs=2, steps=5, groups=4, prompts=8)
    visit(driver, path)
    until(driver, "return document.querySelectorAll('.plot canvas').length > 5")
    assert texts(driver, ".chart:first-child .legend span") == [
        f"{letter}{run['metrics'][-1]['reward_total']:.2f}" for letter, run in zip("AB", content["runs"], strict=True)
    ]
    press(driver, "4")
    rows = [[cell.text for cell in row.find_elements("css selector", "th, td")]
            for row in driver.find_elements("css selector", ".differs tbody tr")]  # fmt: skip
    assert rows == [["beta", "0", "0.1"]]
    press(driver, "3")
    first = texts(driver, "#evaluation table:first-child tbody th")
    assert first[:4] == ["A before, greedy", "B before, greedy", "A before, sampled", "B before, sampled"]
    press(driver, "2")
    one(driver, "[data-flag=run-1]").click()
    assert driver.execute_script(LISTED) == [i for i, group in enumerate(content["groups"]) if group["run"] == 1]
    group = content["groups"][20]
    other = next(i for i, g in enumerate(content["groups"]) if g["run"] == 0 and g["id"] == group["id"])
    one(driver, f"#beside option[value='{other}']").click()
    shown = [r["think"] for g in (group, content["groups"][other]) for r in g["rollouts"]]
    assert texts(driver, ".two .think") == shown


def test_evaluations_and_setup_hold_every_figure(driver, page):
    path, content = page(steps=6)
    visit(driver, path, "view=evaluation")
    text, run = one(driver, "#evaluation").text, content["runs"][0]
    for row in run["evaluations"]:
        for part in [row, *row["breakdown"]]:
            assert interval(part) in text
    visit(driver, path, "view=setup")
    text = one(driver, "#setup").text
    assert "packages.torch 2.12" in text and "model builtin:tiny" in text and "data none" in text


# -- untrusted text, damage, screens -----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["overview", "groups&at=0.1.0", "groups&at=0.1.0&text=tokens", "groups&text=raw",
                                  "evaluation", "setup"])  # fmt: skip
def test_what_a_model_wrote_does_not_run(driver, tmp_path, view):
    content = harmful(payload(steps=2, groups=3))
    assert problems(content) == []
    text = render(content)
    assert text.count("<script") == 3 and "window.hacked = 1</script>" not in text
    (tmp_path / "evil.html").write_text(text, encoding="utf-8")
    visit(driver, tmp_path / "evil.html", f"view={view}")
    assert driver.execute_script("return window.hacked") is None
    assert (
        driver.execute_script(
            "return document.querySelectorAll('main script, main img:not(.mel), main svg[onload]').length"
        )
        == 0
    )
    shown = driver.execute_script("return document.body.textContent")
    assert visible(EVIL) in shown and not {"\u202e", "\u2028", "\x1b", "\u200b"} & set(shown)
    links = driver.execute_script("return [...document.querySelectorAll('a')].map((a) => a.protocol)")
    assert set(links) == {"file:"}


def test_the_policy_stops_a_script_that_comes_in_all_the_same(driver, page):
    path, _ = page(steps=6)
    visit(driver, path)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i);"
    )
    assert driver.execute_script("return window.hacked") is None
    until(driver, "return [...document.images].at(-1).complete", 5)
    blocked = [entry["message"] for entry in driver.get_log("browser")]
    assert len(blocked) == 2 and all("Content Security Policy" in message for message in blocked)


def test_a_cut_file_and_an_old_browser_get_a_word(driver, tmp_path):
    text = render(payload(steps=2, groups=2))
    path = tmp_path / "page.html"
    path.write_text(re.sub(r'(id="payload">.{2000})[^<]*', r"\1", text))
    visit(driver, path, ready=False)
    until(driver, "return document.getElementById('status').textContent.includes('may be cut')", 5)
    driver.get_log("browser")
    path.write_text(text)
    old = {"source": "delete window.DecompressionStream"}
    script = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", old)["identifier"]
    try:
        visit(driver, path, ready=False)
        until(driver, "return document.getElementById('status').textContent.includes('too old')", 5)
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script})


def test_a_run_with_nothing_in_it_has_a_page(driver, tmp_path):
    content = payload(steps=1, groups=1)
    content["groups"], content["runs"][0]["metrics"], content["runs"][0]["evaluations"] = [], [], []
    content["counts"].update(rollouts=0, groups=0, steps=0)
    (tmp_path / "page.html").write_text(render(content))
    for view, said in {"overview": "no metrics yet", "groups": "no rollouts", "evaluation": "No evaluation"}.items():
        visit(driver, tmp_path / "page.html", f"view={view}")
        assert said in one(driver, f"#{view}").text


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (768, False), (1360, True), (2200, False)])
def test_it_fits_every_screen_and_is_read_in_light_and_dark(driver, tmp_path, width, dark):
    path = tmp_path / "page.html"
    content = harmful(payload(runs=2, steps=3, groups=3))
    content["groups"][1]["rollouts"][0].update(completion="w" * 500, think="x" * 500, answer="y" * 300)
    path.write_text(render(content), encoding="utf-8")
    for view in (
        "overview",
        "groups&at=0.1.0",
        "groups&at=0.1.1",
        "groups&at=0.1.0&text=tokens",
        "evaluation",
        "setup",
    ):
        visit(driver, path, f"view={view}", width=width, dark=dark)
        wide = driver.execute_script(
            "const root = document.documentElement; return root.scrollWidth - root.clientWidth"
        )
        assert wide <= 0, view
        ratios = driver.execute_script(CONTRAST)
        assert min(ratios.values()) >= 4.5, (view, sorted(ratios.items(), key=lambda item: item[1])[:3])


#: the contrast of text to what lies under it, after WCAG, smallest per class
CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const paint = (colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const worst = {};
for (const node of document.querySelectorAll("body *")) {
  if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue;
  if (!node.checkVisibility() || node.disabled || node.namespaceURI.includes("svg")) continue;
  const under = [];
  for (let up = node; up; up = up.parentElement) under.unshift(getComputedStyle(up).backgroundColor);
  const back = paint(under), front = paint([...under, getComputedStyle(node).color]);
  const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
  const name = node.tagName + "." + node.className;
  worst[name] = Math.min(worst[name] ?? 99, (a + 0.05) / (b + 0.05));
}
return worst;
"""
