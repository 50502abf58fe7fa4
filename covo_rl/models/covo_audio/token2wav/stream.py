"""Speech while its codes come: blocks of codes to latents, and latents to a wave without seams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any, Protocol

import torch

from covo_rl.models.covo_audio.token2wav.configuration import CODE_FRAMES, HOP
from covo_rl.models.covo_audio.token2wav.inputs import CodesError, DecoderInputs, code_rows, frame_noise

if TYPE_CHECKING:
    from covo_rl.models.covo_audio.token2wav.decoder import Token2Wav

#: codes of the first pieces (15 are 0.6 s) and of all later ones, codes of the reply before a piece, and after it
BLOCKS, PAST, LOOK_AHEAD = (15, 30, 60), 150, 3


def latent_blocks(
    decoder: Token2Wav, codes: Iterable[int], prompt: DecoderInputs, blocks: Sequence[int], past: int,
    look_ahead: int, *, seed: int = 0, **options: Any,
) -> Iterator[tuple[torch.Tensor, bool]]:  # fmt: skip
    """De-normalised latents (1, E, Z) of one block after the other, and whether it is the last.

    A block is solved behind [prompt | past codes], whose context are the latents that were made of them, and before
    `look_ahead` codes, whose latents are thrown away. When the stream ends within a block and its look-ahead, the
    block is all that is left. A frame's noise depends on its place alone, not on the blocks.
    """
    flow = decoder.config.flow
    source = iter(codes)
    voice = prompt.codes_BL[0, :-1].tolist()
    before = CODE_FRAMES * len(voice)
    # `heard`: codes of the reply from number `dropped` on; `made`: their latents, as far as the `done` codes reach.
    # A prompt's overrun stands for the beginning of the first code.
    heard: list[int] = []
    dropped = done = 0
    known, made = prompt.context_BZE[0, : prompt.starts[0]].split([before, prompt.starts[0] - before])
    for size in chain(blocks, repeat(blocks[-1])):
        wanted = done + size + look_ahead
        if fresh := list(islice(source, wanted - len(heard))):
            (row,) = code_rows([fresh], flow.token_vocab_size, first=dropped + len(heard))
            heard += row.tolist()
        last = len(heard) < wanted
        end = len(heard) if last else done + size
        if not heard:
            raise CodesError("the stream ended without a code: there is nothing to say")
        context = torch.cat([known, made])
        frames = CODE_FRAMES * dropped + before, CODE_FRAMES * (dropped + len(heard)) + before
        noise = torch.cat([frame_noise(part, decoder.config, seed) for part in (range(before), range(*frames))])
        past_codes = {"prompt_codes": [voice + heard[:done]], "prompt_latent": [context]} if voice or done else {}
        x_ZE = decoder.solve([heard[done:]], **past_codes, speaker=prompt.speaker_BS, noise=noise[None], **options)[0]
        new = x_ZE[len(context) : before + CODE_FRAMES * end]
        yield decoder.denormalise(new).T[None], last
        if last:
            return
        unused = max(0, end - past)
        made = torch.cat([made, new.to(made)])[CODE_FRAMES * unused :]
        heard, dropped, done = heard[unused:], dropped + unused, end - unused


class StreamVocoder(Protocol):
    """A vocoder that can go on: a frame hears `past_frames` before it and `future_frames` after it.

    What else a wave depends on is its state (None at the beginning), which `carry` gives for the next piece, of the
    latents that are left out in front of it (B, E, Z) and the wave of the past frames that stay (B, T).
    """

    past_frames: int
    future_frames: int

    def __call__(self, latents_BEZ: torch.Tensor, state: Any = None) -> torch.Tensor: ...

    def carry(self, dropped_BEZ: torch.Tensor, spoken_BT: torch.Tensor, state: Any) -> Any: ...


def overlapped(vocoder: StreamVocoder, chunks: Iterable[tuple[torch.Tensor, bool]]) -> Iterator[torch.Tensor]:
    """Latent chunks (B, E, Z), and whether each is the last -> wave pieces (B, 1, samples), together as long as these.

    A chunk is vocoded behind past frames that have gone out, and its last frames wait until their future is there.
    """
    latents = state = None
    begin = 0
    for chunk, last in chunks:
        latents = chunk if latents is None else torch.cat([latents, chunk], dim=-1)
        end = latents.shape[-1] - (0 if last else vocoder.future_frames)
        if end <= begin:
            continue
        with torch.no_grad():
            wave = vocoder(latents, state)
        yield wave[..., HOP * begin : HOP * end]
        start = max(0, end - vocoder.past_frames)
        state = vocoder.carry(latents[..., :start], wave[:, 0, HOP * start : HOP * end], state)
        latents, begin = latents[..., start:], end - start
