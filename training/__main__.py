"""Makes the built-in encoder: corpus in, weights, vocabulary and model card out.

    python -m training --sentences=sentences.txt.gz --passages=passages.txt.gz --sts=stsb-dev.csv

The pipeline itself embeds the corpus with the teacher, and the student learns from that table. Every step leaves its
result in the folder of work and is skipped when that is there; embedding and learning go on where they were stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import pipeline
from pipeline.cli.flags import at_least_one, at_least_zero
from pipeline.encoders import default
from pipeline.encoders.export import export_encoder
from pipeline.encoders.packed import pack_weights, unpack_weights
from pipeline.encoders.runtime import load_tensorflow
from pipeline.errors import EmbeamError
from pipeline.preprocess.export import export_preprocessor
from training import teacher
from training.card import write_card
from training.corpus import HELD_OUT, KINDS, read_lines, split_passages, write_corpus
from training.distil import Recipe, distil
from training.scores import BAG, VECTORS, bag_of_tokens, embed_exam, examine, make_exam
from training.student import initial_student
from training.vocabulary import choose_vocabulary, tokenizer_of

LAYERS = (0, 1, 3, 4, 5)  # of the teacher's six: the one whose removal lowers the scores least is left out
VOCABULARY_SIZE = 16_000
LEVELS = 63  # 7 bits a weight: a file below 15 MB


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", required=True, help="training text, one sentence per line, in random order")
    parser.add_argument(
        "--passages",
        required=True,
        help=f"training passages, one per line, in random order; the last {HELD_OUT:,} are held out",
    )
    parser.add_argument("--sts", required=True, help="the STS benchmark's dev split: CSV of sentence, sentence, score")
    parser.add_argument("--work", default="build/training", help="folder for intermediate files")
    parser.add_argument("--output", default=default.FOLDER, help="folder for weights, vocabulary and model card")
    parser.add_argument("--n_sentences", type=at_least_zero, default=200_000, help="how many to learn from")
    parser.add_argument("--n_passages", type=at_least_zero, default=8_000, help="how many to learn from")
    parser.add_argument("--steps", type=at_least_one, default=1700, help="batches to learn from")
    parser.add_argument("--rate", type=float, default=3e-4, help="highest learning rate")
    parser.add_argument("--cycles", type=at_least_one, default=2, help="how often the rate rises to it and falls to 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the texts")
    known = parser.parse_args(arguments)
    for flag in ("sentences", "passages", "sts"):
        if not os.path.isfile(getattr(known, flag)):
            parser.error(f"--{flag}={getattr(known, flag)} is not a file")
    if known.steps % known.cycles:
        parser.error(f"--steps={known.steps} batches cannot be cut into --cycles={known.cycles} of equal length")
    check_settings(known)
    load_tensorflow()
    try:
        make_encoder(known)
    except EmbeamError as error:
        sys.exit(f"training: {error}")


def check_settings(known: argparse.Namespace) -> None:
    """Writes the settings to the work folder, and ends the program if the folder has other settings."""
    path = os.path.join(known.work, "settings.json")
    settings = {flag: value for flag, value in vars(known).items() if flag not in ("work", "output")}
    os.makedirs(known.work, exist_ok=True)
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=1)
        return
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    other = [f"--{flag}={found[flag]}" for flag in settings if settings[flag] != found[flag]]
    if other:
        sys.exit(f"training: {known.work} was begun with {' '.join(other)}; go on with these, or name another --work")


def make_encoder(known: argparse.Namespace) -> None:
    def at(*names: str) -> str:
        return os.path.join(known.work, *names)

    def once(name: str, make: Callable[[str], object]) -> str:
        """Makes a folder or file in the work folder atomically."""
        if not os.path.exists(at(name)):
            print(f"training: {name}", file=sys.stderr, flush=True)
            shutil.rmtree(at("unfinished"), ignore_errors=True)
            os.makedirs(at("unfinished"))
            make(at("unfinished", name))
            os.replace(at("unfinished", name), at(name))
        return at(name)

    exam = make_exam(known.sts, known.passages)
    teachers = once("teacher", teacher.fetch_teacher)
    teacher_weights, pieces = teacher.read_teacher(teachers)

    def write_vocabulary(path: str) -> None:
        texts = itertools.chain(read_lines(known.sentences), split_passages(known.passages)[0])
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(piece + "\n" for piece in choose_vocabulary(texts, pieces, VOCABULARY_SIZE))

    vocabulary_file = once("vocabulary.txt", write_vocabulary)
    vocabulary = default.read_vocabulary(vocabulary_file)
    wanted = known.n_sentences, known.n_passages
    corpus = once("corpus", lambda folder: write_corpus(known.sentences, known.passages, *wanted, folder))
    n_sentences, n_passages = (sum(1 for _ in read_lines(f"{corpus}/{kind}.jsonl")) for kind in KINDS)

    taught = {"encoder": f"{teachers}/encoder", "preprocessor": f"{teachers}/preprocessor", "vector": teacher.VECTOR}
    recipe = Recipe(known.steps, known.rate, known.cycles, seed=known.seed)

    def learn(path: str) -> None:
        embed_corpus(corpus, at("table"), taught)
        initial = initial_student(teacher_weights, pieces, vocabulary, LAYERS)
        trained = distil(initial, *read_lessons(at("table"), vocabulary), recipe, at("student"))
        pack_weights(trained, path, LEVELS)

    packed = once("weights.npz", learn)
    weights = unpack_weights(packed)

    def write_encoder(folder: str) -> None:
        os.makedirs(folder)
        export_encoder(weights, vocabulary, os.path.join(folder, "encoder"))
        export_preprocessor(vocabulary, os.path.join(folder, "preprocessor"))

    written = once("encoder", write_encoder)
    own = {"encoder": f"{written}/encoder", "preprocessor": f"{written}/preprocessor"}
    scores = {}
    for vector, precision in itertools.product(VECTORS, ("float32", "bfloat16")):
        name, flags = f"{vector}, {precision}", {**own, "vector": vector, "precision": precision}
        scores[name] = examine(exam, embed_exam(exam, at("scores", name.replace(":", "_")), flags))
    scores["teacher"] = examine(exam, embed_exam(exam, at("scores", "teacher"), taught))
    scores[BAG] = examine(exam, bag_of_tokens(exam, tokenizer_of(vocabulary)))

    os.makedirs(known.output, exist_ok=True)
    licence = os.path.join(default.FOLDER, "LICENSE.txt")
    for path, name in ((packed, "weights.npz"), (vocabulary_file, "vocabulary.txt"), (licence, "LICENSE.txt")):
        if not os.path.exists(target := os.path.join(known.output, name)) or not os.path.samefile(path, target):
            shutil.copyfile(path, target)
    write_card(known.output, weights, LAYERS, recipe, (n_sentences, n_passages), scores)


def embed_corpus(corpus: str, table: str, taught: Mapping[str, str]) -> None:
    """Runs the pipeline to write the table of targets; does nothing if it exists, and resumes a stopped run."""
    settings = {
        **taught,
        "input": f"{corpus}/*.jsonl",
        "id_field": "id",
        "text_field": "text",
        "max_tokens": teacher.MAX_TOKENS,
        "normalize": True,
        "keep_text": True,
        "output": table,
    }
    pipeline.build_table(pipeline.EmbedConfig.from_flat(settings), show_progress=True)


def read_lessons(table: str, vocabulary: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """The texts of a table as the student's token ids, and the teacher's vectors of them, in the order of their ids."""
    rows = sorted(pipeline.iter_table(table), key=lambda row: row["id"])
    start, end = vocabulary.index("[CLS]"), vocabulary.index("[SEP]")
    tokenize = tokenizer_of(vocabulary)
    tokens = [
        np.array([start, *ids[: teacher.MAX_TOKENS - 2], end], np.int32)
        for ids in tokenize([row["text"] for row in rows])
    ]
    return tokens, np.stack([row["embedding"] for row in rows])


if __name__ == "__main__":
    main()
