"""Text to token ids on one core: the product's splitter and tokeniser against the published ways to do it.

References: the preprocessor SavedModel called as published (which also pads to 128 tokens), its `tokenize` alone, and
tensorflow_text.BertTokenizer, the kernel inside it. The product: `Tokenizer.tokenize`, texts to ids, and
`WordpieceSplitter.split`, documents to chunks with special tokens and content hashes. All get 1024 texts a call.

The same sentences, joined to long documents, are cut into windows by the splitter and compared with
`Tokenizer.tokenize` of them. These get as many documents a call as the pipeline's buffer holds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from benchmarks.child import BatchClock
from benchmarks.measure import Ratio, Report, Side, alternate, steady_rate
from benchmarks.models import find_models
from benchmarks.texts import join_texts, make_sentences, write_lines

SIZE, COUNT, REPETITIONS = "tiny", 100_000, 3
FLOOR = 15.0  # MB/s
TEXTS_A_CALL = 1024
SENTENCES_OF_LONG, LONG_A_CALL = 75, 240  # about 17 kB; 4 MB
MAX_TOKENS = 512
OURS = ("embeam Tokenizer", "embeam WordpieceSplitter")
WINDOWS = {  # tokens of a window, and whether it ends at a sentence end
    f"windows of {tokens} tokens{ending}": (tokens, bool(ending))
    for tokens in (512, 128)
    for ending in ("", ", by sentence")
}
LONG = "embeam Tokenizer, long documents"
THEIRS = ("preprocessor", "preprocessor.tokenize", "BertTokenizer")


def tokenize_on_one_core(
    kind: str, texts: str, preprocessor: str, texts_a_call: int = TEXTS_A_CALL
) -> dict[str, float]:
    """One side, in a child: megabytes of text, read beforehand, through one function."""
    if hasattr(os, "sched_setaffinity"):  # before TensorFlow counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open(texts, encoding="utf-8") as file:
        lines = file.read().splitlines()
    function = _make_function(kind, preprocessor)
    clock = BatchClock()
    for start in range(0, len(lines), texts_a_call):
        part = lines[start : start + texts_a_call]
        function(part)
        clock.tick(sum(len(line.encode()) + 1 for line in part) / 1e6)
    return clock.stop()


def _make_function(kind: str, preprocessor: str) -> Callable[[list[str]], Any]:
    if kind in (*OURS, LONG, *WINDOWS):
        return _make_ours(kind, preprocessor)
    import tensorflow as tf
    import tensorflow_text as text

    if kind == "BertTokenizer":
        tokenizer = text.BertTokenizer(_vocabulary_path(preprocessor), token_out_type=tf.int32, lower_case=True)
        return lambda texts: tokenizer.tokenize(tf.constant(texts)).flat_values.numpy()
    model = tf.saved_model.load(preprocessor)
    if kind == "preprocessor":
        return lambda texts: model(tf.constant(texts))["input_word_ids"].numpy()
    return lambda texts: model.tokenize(tf.constant(texts)).flat_values.numpy()


def _make_ours(kind: str, preprocessor: str) -> Callable[[list[str]], Any]:
    from pipeline.preprocess.chunking import WordpieceRule, WordpieceSplitter
    from pipeline.preprocess.wordpiece import Tokenizer, Vocabulary
    from pipeline.records import Document

    vocabulary = Vocabulary.read(_vocabulary_path(preprocessor), lower_case=True)
    if kind in ("embeam Tokenizer", LONG):
        return Tokenizer(vocabulary).tokenize
    max_tokens, by_sentence = WINDOWS.get(kind, (MAX_TOKENS, False))
    on_long = "chunk" if kind in WINDOWS else "truncate"
    splitter = WordpieceSplitter(WordpieceRule(vocabulary, max_tokens, on_long, by_sentence=by_sentence))
    return lambda texts: list(splitter.split([Document("", text) for text in texts]))


def _vocabulary_path(preprocessor: str) -> str:
    return os.path.join(preprocessor, "assets", "vocab.txt")


def run(options: argparse.Namespace) -> Report:
    count, folder = options.count, options.folder
    _, preprocessor = find_models(options.encoder, options.preprocessor, options.size, options.models)
    texts = os.path.join(folder, "texts.txt")
    write_lines(texts, make_sentences(count))
    long_texts = os.path.join(folder, "long.txt")
    write_lines(long_texts, join_texts(make_sentences(count), SENTENCES_OF_LONG))
    inputs = dict.fromkeys((*THEIRS, *OURS), (texts, TEXTS_A_CALL))
    inputs |= dict.fromkeys((LONG, *WINDOWS), (long_texts, LONG_A_CALL))
    sides = {
        kind: Side(
            "benchmarks.tokenize:tokenize_on_one_core",
            {"kind": kind, "texts": path, "preprocessor": preprocessor, "texts_a_call": texts_a_call},
        )
        for kind, (path, texts_a_call) in inputs.items()
    }
    runs = alternate(sides, options.repetitions, folder)
    rates = {kind: steady_rate(side) for kind, side in runs.items()}
    ratios = [Ratio(f"{kind}, steady", rates[kind], at_least=FLOOR, unit="MB/s") for kind in (*OURS, *WINDOWS)]
    ratios += [Ratio(f"{ours} / {theirs}", rates[ours] / rates[theirs]) for ours in OURS for theirs in THEIRS]
    ratios += [Ratio(f"{kind} / {LONG}", rates[kind] / rates[LONG]) for kind in WINDOWS]
    megabytes = os.path.getsize(texts) / 1e6
    title = f"{count:,} English sentences, {megabytes:.1f} MB, on one core"
    return Report(title, "MB", runs, ratios, {"preprocessor": preprocessor})
