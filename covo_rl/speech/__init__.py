"""Speech out: codes from speech and back, their training, their measures, rows of them.

    wave 24 kHz -> SpeechTokenizer -> codes 25 a second -> Token2Wav -> wave 24 kHz
                   tokenizer.py       grid.py              models/covo_audio/token2wav

Axes: B batch, T samples, L codes, K codebook, Z 10 ms frames (4 a code), E mel bins, W width. Importing this imports no
torch.
"""

from __future__ import annotations

#: the shipped pair, which knows ten digits
SHIPPED_TOKENIZER, SHIPPED_DECODER = "builtin:speech_tokenizer", "builtin:speech_decoder"
#: what asks a model to say a text, in pre-training and in evaluation; a newline and the text follow
SAY_ALOUD = "Say the text aloud."
