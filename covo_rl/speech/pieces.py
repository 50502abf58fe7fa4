"""Text as the CTC head writes it: words of a small vocabulary, or BPE pieces; output 0 is the blank.

Case and punctuation are dropped, as for word error rates. Kept in `pieces.json`, a file of the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from covo_rl.types import UserError, visible

BLANK, UNKNOWN = "<blank>", "<unknown>"
_SPACE = "▁"


class PiecesError(UserError, ValueError):
    """A text that these pieces cannot write, or a file of pieces that cannot be read."""


class Pieces:
    """Words to ids above 0 and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.token_to_id(BLANK) != 0:
            raise PiecesError(f"pieces: id 0 must be {BLANK}, the blank of CTC")
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @classmethod
    def learn(cls, texts: Sequence[str], size: int | None = None) -> Pieces:
        """At most `size` outputs of BPE with the blank; without a size every word of the texts is one."""
        kind = models.WordLevel(unk_token=UNKNOWN) if size is None else models.BPE(unk_token=UNKNOWN)
        tokenizer = Tokenizer(kind)
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}'\s]+"), " "),
            normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        ])  # fmt: skip
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE)
        tokenizer.decoder = decoders.Metaspace(_SPACE)
        special = [BLANK, UNKNOWN]
        if size is None:
            trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
        else:
            trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def read(cls, path: Path) -> Pieces:
        """Raises PiecesError for a file that is none."""
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise PiecesError(f"{path}: the pieces of the tokenizer's text cannot be read: {error}") from error
        except Exception as error:  # tokenizers raises plain Exception for what it cannot parse
            if type(error) is not Exception:
                raise
            raise PiecesError(f"{path}: no file of pieces: {visible(error)}") from error

    def write(self, path: Path) -> None:
        path.write_text(self.tokenizer.to_str(), encoding="utf-8")

    def words(self, text: str) -> list[list[int]]:
        """Ids of every word of the text; one without a letter or digit has none.

        Raises:
            PiecesError: a word that has no piece, named.
        """
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        words = [(word, self.tokenizer.encode(word).ids) for word in text.split()]
        if strange := [word for word, ids in words if unknown in ids]:
            raise PiecesError(f"the tokenizer was not trained on {visible(strange[0])!r:.60}, which it cannot write")
        return [ids for _, ids in words]

    def normal(self, text: str) -> str:
        """The text as these pieces would write it, whether they can or not: lower case, no punctuation."""
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def greedy(self, best_L: Sequence[int]) -> str:
        """The text of a best output per code: repeats are one, blanks none (Graves et al. 2006)."""
        return self.text([id for id, before in zip(best_L, [0, *best_L[:-1]], strict=True) if id not in (0, before)])
