"""Ragged batches: every row gets what it gets alone, every clip is encoded once, every miscount names its row."""

import numpy as np
import pytest
import torch

from covo_rl.models.slots import check_slots, expand_placeholders
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer

CLIP = "<|begofcAUDIO|><|cAUDIO|><|endofcAUDIO|>"
RNG = np.random.default_rng(0)
SHORT, LONG, MIDDLE = (RNG.normal(0, 0.1, n).astype(np.float32) for n in (9_600, 24_000 * 7, 24_000 * 2))
#: text, its clips: one clip, two clips of which one has three segments, none, and a clip that another row has too.
ROWS = [
    (f"{CLIP}What is this?", [SHORT]),
    (f"First {CLIP} then {CLIP} which is louder?", [LONG, MIDDLE]),
    ("No audio at all.", []),
    (f"Again {CLIP}", [SHORT]),
]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer([text for text, _ in ROWS] * 3, 320)
    # Large weights, so that a misplaced feature is visible in the logits.
    return tiny_covo_audio(
        tokenizer, encoder_width=32, decoder_width=48, decoder_layers=2, adapter_hidden=32, initializer_range=0.2
    )


def inputs_of(processor, rows, side="left"):
    clips = [clip for _, own in rows for clip in own]
    return processor(
        text=[text for text, _ in rows], audio=clips or None, sampling_rate=24000, text_kwargs={"padding_side": side}
    )


def real_logits(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_every_row_gets_what_it_gets_alone(tiny, side, order):
    model, processor = tiny
    together = real_logits(model, inputs_of(processor, [ROWS[i] for i in order], side))
    for i, got in zip(order, together, strict=True):
        alone = real_logits(model, inputs_of(processor, [ROWS[i]]))[0]
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=0)


def test_swapped_audio_changes_the_logits(tiny):
    model, processor = tiny
    text = ROWS[1][0]
    one = real_logits(model, inputs_of(processor, [(text, [MIDDLE, MIDDLE[::-1].copy()])]))[0]
    other = real_logits(model, inputs_of(processor, [(text, [MIDDLE[::-1].copy(), MIDDLE])]))[0]
    assert (one - other).abs().max() > 0.05


def test_the_encoder_sees_each_unique_clip_once_in_one_call(tiny):
    model, processor = tiny
    seen = []
    handle = model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        model(**inputs_of(processor, ROWS))
    handle.remove()
    assert seen == [5]  # SHORT once, LONG as three segments, MIDDLE


def test_text_only_batches_do_not_touch_the_encoder(tiny):
    model, processor = tiny
    handle = model.encoder.register_forward_pre_hook(lambda module, args: pytest.fail("encoder called"))
    inputs = inputs_of(processor, [ROWS[2], ("Hello", [])])
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        model(**inputs)
    handle.remove()


def test_fields_say_which_rows_belong_to_which_clip(tiny):
    _, processor = tiny
    inputs = inputs_of(processor, ROWS)
    assert inputs["input_features"].shape == (5, 128, 300)
    assert inputs["segment_clips"].tolist() == [0, 1, 1, 1, 2]
    assert inputs["clip_order"].tolist() == [0, 1, 2, 0]
    assert inputs["input_features_mask"].sum(1).tolist() == [3, 19, 19, 6, 13]
    slots = (inputs["input_ids"] == processor.audio_token_id).sum(1)
    assert slots.tolist() == [3, 44 + 13, 0, 3]


def test_nested_clips_equal_the_flat_list(tiny):
    _, processor = tiny
    flat = inputs_of(processor, ROWS)
    nested = processor(text=[t for t, _ in ROWS], audio=[own for _, own in ROWS], sampling_rate=24000)
    assert flat.keys() == nested.keys()
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


def test_one_clip_needs_no_list(tiny):
    _, processor = tiny
    want = processor(text=[ROWS[0][0]], audio=[SHORT], sampling_rate=24000)
    for audio in (SHORT, torch.from_numpy(SHORT), SHORT.tolist()):
        got = processor(text=ROWS[0][0], audio=audio, sampling_rate=24000)
        assert torch.equal(got["input_features"], want["input_features"])
        assert torch.equal(got["input_ids"], want["input_ids"])


def test_each_clip_may_have_its_own_rate(tiny):
    _, processor = tiny
    text = f"{CLIP}{CLIP}"
    out = processor(text=text, audio=[SHORT, SHORT], sampling_rate=[24000, 48000])
    assert out["clip_order"].tolist() == [0, 1]  # the same samples at another rate are another clip
    assert (out["input_ids"] == processor.audio_token_id).sum() == 3 + 2  # 0.4 s and 0.2 s


@pytest.mark.parametrize(
    "rows, message",
    [
        ([(f"{CLIP}", [SHORT]), (f"{CLIP}{CLIP}", [SHORT])], "row 1 has 2 .* placeholders but 1 of 2 clips are left"),
        ([(f"{CLIP}", [SHORT, SHORT])], "1 of 2 clips are left over after row 0"),
        ([("text", []), (f"{CLIP}", [])], "row 1 has 1 .* placeholders but 0 of 0 clips are left"),
    ],
)
def test_the_processor_names_the_row_of_a_miscount(tiny, rows, message):
    with pytest.raises(ValueError, match=message):
        inputs_of(tiny[1], rows)


