"""Evaluates an encoder with tables that the pipeline writes: sentence similarity and passage retrieval.

    python -m training.scores --sts=stsb-dev.csv --passages=passages.txt.gz [--encoder=DIR --preprocessor=DIR]

**Similarity**: Spearman's rank correlation between people's scores of sentence pairs (STS benchmark) and the cosines of
their vectors. **Finding**: out of each passage held out from training its middle sentence is taken, and looks for what
is left of the passage among all of them; how often that is first, among the first ten, and the mean of 1 / rank.
**Naming**: the two rarest words of what is left look for it; how often it is first.

Beside each encoder stands a bag of tokens: counts of word pieces weighted by their inverse document frequency.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import pipeline
from pipeline.errors import ConfigError, EmbeamError
from training.corpus import split_passages, split_sentences, write_texts
from training.vocabulary import tokenizer_of

VECTORS = ("pooled_output", "sequence_output:mean")
BAG = "idf bag of tokens"
NAMES = {
    "similarity": "STS-B dev, Spearman",
    "first": "passage first",
    "first_ten": "among 10",
    "mean_reciprocal_rank": "mean 1 / rank",
    "named": "first by two rare words",
}


class Scores(NamedTuple):
    """Scores of some vectors.

    Attributes:
      similarity: rank correlation over pairs of sentences.
      first: share of sentences that find their passage first.
      first_ten: share that find it among the first ten.
      mean_reciprocal_rank: mean of 1 / rank.
      named: share of passages that are found first by their two rarest words.
    """

    similarity: float
    first: float
    first_ten: float
    mean_reciprocal_rank: float
    named: float


class Exam(NamedTuple):
    """The texts to embed, by id, and the tasks for their vectors.

    Attributes:
      texts: by id.
      pairs: two ids, and the people's score from 0 to 5.
      searches: the id of a sentence, and of the passage that it is from.
      names: the id of two words, and of the passage that they are from.
      passages: ids of all passages.
    """

    texts: dict[str, str]
    pairs: list[tuple[str, str, float]]
    searches: list[tuple[str, str]]
    names: list[tuple[str, str]]
    passages: list[str]


def make_exam(sts: str, passages: str) -> Exam:
    """Reads the pairs, a CSV of sentence, sentence, score, and takes the sentences out of the held-out passages.

    Raises:
      ConfigError: if the files do not have this format.
    """
    exam = Exam({}, [], [], [], [])
    with open(sts, encoding="utf-8", newline="") as file:
        for i, row in enumerate(csv.reader(file)):
            try:
                one, other, score = row
                exam.pairs.append((f"pair/{i}/0", f"pair/{i}/1", float(score)))
            except ValueError:
                raise ConfigError(f"{sts}: record {i + 1} is not two sentences and a number: {row}") from None
            exam.texts[f"pair/{i}/0"], exam.texts[f"pair/{i}/1"] = one, other
    for i, passage in enumerate(split_passages(passages)[1]):
        sentences = split_sentences(passage)
        exam.passages.append(f"passage/{i}")
        if len(sentences) >= 3:
            exam.texts[f"sentence/{i}"] = sentences.pop(len(sentences) // 2)
            exam.searches.append((f"sentence/{i}", f"passage/{i}"))
        exam.texts[f"passage/{i}"] = " ".join(sentences)
    words = {key: dict.fromkeys(re.findall(r"[a-z]{3,}", exam.texts[key].lower())) for key in exam.passages}
    spread = collections.Counter(word for found in words.values() for word in found)
    for key, found in words.items():
        rarest = sorted(found, key=spread.__getitem__)[:2]  # among equals the earlier ones
        if len(rarest) == 2:
            exam.texts[f"name/{key}"] = " ".join(rarest)
            exam.names.append((f"name/{key}", key))
    if len(exam.pairs) < 2 or not exam.searches:
        raise ConfigError(f"too little to judge by: {sts} needs two pairs, {passages} a passage of three sentences")
    return exam


def examine(exam: Exam, vectors: Mapping[str, np.ndarray]) -> Scores:
    """Scores vectors, float [D] of any length by text id."""
    unit = {key: vector / max(float(np.linalg.norm(vector)), 1e-12) for key, vector in vectors.items()}
    cosines = [float(unit[one] @ unit[other]) for one, other, _ in exam.pairs]
    passages = np.stack([unit[key] for key in exam.passages])  # [P, D]
    place = {key: i for i, key in enumerate(exam.passages)}

    def find(searches: Sequence[tuple[str, str]]) -> np.ndarray:
        """The rank of each search's passage."""
        ranks = []
        for key, passage in searches:
            found = passages @ unit[key]  # [P]
            ranks.append(1 + int((found > found[place[passage]]).sum()))
        return np.array(ranks)

    rank = find(exam.searches)
    return Scores(
        rank_correlation(np.array(cosines), np.array([score for _, _, score in exam.pairs])),
        float((rank == 1).mean()),
        float((rank <= 10).mean()),
        float((1 / rank).mean()),
        float((find(exam.names) == 1).mean()),
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation between ranks, equal values sharing the mean of theirs."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def embed_exam(exam: Exam, folder: str, flags: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Runs the pipeline on all texts, and reads the vectors from its table."""
    os.makedirs(folder, exist_ok=True)
    texts = os.path.join(folder, "texts.jsonl")
    write_texts(texts, exam.texts.items())
    table = os.path.join(folder, "table")
    settings = {"input": texts, "id_field": "id", "text_field": "text", "output": table, **flags}
    pipeline.build_table(pipeline.EmbedConfig.from_flat(settings))
    return dict(zip(*pipeline.read_table(table), strict=True))


def bag_of_tokens(exam: Exam, tokenize: Callable[[list[str]], list[list[int]]]) -> dict[str, np.ndarray]:
    """Counts of tokens times the logarithm of the inverse share of texts that have them.

    These are the passages for the search, and the pairs' sentences for the pairs.
    """
    keys = list(exam.texts)
    tokens = dict(zip(keys, tokenize([exam.texts[key] for key in keys]), strict=True))
    size = 1 + max(max(row, default=0) for row in tokens.values())

    def weigh(chosen: Sequence[str], counted: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        documents = np.zeros(size, np.float32)
        for key in counted:
            documents[list(set(tokens[key]))] += 1
        weights = np.log((1 + len(counted)) / (1 + documents)).astype(np.float32)
        for key in chosen:
            yield key, np.bincount(tokens[key], minlength=size).astype(np.float32) * weights

    paired = [key for one, other, _ in exam.pairs for key in (one, other)]
    return {
        **dict(weigh(paired, paired)),
        **dict(weigh([*exam.passages, *(key for key, _ in [*exam.searches, *exam.names])], exam.passages)),
    }


def format_scores(rows: Mapping[str, Scores]) -> str:
    """A Markdown table."""
    lines = [
        f"| vectors | {' | '.join(NAMES.values())} |",
        "|---|" + "---:|" * len(NAMES),
    ]
    lines += [f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |" for name, scores in rows.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    from pipeline.encoders.default import default_vocabulary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sts", required=True, help="CSV of sentence, sentence, score")
    parser.add_argument("--passages", required=True, help="file of passages; the last 2,000 are used")
    parser.add_argument("--encoder", help="SavedModel (default: the built-in encoder)")
    parser.add_argument("--preprocessor", help="SavedModel (default: by the encoder's vocabulary)")
    parser.add_argument("--precision", default="float32", help="as of embeam embed (default: float32)")
    known = parser.parse_args(arguments)
    flags = {key: value for key in ("encoder", "preprocessor", "precision") if (value := getattr(known, key))}
    rows = {}
    try:
        exam = make_exam(known.sts, known.passages)
        with tempfile.TemporaryDirectory() as folder:
            for vector in VECTORS:
                vectors = embed_exam(exam, os.path.join(folder, vector.replace(":", "_")), {**flags, "vector": vector})
                rows[vector] = examine(exam, vectors)
    except (EmbeamError, OSError) as error:
        sys.exit(f"training.scores: {error}")
    rows[BAG] = examine(exam, bag_of_tokens(exam, tokenizer_of(default_vocabulary())))
    print(format_scores(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
