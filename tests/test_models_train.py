"""Training: LoRA on the decoder, full fine-tuning, checkpointing, a frozen encoder, saving, merging, resizing."""

import re
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from covo_rl.models.covo_audio import CovoAudioForConditionalGeneration, CovoAudioProcessor
from covo_rl.models.covo_audio.processing import make_labels
from covo_rl.models.tiny import fold_feature_statistics, tiny_covo_audio, tiny_tokenizer

CLIP = "<|begofcAUDIO|><|cAUDIO|><|endofcAUDIO|>"
RNG = np.random.default_rng(2)
WAVE = RNG.normal(0, 0.1, 24_000 * 4).astype(np.float32)
DECODER_LORA = r"llm\.model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"


def build(**options):
    tokenizer = tiny_tokenizer(["What is this? A dog."] * 3, 320)
    sizes = {"encoder_width": 32, "decoder_width": 48, "decoder_layers": 2, "adapter_hidden": 32}
    return tiny_covo_audio(tokenizer, **{**sizes, "initializer_range": 0.1, **options})


def batch_of(processor):
    texts = [f"{CLIP}What is this? A dog.<|im_end|>", "What is this?<|im_end|>"]
    batch = processor(text=texts, audio=[WAVE], sampling_rate=24000)
    first_code, mask = processor.first_code_id, batch["attention_mask"]
    batch["labels"] = make_labels(batch["input_ids"], [27, 2], first_code, attention_mask=mask)
    return batch


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def lora(model, **options):
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=DECODER_LORA, **options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft_model


def checkpointing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()


def test_full_fine_tuning_reaches_every_part():
    model, processor = build()
    model.train()
    grads = gradients(model, batch_of(processor))
    missing = {name for name, _ in model.named_parameters()} - set(grads)
    assert missing == {"encoder.embed_positions.weight"}  # sinusoids, fixed as in Whisper
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if not name.endswith("k_proj.bias"))


def test_gradient_checkpointing_changes_no_gradient():
    model, processor = build()
    model.train()
    batch = batch_of(processor)
    plain = gradients(model, batch)
    checkpointing(model)
    saved = gradients(model, batch)
    assert plain.keys() == saved.keys()
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], atol=1e-7, rtol=1e-5)


def test_checkpointing_recomputes_the_decoder_only_when_the_encoder_is_frozen():
    model, processor = build()
    for part in (model.encoder, model.audio_adapter):
        part.requires_grad_(False)
    model.train()
    checkpointing(model)
    calls = {"encoder": 0, "decoder": 0}

    def count(name):
        def hook(module, args, kwargs, out):
            calls[name] += 1

        return hook

    model.encoder.layers[0].self_attn.register_forward_hook(count("encoder"), with_kwargs=True)
    model.llm.model.layers[0].self_attn.register_forward_hook(count("decoder"), with_kwargs=True)
    gradients(model, batch_of(processor))
    assert calls == {"encoder": 1, "decoder": 2}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_lora_trains_the_decoder_and_leaves_the_encoder_out_of_autograd(checkpoint):
    model, processor = build()
    if checkpoint:
        checkpointing(model)
    peft_model = lora(model)
    peft_model.train()
    outputs = []
    model.encoder.register_forward_hook(lambda module, args, out: outputs.append(out.last_hidden_state.requires_grad))
    model.audio_adapter.register_forward_hook(lambda module, args, out: outputs.append(out.requires_grad))
    grads = gradients(peft_model, batch_of(processor))
    assert outputs == [False, False]
    assert len(grads) == 8 and all("lora_" in name for name in grads)  # 2 layers, q and v, A and B
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_lora_gradients_are_the_same_with_checkpointing():
    grads = []
    for checkpoint in (False, True):
        model, processor = build()
        if checkpoint:
            checkpointing(model)
        peft_model = lora(model)
        peft_model.train()
        grads.append(gradients(peft_model, batch_of(processor)))
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-7, rtol=1e-5)


def test_a_training_adapter_over_a_frozen_encoder_gets_gradients():
    model, processor = build()
    model.encoder.requires_grad_(False)
    model.train()
    grads = gradients(model, batch_of(processor))
    assert not any(name.startswith("encoder.") for name in grads)
    assert grads["audio_adapter.downsample_layers.0.conv1d.weight"].abs().max() > 0


def test_a_merged_adapter_saves_published_keys_and_the_same_model(tmp_path):
    model, processor = build()
    keys = set(model.state_dict())
    batch = batch_of(processor)
    with torch.no_grad():
        base = model(**batch).logits
        peft_model = lora(model).eval()
        want = peft_model(**batch).logits
    assert (want - base).abs().max() > 1e-2
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = CovoAudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert set(again.state_dict()) == keys
    assert all(re.match(r"(llm|encoder|audio_adapter)\.", name) for name in keys)
    with torch.no_grad():
        got = again.eval()(**batch_of(CovoAudioProcessor.from_pretrained(tmp_path))).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_an_adapter_saves_and_loads(tmp_path):
    from peft import PeftModel

    model, processor = build()
    batch = batch_of(processor)
    peft_model = lora(model).eval()
    with torch.no_grad():
        want = peft_model(**batch).logits
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build()[0], tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, want)


def test_peft_generates_with_audio():
    model, processor = build()
    peft_model = lora(model).eval()
    inputs = processor(text=[f"{CLIP}What?", "What?"], audio=[WAVE], sampling_rate=24000)
    out = peft_model.generate(**inputs, max_new_tokens=4, num_return_sequences=2, do_sample=True)
    assert out.shape[0] == 4


def test_resizing_the_vocabulary_keeps_the_logits():
    model, processor = build()
    inputs = processor(text=[f"{CLIP}What?"], audio=[WAVE], sampling_rate=24000)
    size = model.config.llm_config.vocab_size
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(size + 7)
        after = model(**inputs).logits
    assert after.shape[-1] == size + 7 == model.config.llm_config.vocab_size
    torch.testing.assert_close(after[..., :size], before)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_logits_to_keep_are_the_last_ones():
    model, processor = build()
    batch = batch_of(processor)
    labels = batch.pop("labels")
    with torch.no_grad():
        full = model(**batch)
        assert full.loss is None
        torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, full.logits[:, -3:])
        loss = model(**batch, labels=labels).loss
    shifted = torch.nn.functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, shifted)


def test_the_trainer_takes_a_step(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, processor = build()
    batch = batch_of(processor)
    before = model.llm.lm_head.weight.detach().clone()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=[0] * 6, data_collator=lambda rows: dict(batch))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model.llm.lm_head.weight, before)


def test_folded_statistics_standardise_the_mel_inside():
    model, processor = build()
    mel = processor.feature_extractor.clip(WAVE[:72000], 24000)[0]
    mean, std = mel.mean((0, 2)), mel.std((0, 2)) + 0.1
    conv = model.encoder.conv1
    with torch.no_grad():
        want = conv((mel - mean[None, :, None]) / std[None, :, None])
        fold_feature_statistics(model, mean, std)
        got = conv(mel)
    torch.testing.assert_close(got[..., 1:-1], want[..., 1:-1], atol=1e-5, rtol=1e-5)
    assert (got[..., 0] - want[..., 0]).abs().max() > 1e-2  # zero padding stands for mel 0 there
    with pytest.raises(ValueError, match="every deviation must be positive"):
        fold_feature_statistics(model, mean, torch.zeros(128))
