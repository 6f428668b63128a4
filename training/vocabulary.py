"""Chooses the student's WordPiece vocabulary: those of the teacher's pieces that a corpus uses most.

So nearly every word is cut as the teacher cuts it, and its word embeddings mean from the start what they mean to the
teacher. A rare word falls into shorter pieces, in the end into characters. Of these all of ASCII are kept, and others
that the corpus has a few times.

The order is: special tokens, single characters, single letters and digits inside a word (##), pieces by falling
frequency.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from pipeline.errors import ConfigError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MIN_CHARACTER_COUNT = 20
AT_ONCE = 1000  # texts or words that TensorFlow gets


def choose_vocabulary(texts: Iterable[str], pieces: Sequence[str], size: int) -> list[str]:
    """Returns `size` of the teacher's pieces; the same texts, the same vocabulary.

    Raises:
      ConfigError: if the texts use too few.
    """
    word_counts = count_words(texts)
    counts = count_pieces(word_counts, pieces)
    known = set(pieces)
    characters = sorted(known & ({*map(chr, range(128))} | frequent_characters(word_counts)))
    inner = ["##" + character for character in characters if character.isalnum() and "##" + character in known]
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    chosen = dict.fromkeys(itertools.chain(SPECIAL, characters, inner, ranked))
    if len(chosen) < size:
        raise ConfigError(f"the texts use {len(chosen)} pieces, fewer than the {size} wanted; give more texts")
    return list(itertools.islice(chosen, size))


def count_words(texts: Iterable[str]) -> collections.Counter[str]:
    """Counts the words of all texts, split and folded by the operations of the exported preprocessor."""
    from tensorflow_text.python.ops.bert_tokenizer import BasicTokenizer  # not exported at the top

    tokenizer = BasicTokenizer(lower_case=True)
    counts: collections.Counter[bytes] = collections.Counter()
    for block in _blocks(texts):
        counts.update(tokenizer.tokenize(block).flat_values.numpy().tolist())
    return collections.Counter({word.decode("utf-8", "replace"): count for word, count in counts.items()})


def frequent_characters(word_counts: Mapping[str, int]) -> set[str]:
    """Returns the characters that occur MIN_CHARACTER_COUNT times, each word weighted by its count."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in word_counts.items():
        for character in word:
            counts[character] += count
    return {character for character, count in counts.items() if count >= MIN_CHARACTER_COUNT}


def count_pieces(word_counts: Mapping[str, int], pieces: Sequence[str]) -> collections.Counter[str]:
    """Counts how often each piece is used, given how often each word is."""
    tokenize = tokenizer_of(pieces)
    counts: collections.Counter[str] = collections.Counter()
    for words in _blocks(word_counts):
        for word, ids in zip(words, tokenize(words), strict=True):
            for piece in ids:
                counts[pieces[piece]] += word_counts[word]
    return counts


def tokenizer_of(vocabulary: Sequence[str]) -> Callable[[list[str]], list[list[int]]]:
    """Texts to token ids without [CLS] and [SEP]."""
    import tensorflow as tf
    import tensorflow_text as text

    from pipeline.encoders.saving import vocabulary_file

    with vocabulary_file(vocabulary) as path:
        tokenizer = text.BertTokenizer(path, lower_case=True, token_out_type=tf.int32)
    return lambda texts: tokenizer.tokenize(texts).merge_dims(1, 2).to_list()


def _blocks(texts: Iterable[str]) -> Iterable[list[str]]:
    texts = iter(texts)
    while block := list(itertools.islice(texts, AT_ONCE)):
        yield block
