"""Learns the built-in encoder's WordPiece vocabulary from a file of sentences: the same file, the same vocabulary.

    python training/learn_vocabulary.py SENTENCES.txt.gz pipeline/encoders/vocabulary.txt

The order is: special tokens, single characters, single characters inside a word (##), pieces by falling frequency.
Words are split by the very operations of the exported preprocessor, so pieces occur in its output as they did here. The
vocabulary is learned from the first `--learn_lines` lines and judged by the `--check_lines` lines after them.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import os
import string
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ASCII = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
MARKS = sorted("‘’“”–—•·§©®°±×÷−√∞≈≠≤≥→←€£¥¢αβγδεζηθικλμνξοπρστυφχψω")
MIN_CHARACTER_COUNT = 20
LINES_AT_ONCE = 1000


def assemble(characters: Iterable[str], ranked: Iterable[str], size: int) -> list[str]:
    """Puts special tokens, characters and the most frequent pieces together.

    Args:
      characters: single characters that must be in the vocabulary beyond ASCII.
      ranked: learned pieces, most frequent first.
      size: number of pieces wanted.

    Returns:
      `size` distinct pieces.

    Raises:
      ValueError: if there are too few pieces.
    """
    alphabet = ASCII + sorted(set(characters) - set(ASCII))
    pieces = dict.fromkeys(itertools.chain(SPECIAL, alphabet, ("##" + c for c in alphabet), ranked))
    if len(pieces) < size:
        raise ValueError(f"{len(pieces)} pieces are fewer than the {size} wanted; learn from more lines")
    return list(itertools.islice(pieces, size))


def frequent_characters(word_counts: Mapping[str, int], at_least: int) -> set[str]:
    """Returns the characters that occur at least so often, each word weighted by its count."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in word_counts.items():
        for character in word:
            counts[character] += count
    return {character for character, count in counts.items() if count >= at_least}


def read_lines(path: str, start: int, stop: int) -> Iterator[list[str]]:
    """Yields lists of at most LINES_AT_ONCE lines out of lines [start, stop) of a text or gzip file."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = (line.rstrip("\n") for line in itertools.islice(file, start, stop))
        while block := list(itertools.islice(lines, LINES_AT_ONCE)):
            yield block


def count_words(blocks: Iterable[list[str]]) -> collections.Counter[str]:
    """Counts the words of all lines, split and folded as the uncased preprocessor does."""
    from tensorflow_text.python.ops.bert_tokenizer import BasicTokenizer  # not exported at the top

    tokenizer = BasicTokenizer(lower_case=True)
    counts: collections.Counter[bytes] = collections.Counter()
    for block in blocks:
        counts.update(tokenizer.tokenize(block).flat_values.numpy().tolist())
    return collections.Counter({word.decode("utf-8", "replace"): count for word, count in counts.items()})


def learn(word_counts: Mapping[str, int], size: int) -> list[str]:
    """Learns `size` pieces by the frequency-threshold WordPiece algorithm of TensorFlow Text."""
    from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib as learner

    ordered = dict(sorted(word_counts.items(), key=lambda item: (-item[1], item[0])))
    characters = frequent_characters(ordered, MIN_CHARACTER_COUNT) | set(MARKS)
    # The learner only meets a size roughly and from below: aim higher and drop the rarest pieces.
    ranked = learner.learn(ordered, int(size * 1.08), SPECIAL, slack_ratio=0.05)
    return assemble(characters, (piece for piece in ranked if len(piece.removeprefix("##")) > 1), size)


def coverage(blocks: Iterable[list[str]], vocabulary: Sequence[str]) -> dict[str, float]:
    """Returns `unknown` (share of [UNK] among pieces) and `pieces_per_word`."""
    import tensorflow_text as text

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(piece + "\n" for piece in vocabulary)
        tokenizer = text.BertTokenizer(path, lower_case=True)
        n_words = n_pieces = n_unknown = 0
        for block in blocks:
            pieces = tokenizer.tokenize(block)
            ids = pieces.flat_values.numpy()
            n_words += int(pieces.values.nrows())
            n_pieces += len(ids)
            n_unknown += int((ids == vocabulary.index("[UNK]")).sum())
    return {"unknown": n_unknown / n_pieces, "pieces_per_word": n_pieces / n_words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="text file, one sentence per line, in random order; .gz is read too")
    parser.add_argument("vocabulary", help="file to write, one piece per line")
    parser.add_argument("--size", type=int, default=8000)
    parser.add_argument("--learn_lines", type=int, default=200_000)
    parser.add_argument("--check_lines", type=int, default=10_000)
    flags = parser.parse_args()

    vocabulary = learn(count_words(read_lines(flags.corpus, 0, flags.learn_lines)), flags.size)
    with open(flags.vocabulary, "w", encoding="utf-8") as file:
        file.writelines(piece + "\n" for piece in vocabulary)
    check = read_lines(flags.corpus, flags.learn_lines, flags.learn_lines + flags.check_lines)
    for name, value in coverage(check, vocabulary).items():
        print(f"{name}: {value:.6f}")


if __name__ == "__main__":
    main()
