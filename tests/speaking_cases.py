"""A small model that speaks 40 codes, and a small decoder of them: random weights, so what they say means nothing."""

import torch

from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.configuration import FlowConfig, TransformerConfig, VocoderConfig
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer

FIRST_CODE = 292


def speaking_model(audio_codes=40):
    """Model and processor."""
    tokenizer = tiny_tokenizer(["What is this? Louder, please. No audio."] * 3, 320)
    sizes = {"encoder_width": 32, "decoder_width": 48, "decoder_layers": 2, "adapter_hidden": 32}
    model, processor = tiny_covo_audio(tokenizer, **sizes, audio_codes=audio_codes, initializer_range=0.2)
    assert processor.first_code_id == FIRST_CODE
    return model, processor


def small_decoder():
    body = TransformerConfig(num_layers=1, hidden_size=32, ffn_hidden_size=32, num_heads=2)
    flow = FlowConfig(token_vocab_size=40, token_input_dim=8, z_dim=8, spkr_embed_dim=4, transformer=body)
    torch.manual_seed(0)
    decoder = Token2Wav(Token2WavConfig(flow, VocoderConfig((16, 15), (32, 30), 16, (3,), ((1,),)))).eval()
    for parameter in decoder.token2latent.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder
