"""Between a checkpoint's files and its prompts: templates, what they may not write, and files that an export keeps."""

import json

import numpy as np
import pytest
import transformers
from transformers import AutoProcessor

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig
from covo_rl.data import DataError, load_examples
from covo_rl.export.merged import write_merged
from covo_rl.models import family_class, load_family
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny import tiny_model
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.types import Clip, Example

TEXT = {"type": "text", "text": "What do you hear?"}
ONE = [{"role": "user", "content": [{"type": "audio"}, TEXT]}]
TWO = [{"role": "user", "content": [{"type": "audio"}, {"type": "audio"}, TEXT]}]
#: as convert_audioflamingo3_to_hf.py writes it: one token for a message, however many clips it has
PUBLISHED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set n = namespace(audio=false, text='') %}"
    "{% for c in m['content'] %}{% if c['type'] == 'audio' %}{% set n.audio = true %}"
    "{% else %}{% set n.text = n.text + c['text'] %}{% endif %}{% endfor %}"
    "{% if n.audio %}<sound>{% endif %}{{ n.text }}<|im_end|>\n{% endfor %}"
)
DATED = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] }}"
    "{% else %}{{ 'Today is ' + strftime_now('%d %B %Y') }}{% endif %}{{ '<sound>' }}"
)


@pytest.fixture(params=["audioflamingo3", "musicflamingo", "glmasr"])
def family(request):
    return family_class(request.param)(*tiny_model(request.param))


def flamingo(template):
    family = family_class("audioflamingo3")(*tiny_model("audioflamingo3"))
    family.processor.chat_template = template
    return family


def test_a_template_with_one_place_for_audio_refuses_two_clips():
    family = flamingo(PUBLISHED)
    assert family.render(ONE).count("<sound>") == 1
    with pytest.raises(ValueError, match=r"writes 1 audio tokens \(<sound>\) for 2 clips; it has place for one"):
        family.render(TWO)
    with pytest.raises(ValueError, match=r"writes 0 audio tokens .* for 1 clips"):
        flamingo("{{ 'hello' }}").render(ONE)


def test_what_a_template_refuses_is_said_with_the_row():
    family = flamingo("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="row r1: the chat template cannot take this conversation: roles must altern"):
        build_prompt(Example("r1", (), "What?"), family, ClipStore(), PromptConfig())


@pytest.mark.parametrize(
    "template",
    ["{{ 'x' + messages[0]['content'] }}", "{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}",
     "{% include 'x' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages[0].none.more }}", 5],
)  # fmt: skip
def test_a_template_that_fails_is_named_with_the_row(template):
    with pytest.raises(PromptError, match="row r1: the chat template cannot take this conversation: "):
        build_prompt(Example("r1", (), "What?"), flamingo(template), ClipStore(), PromptConfig())


def test_of_named_templates_the_default_one_is_taken():
    model, processor = tiny_model("audioflamingo3")
    processor.tokenizer.chat_template = {"tool_use": "{{ 'no' }}", "default": PUBLISHED}
    named = AudioProcessor(processor.feature_extractor, processor.tokenizer, "<sound>")
    assert family_class("audioflamingo3")(model, named).render(ONE).count("<sound>") == 1


@pytest.mark.parametrize("rate", [0, -8000, 16_000.5, float("nan"), None, "16000"])
def test_a_rate_that_is_none_is_refused_by_count_and_by_features(rate):
    family = flamingo(PUBLISHED)
    for make in (family.clip_slots, family.clip_features):
        with pytest.raises(ValueError, match="is not a positive whole number of Hz"):
            make(np.ones(16_000, np.float32), rate)


@pytest.mark.parametrize("date", ["strftime_now('%d %B %Y')", "strftime_now(format='%d %B %Y')"])
def test_a_template_never_writes_todays_date(date):
    family = flamingo(DATED.replace("strftime_now('%d %B %Y')", date))
    row = Example("r7", (Clip(array=np.zeros(16_000, np.float32), sampling_rate=16_000),), "What?")
    with pytest.raises(PromptError, match=r"row r7: .* it would write today's date \(%d %B %Y\).*--system_prompt"):
        build_prompt(row, family, ClipStore(), PromptConfig(instruction=""))
    wording = PromptConfig(instruction="", system_prompt="Today is 9 April 2025")
    assert build_prompt(row, family, ClipStore(), wording).text == "Today is 9 April 2025<sound>"


def test_a_picture_is_refused_by_name_in_messages_and_rows(tmp_path):
    family = flamingo(PUBLISHED)
    with pytest.raises(ValueError, match="a message holds image, video; only text and audio can be taken here"):
        family.render([{"role": "user", "content": [{"type": "video"}, {"type": "image"}, TEXT]}])
    row = {"id": "r1", "audio": {"array": [0.0] * 1600, "sampling_rate": 16_000}, "question": "What?", "answer": "a"}
    empty = {"image": None, "images": [], "video": "", "videos": float("nan")}
    assert load_examples([row | empty])[0].id == "r1"
    for name, value in (("image", "a.png"), ("images", [{"bytes": b"x"}]), ("video", np.zeros((2, 2)))):
        with pytest.raises(DataError, match=f"it has {name} .*, which no prompt can hold here: drop the column"):
            load_examples([row, row | {"id": "r2", name: value}])
    rows = load_examples([{"id": "r3", "video": row["audio"], "question": "What?"}], columns="audio=video")
    assert len(rows[0].clips) == 1  # the sound of a video is sound


def test_a_clip_beyond_the_limit_is_refused_with_its_row(family):
    limit = family.max_clip_seconds
    clip = Clip(array=np.zeros(round((limit + 0.5) * 2000), np.float32), sampling_rate=2000)
    with pytest.raises(
        PromptError, match=rf"row long: a clip of {limit + 0.5:.2f} s: {family.title} takes {limit:g} s"
    ):
        build_prompt(Example("long", (clip,), "What?"), family, ClipStore(), PromptConfig())
    short = Clip(array=np.zeros(30, np.float32), sampling_rate=2000)
    with pytest.raises(
        PromptError, match=f"row short: a clip of 15.0 ms is too short for one audio slot of {family.title}"
    ):
        build_prompt(Example("short", (short,), "What?"), family, ClipStore(), PromptConfig())


def test_slots_are_counted_without_features_as_with_them(family):
    for samples, rate in [(1279, 16_000), (1281, 16_000), (4_410, 44_100), (31_999, 8000), (480_160, 16_000)]:
        wave = np.zeros(samples, np.float32)
        assert family.clip_slots(wave, rate) == family.clip_features(wave, rate).slots, (samples, rate)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_stock_processor_loads_from_a_merged_export_with_the_published_settings(tmp_path, legacy):
    """Its settings go over byte for byte; an older chat_template.json does not hide the template of training."""
    model, processor = tiny_model("audioflamingo3")
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    stock = transformers.AudioFlamingo3Processor(processor.feature_extractor, processor.tokenizer, max_audio_len=90)
    stock.chat_template = PUBLISHED
    stock.save_pretrained(base)
    if legacy:
        (base / "chat_template.jinja").unlink()
        (base / "chat_template.json").write_text(json.dumps({"chat_template": PUBLISHED}))
    family = load_family(str(base))
    assert family.processor.chat_template == PUBLISHED
    out.mkdir()
    write_merged(family, out)
    assert (out / "processor_config.json").read_bytes() == (base / "processor_config.json").read_bytes()
    again = AutoProcessor.from_pretrained(out)
    assert (type(again), again.max_audio_len, again.chat_template) == (type(stock), 90, PUBLISHED)
