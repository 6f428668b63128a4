"""Text to token ids, equal to `bert_en_uncased_preprocess`; uses the fast kernel where it equals the exact one."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from pipeline.encoders.cache import hash_file, remembered
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import SavedModelSpec, read_flag
from pipeline.errors import EncoderError

# Code points that tensorflow_text's FastBertTokenizer treats unlike the ops inside the published preprocessor. The
# tests sweep all of Unicode for them.
_DIFFERENT = (
    "\u1680\u1b4e\u1b4f\u1b7f\u2028\u2029"
    "\U00010d6e\U000113d4\U000113d5\U000113d7\U000113d8\U00011be1\U00016d6d\U00016d6e\U00016d6f\U0001e5ff"
)
_DIFFERENT_CASED = _DIFFERENT + "\u00a0\u2000-\u200a\u202f\u205f\u3000"

# The ops by which a preprocessor of the BERT family is recognised.
_WORDPIECE_OPS = frozenset(("RegexSplitWithOffsets", "WordpieceTokenizeWithOffsets"))
PARITY_TEXTS = (
    "Hello, World! It's 3.14 o'clock.",
    "naïve café, Straße ΣΊΣΥΦΟΣ ﬁ ½ Å",
    "日本語 テスト 안녕 мир עברית हिन्दी",
    "tab\tnew\nline \u200bzero\u00adwidth \u2028sep \x00nul \ufffd",
    "[CLS] [SEP] ##ing unaffable antidisestablishmentarianism " + "x" * 101,
    "👩‍👩‍👧 emoji ™ … “quotes” — dash",
)


@dataclass(frozen=True)
class Vocabulary:
    """The WordPiece vocabulary and case rule of a preprocessor.

    Attributes:
      pieces: piece i has token id i.
      lower_case: whether text is case folded and stripped of accents first.
    """

    pieces: tuple[str, ...]
    lower_case: bool = True

    def id_of(self, piece: str) -> int:
        try:
            return self.pieces.index(piece)
        except ValueError:
            raise EncoderError(f"the vocabulary has no {piece}; it is not a BERT vocabulary") from None

    @classmethod
    def read(cls, path: str, lower_case: bool) -> Vocabulary:
        lines = Path(path).read_bytes().decode("utf-8", errors="surrogateescape").split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return cls(tuple(line.rstrip("\r") for line in lines), lower_case)


def find_vocabulary(spec: SavedModelSpec) -> Optional[Vocabulary]:
    """The vocabulary of a BERT preprocessor, or of an encoder that has its own; None if there is none."""
    paths = [asset for asset in spec.assets if asset.endswith(".txt")]
    if len(paths) != 1:
        return None
    path = str(Path(spec.folder, paths[0]))
    if _WORDPIECE_OPS <= spec.ops:
        return Vocabulary.read(path, lower_case="CaseFoldUTF8" in spec.ops)
    if "do_lower_case" in spec.methods:
        return Vocabulary.read(path, lower_case=read_flag(spec.folder, "do_lower_case"))
    return None


def agrees_with_preprocessor(vocabulary: Vocabulary, folder: str) -> bool:
    """Whether our tokens equal those of a preprocessor SavedModel on a few difficult texts; cached."""
    import tensorflow_text as text

    graph = hash_file(str(Path(folder, "saved_model.pb")))
    ours = [text.__version__, _DIFFERENT, _DIFFERENT_CASED, str(vocabulary.lower_case), *vocabulary.pieces]
    digest = hashlib.sha256("\n".join([graph, *PARITY_TEXTS, *ours]).encode("utf-8", "surrogateescape")).hexdigest()
    return remembered(
        f"tokenizer-{digest[:24]}",
        lambda: _compare_tokens(vocabulary, folder),
        lambda value: isinstance(value, bool),
    )


def _compare_tokens(vocabulary: Vocabulary, folder: str) -> bool:
    tf = load_tensorflow()
    expected = tf.saved_model.load(folder).tokenize(tf.constant(PARITY_TEXTS))
    while expected.ragged_rank > 1:
        expected = expected.merge_dims(-2, -1)
    ids, splits = load_tokenizer(vocabulary).tokenize(PARITY_TEXTS)
    return np.array_equal(ids, expected.flat_values.numpy()) and np.array_equal(splits, expected.row_splits.numpy())


@functools.lru_cache(maxsize=2)
def load_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A tokeniser for a vocabulary; building one takes half a second, so a process keeps it."""
    return Tokenizer(vocabulary)


class Tokenizer:
    """Turns texts into token ids, without [CLS], [SEP], cutting or padding.

    Attributes:
      is_continuation: `[V]` which token ids do not begin a word; punctuation is a word, so no word begins with `##`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        import tensorflow as tf
        import tensorflow_text as text

        pieces = list(vocabulary.pieces)
        self.is_continuation = np.array([piece.startswith("##") for piece in pieces])
        self._different = re.compile(f"[{_DIFFERENT if vocabulary.lower_case else _DIFFERENT_CASED}]")
        self._fast: Any = text.FastBertTokenizer(
            vocab=pieces, lower_case_nfd_strip_accents=vocabulary.lower_case, token_out_type=tf.int32
        )
        table = tf.lookup.StaticVocabularyTable(
            tf.lookup.KeyValueTensorInitializer(pieces, tf.range(len(pieces), dtype=tf.int64)), num_oov_buckets=1
        )
        self._exact: Any = text.BertTokenizer(table, lower_case=vocabulary.lower_case, token_out_type=tf.int32)

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises texts.

        Returns:
          ids: int32 `[total]`, the token ids of all texts one after the other.
          splits: int64 `[len(texts) + 1]`; text i has `ids[splits[i]:splits[i + 1]]`.
        """
        if not texts:
            return np.zeros(0, np.int32), np.zeros(1, np.int64)
        exact = [i for i, text in enumerate(texts) if not text.isascii() and self._different.search(text)]
        if not exact:
            return self._run(self._fast, texts)
        ids, splits = self._run(self._fast, texts)
        exact_ids, exact_splits = self._run(self._exact, [texts[i] for i in exact])
        parts = np.split(ids, splits[1:-1])
        for i, part in zip(exact, np.split(exact_ids, exact_splits[1:-1]), strict=True):
            parts[i] = part
        lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        return np.concatenate(parts), np.concatenate(([0], np.cumsum(lengths)))

    @staticmethod
    def _run(kernel: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens = kernel.tokenize(texts)
        while tokens.ragged_rank > 1:  # words and pieces to one list of pieces
            tokens = tokens.merge_dims(-2, -1)
        return tokens.flat_values.numpy(), tokens.row_splits.numpy()
