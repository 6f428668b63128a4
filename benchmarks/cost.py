"""The cost of a corpus: `python -m benchmarks.cost --documents=10e6 --price=PRICE`, the model of docs/scaling.md.

Every assumption is a flag; the defaults are what was measured, or are marked as what was not.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

SECONDS = 3600.0


class Corpus(NamedTuple):
    """The corpus and the table.

    Attributes:
      documents: how many.
      tokens: of one, special tokens and all.
      characters: of one.
      vector_bytes: of one vector as it is stored.
    """

    documents: float
    tokens: float
    characters: float
    vector_bytes: float


class Encoder(NamedTuple):
    """Sizes of a talking-heads, gated-GELU BERT."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    feedforward: int = 4096


class Rates(NamedTuple):
    """The speeds of the machines.

    Attributes:
      matmul: FLOP per second of bare matmuls on one worker.
      share: of these that are spent on real tokens, padding and all else being loss.
      reading: bytes per second of text that one core turns into chunks.
      request_seconds: of one request to the object store, of which the commit makes two for a file, one after another.
    """

    matmul: float
    share: float
    reading: float = 15.3e6
    request_seconds: float = 0.05


CHUNK_BYTES, ROW_BYTES, INDEX_BYTES, ID_BYTES = 300, 110, 52, 40  # beside texts and vectors


class Cost(NamedTuple):
    """The results of the model; each byte crosses a shuffle once."""

    encode_hours: float
    read_hours: float
    workers: float
    money: float
    shuffle_bytes: float
    table_bytes: float
    files: float
    commit_hours: float


def count_flops(encoder: Encoder, tokens: float) -> float:
    """FLOP of one text, a multiply-add being two."""
    e = encoder
    per_token = 8 * e.width**2 + 6 * e.width * e.feedforward + (4 * e.width + 4 * e.heads**2) * tokens
    return e.layers * tokens * per_token + 2 * e.width**2


def estimate(
    corpus: Corpus, encoder: Encoder, rates: Rates, hours: float, price: float, cpu_price: float, shard_bytes: float
) -> Cost:
    """The cost of a first run.

    Args:
      corpus: what is embedded.
      encoder: by what.
      rates: of one worker.
      hours: in which encoding should be done.
      price: of an hour of a worker that encodes.
      cpu_price: of an hour of a core that reads and tokenises.
      shard_bytes: size of the table's files.
    """
    n = corpus.documents
    encode_hours = n * count_flops(encoder, corpus.tokens) / (rates.matmul * rates.share) / SECONDS
    read_hours = n * corpus.characters / rates.reading / SECONDS
    chunk, row = corpus.characters + CHUNK_BYTES, corpus.vector_bytes + ROW_BYTES
    shuffle_bytes = n * (chunk + chunk + row + ID_BYTES)  # by content, to the encoder, back from it, by id
    table_bytes = n * (row + INDEX_BYTES)
    files = max(1.0, table_bytes / shard_bytes)
    commit_hours = files * 2 * rates.request_seconds / SECONDS
    money = encode_hours * price + read_hours * cpu_price
    return Cost(encode_hours, read_hours, encode_hours / hours, money, shuffle_bytes, table_bytes, files, commit_hours)


def format_cost(cost: Cost) -> str:
    return "\n".join(
        [
            f"encoding          {cost.encode_hours:,.1f} worker-hours on {max(1, round(cost.workers)):,} workers",
            f"reading           {cost.read_hours:,.2f} core-hours",
            f"compute           {cost.money:,.2f} dollars",
            f"across shuffles   {cost.shuffle_bytes / 1e9:,.1f} GB",
            f"table             {cost.table_bytes / 1e9:,.1f} GB in {round(cost.files):,} files",
            f"commit            {cost.commit_hours * 60:,.1f} minutes of one worker",
        ]
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cost", description=(__doc__ or "").split("\n")[0])
    for name, default, help in (
        ("documents", 10e6, "how many"),
        ("tokens", 46.2, "of one"),
        ("characters", 204, "of one"),
        ("vector_bytes", 4096, "of one vector: 1024 x float32"),
        ("matmul", 60e12, "FLOP per second of a worker's bare matmuls; not measured on a GPU"),
        ("share", 0.5, "of them spent on real tokens; 0.92 was measured on processors, none on a GPU"),
        ("hours", 10, "in which encoding should be done"),
        ("price", 1.0, "of an hour of a worker that encodes"),
        ("cpu_price", 0.05, "of an hour of a core that reads"),
        ("shard_bytes", 256 * 2**20, "size of the table's files"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="N", help=f"{help} (default: {default:g})"
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    o = parse_arguments(arguments)
    corpus = Corpus(o.documents, o.tokens, o.characters, o.vector_bytes)
    rates = Rates(o.matmul, o.share)
    print(format_cost(estimate(corpus, Encoder(), rates, o.hours, o.price, o.cpu_price, o.shard_bytes)))


if __name__ == "__main__":
    main()