def test_nested_clips_must_match_row_by_row(tiny):
    with pytest.raises(ValueError, match=r"row 0 has 1 .* placeholders but 2 clips"):
        tiny[1](text=[f"{CLIP}", f"{CLIP}{CLIP}"], audio=[[SHORT, SHORT], [SHORT]], sampling_rate=24000)


def test_the_model_names_the_row_of_a_miscount(tiny):
    model, processor = tiny
    inputs = inputs_of(processor, [ROWS[0], ROWS[3], ROWS[2]], "right")
    row, position = 1, (inputs["input_ids"][1] == processor.audio_token_id).nonzero()[0]
    inputs["input_ids"][row, position] = processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"row 1 has 2 audio placeholders.*\[3, 2, 0\].*\[3, 3\]"):
        model(**inputs)
    with pytest.raises(ValueError, match="row 0 has 3 audio placeholders"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_check_slots_by_hand():
    check_slots([3, 0, 5], [3, 5])
    check_slots([3, 8], [3, 5, 3])
    check_slots([], [])
    with pytest.raises(ValueError, match="row 0 has 4"):
        check_slots([4, 4], [3, 5])  # the totals agree, the rows do not
    with pytest.raises(ValueError, match="2 audio features are left over after row 1"):
        check_slots([3, 5], [3, 5, 2])


def test_placeholders_expand_in_order():
    assert expand_placeholders(["a<x>b<x>", "c", "<x>"], [2, 1, 3], "<x>") == ["a<x><x>b<x>", "c", "<x><x><x>"]


def test_embeds_with_audio_already_in_them_refuse_audio(tiny):
    model, processor = tiny
    inputs = inputs_of(processor, [ROWS[0]])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds already hold the audio"):
        model(inputs_embeds=embeds, input_features=inputs["input_features"])


def test_decoder_passes_keyword_arguments_to_its_attention(tiny):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, processor = tiny
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs.pop("marker", None))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    before = model.llm.config._attn_implementation
    model.llm.config._attn_implementation = "spy"
    try:
        embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
        model.get_decoder()(inputs_embeds=embeds, marker=7)
        assert seen == [7, 7]
        model(**inputs_of(processor, [ROWS[0]]), marker=8)
        assert seen == [7, 7, 8, 8]  # the decoder's two layers, not the encoder's
    finally:
        model.llm.config._attn_implementation = before


def test_chat_template_places_audio_and_tokenizes_in_one_call(tiny):
    _, processor = tiny
    chat = [
        {"role": "system", "content": "Listen."},
        {
            "role": "user",
            "content": [{"type": "audio", "audio": SHORT, "sampling_rate": 24000}, {"type": "text", "text": "What?"}],
        },
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\nListen.<|im_end|>\n<|im_start|>user\n{CLIP}What?<|im_end|>\n<|im_start|>assistant\n"
    )
    out = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    want = processor(text=text, audio=[SHORT], sampling_rate=24000)
    assert torch.equal(out["input_ids"], want["input_ids"])
    assert torch.equal(out["input_features"], want["input_features"])


def test_files_are_decoded_and_bad_files_are_named(tiny, tmp_path):
    import soundfile

    _, processor = tiny
    good, cut, gone = tmp_path / "good.wav", tmp_path / "cut.wav", tmp_path / "gone.wav"
    soundfile.write(good, SHORT, 24000, subtype="FLOAT")
    cut.write_bytes(good.read_bytes()[:30])
    out = processor(text=CLIP, audio=[str(good)])
    assert torch.equal(
        out["input_features"], processor(text=CLIP, audio=[SHORT], sampling_rate=24000)["input_features"]
    )
    for bad in (cut, gone):
        with pytest.raises(ValueError, match=bad.name):
            processor(text=CLIP, audio=[str(bad)])
    with pytest.raises(ValueError, match=r"clip 1: 2 of 2400 samples are NaN"):
        processor(text=CLIP + CLIP, audio=[SHORT, np.r_[np.zeros(2398), np.nan, np.nan]], sampling_rate=24000)


def test_encoding_eight_clips_at_once_is_not_slower_per_clip(tiny):
    import time

    model, processor = tiny
    clips = [RNG.normal(0, 0.1, 72_000).astype(np.float32) for _ in range(8)]
    features = [processor.feature_extractor.clip(clip, 24000) for clip in clips]
    batch = torch.cat([mel for mel, _ in features])

    def seconds(run):
        times = []
        for _ in range(5):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    with torch.no_grad():
        together = seconds(lambda: model.get_audio_features(batch))
        apart = seconds(lambda: [model.get_audio_features(mel) for mel, _ in features])
    assert together < 1.2 * apart  # a fifth of slack for a busy machine
