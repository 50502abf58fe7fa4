"""What a code must tell, in training: the words, the sound given the voice, and the pitch contour.

All three read code embeddings (B, L, W) alone; only the sound is also told who speaks. Padding is zero before every
convolution, so that rows of a batch are as they are alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_rl.models.covo_audio.token2wav.mel import MEL_BINS
from covo_rl.speech.grid import CODE_FRAMES

#: log2 of the fundamental, relative to the clip, is learned times this
PITCH_SCALE = 3.0


class AsrHead(nn.Module):
    """(B, L, W) -> CTC logits (B, L, pieces); output 0 is the blank."""

    def __init__(self, width: int, hidden: int, pieces: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, hidden, 5, padding=2)
        self.second = nn.Conv1d(hidden, hidden, 5, padding=2)
        self.output = nn.Linear(hidden, pieces)

    def forward(self, embeds_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        mask_B1L = mask_BL[:, None]
        hidden = F.gelu(self.first(embeds_BLW.mT * mask_B1L))
        return self.output(F.gelu(self.second(hidden * mask_B1L)).mT)


class FrameHead(nn.Module):
    """(B, L, W) -> (B, 4L, outputs) at 100 Hz: conv, transposed conv (kernel 8, stride 4, padding 2), conv."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, hidden, 5, padding=2)
        self.up = nn.ConvTranspose1d(hidden, hidden, 2 * CODE_FRAMES, stride=CODE_FRAMES, padding=CODE_FRAMES // 2)
        self.output = nn.Conv1d(hidden, outputs, 5, padding=2)

    def forward(self, embeds_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        mask_B1L = mask_BL[:, None]
        hidden = F.gelu(self.first(embeds_BLW.mT * mask_B1L))
        hidden = F.gelu(self.up(hidden * mask_B1L))
        return self.output(hidden * mask_B1L.repeat_interleave(CODE_FRAMES, -1)).mT


class Heads(nn.Module):
    """`asr`, `mel` and `pitch`, and the statistics (64,) that standardise the log-mel which `mel` learns."""

    mean_E: Tensor
    deviation_E: Tensor

    def __init__(self, width: int, hidden: int, pieces: int) -> None:
        super().__init__()
        self.asr = AsrHead(width, hidden, pieces)
        self.mel = FrameHead(width + MEL_BINS, hidden, MEL_BINS)
        self.pitch = FrameHead(width, hidden, 2)
        self.register_buffer("mean_E", torch.zeros(MEL_BINS))
        self.register_buffer("deviation_E", torch.ones(MEL_BINS))

    def read_pitch(self, embeds_BLW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Voicing logits (B, 4L), and log2 F0 (B, 4L) relative to the mean over the clip's voiced frames."""
        voicing_BZ, scaled_BZ = self.pitch(embeds_BLW, mask_BL).unbind(-1)
        return voicing_BZ, scaled_BZ / PITCH_SCALE

    def draw_mel(self, embeds_BLW: Tensor, speaker_BE: Tensor, mask_BL: Tensor) -> Tensor:
        """Standardised log-mel (B, 4L, 64); `speaker_BE` is the mean standardised log-mel of another clip."""
        speaker_BLE = speaker_BE[:, None].expand(-1, embeds_BLW.shape[1], -1)
        return self.mel(torch.cat([embeds_BLW, speaker_BLE], -1), mask_BL)
