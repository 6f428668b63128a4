"""What makes the built-in encoder, in small: the student's beginning, how it learns, and how it is judged."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

import pipeline
from pipeline.config import VectorChoice
from pipeline.encoders import default
from pipeline.encoders.export import export_encoder, initial_weights
from pipeline.encoders.packed import unpack_weights
from pipeline.errors import ConfigError
from tests.support.corpora import some_texts
from tests.support.exports import read_vocabulary, some_inputs
from tests.support.paths import REFERENCE
from tests.support.tables import TOLERANCE
from training import __main__ as command
from training import distil as learning
from training.corpus import HELD_OUT, split_passages, split_sentences, write_corpus
from training.distil import Recipe, batches_of_epoch, distil, pad, rate_at
from training.scores import Exam, bag_of_tokens, examine, make_exam, rank_correlation
from training.scores import main as print_scores
from training.student import initial_student, make_forward
from training.vocabulary import choose_vocabulary

RECIPE = Recipe(steps=6, rate=1e-3, batch_texts=8, batch_tokens=200, save_steps=2)


@pytest.fixture(scope="module")
def teacher():
    """A plain BERT that TensorFlow's model library exported."""
    return tf.saved_model.load(str(REFERENCE / "bert_v1000"))


@pytest.fixture(scope="module")
def teacher_weights(teacher):
    return {v.name.removesuffix(":0"): v.numpy() for v in teacher.trainable_variables}


@pytest.mark.training
class TestStudent:
    def test_begins_as_the_teacher(self, teacher, teacher_weights, tmp_path):
        pieces = read_vocabulary()
        weights = initial_student(teacher_weights, pieces, pieces, layers=(0, 1))
        export_encoder(weights, pieces, str(tmp_path / "student"))
        inputs = some_inputs(5, 30, len(pieces))
        found, expected = tf.saved_model.load(str(tmp_path / "student"))(inputs), teacher(inputs)
        np.testing.assert_allclose(found["encoder_outputs"], expected["encoder_outputs"], rtol=0, atol=TOLERANCE)
        pooled = np.tanh(expected["sequence_output"][:, 0])
        np.testing.assert_allclose(found["pooled_output"], pooled, rtol=0, atol=TOLERANCE)

    def test_keeps_the_layers_and_pieces_that_are_named(self, teacher, teacher_weights, tmp_path):
        pieces = read_vocabulary()
        some = pieces[:5] + pieces[400:100:-3]
        weights = initial_student(teacher_weights, pieces, some, layers=(1,))
        inputs = some_inputs(4, 12, len(some))
        same = {**inputs, "input_word_ids": np.array([pieces.index(p) for p in some])[inputs["input_word_ids"]]}
        same["input_word_ids"] = same["input_word_ids"].astype(np.int32)
        # The teacher's second layer alone: its first one is put out of the way by copying the second one over it.
        names = {name: name.replace("layer_0", "layer_1") for name in teacher_weights}
        export_encoder({n: teacher_weights[names[n]] for n in names}, pieces, str(tmp_path / "twice"))
        expected = tf.saved_model.load(str(tmp_path / "twice"))(same)["encoder_outputs"][0]
        export_encoder(weights, some, str(tmp_path / "student"))
        found = tf.saved_model.load(str(tmp_path / "student"))(inputs)["sequence_output"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)

    def test_learns_through_the_graph_that_is_exported(self, tmp_path):
        from pipeline.encoders.architecture import infer_architecture
        from pipeline.vectors.pooling import pool_outputs

        weights = initial_weights(2, 24, 3, len(read_vocabulary()), positions=40)
        export_encoder(weights, read_vocabulary(), str(tmp_path / "encoder"))
        variables = {name: tf.Variable(value) for name, value in weights.items()}
        forward = make_forward(variables, infer_architecture({n: w.shape for n, w in weights.items()}))
        inputs = some_inputs(5, 40, len(weights["word_embeddings/embeddings"]))
        inputs["input_type_ids"] *= 0
        with tf.GradientTape() as tape:
            pooled, mean = forward(tf.constant(inputs["input_word_ids"]), tf.constant(inputs["input_mask"]))
            loss = tf.reduce_sum(pooled**2) + tf.reduce_sum(mean**3)
        outputs = tf.saved_model.load(str(tmp_path / "encoder"))(inputs)
        expected = pool_outputs(outputs, inputs["input_mask"], VectorChoice("sequence_output", pooling="mean"))
        np.testing.assert_allclose(pooled, outputs["pooled_output"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=TOLERANCE)
        for name, gradient in tape.gradient(loss, variables).items():
            largest = np.abs(tf.convert_to_tensor(gradient)).max()
            assert largest > 1e-5 or name.endswith("key/bias"), name


class TestVocabulary:
    def test_is_what_the_texts_use_most(self):
        pieces = read_vocabulary()
        texts = some_texts(300)
        counts = count_pieces_by_the_official_preprocessor(texts)
        chosen = choose_vocabulary(texts, pieces, 500)
        assert chosen == choose_vocabulary(iter(texts), pieces, 500)
        assert len(set(chosen)) == 500 and set(chosen) <= set(pieces)
        assert chosen[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        long = [piece for piece in chosen[5:] if len(piece.removeprefix("##")) > 1]
        left = [piece for piece in pieces[5:] if piece not in chosen and len(piece.removeprefix("##")) > 1]
        assert long and left
        assert min(counts.get(piece, 0) for piece in long) >= max(counts.get(piece, 0) for piece in left)
        ascii_characters = {p for p in pieces if len(p.removeprefix("##")) == 1 and p[-1].isascii() and p[-1].isalnum()}
        assert ascii_characters <= set(chosen)

    def test_says_when_there_is_too_little_text(self):
        with pytest.raises(ConfigError, match="give more texts"):
            choose_vocabulary(["one small text"], read_vocabulary(), 900)


def count_pieces_by_the_official_preprocessor(texts):
    from tests.support.official import official_tokens

    pieces = read_vocabulary()
    counts: dict[str, int] = {}
    for text in texts:
        for token in official_tokens(text):
            counts[pieces[token]] = counts.get(pieces[token], 0) + 1
    return counts


class TestLearning:
    @pytest.fixture(scope="class")
    def lessons(self):
        rng = np.random.default_rng(3)
        tokens = [rng.integers(5, 50, rng.integers(3, 12)).astype(np.int32) for _ in range(30)]
        targets = rng.standard_normal((30, 24)).astype(np.float32)
        return tokens, targets / np.linalg.norm(targets, axis=1, keepdims=True)

    @pytest.fixture(scope="class")
    def initial(self):
        return initial_weights(2, 24, 3, vocabulary_size=50, positions=16)

    @pytest.fixture(scope="class")
    def uninterrupted(self, initial, lessons, tmp_path_factory):
        folder = tmp_path_factory.mktemp("learning")
        return distil(initial, *lessons, RECIPE, str(folder)), folder

    @pytest.mark.training
    def test_the_same_seed_takes_the_same_steps(self, initial, lessons, uninterrupted, tmp_path):
        again = distil(initial, *lessons, RECIPE, str(tmp_path / "again"))
        other = distil(initial, *lessons, RECIPE._replace(seed=1), str(tmp_path / "other"))
        for name, weight in uninterrupted[0].items():
            np.testing.assert_allclose(again[name], weight, rtol=0, atol=1e-6)
        assert any(np.abs(other[name] - weight).max() > 1e-4 for name, weight in uninterrupted[0].items())

    @pytest.mark.training
    @pytest.mark.parametrize("stopped_at", [3, 4])
    def test_goes_on_where_it_was_stopped(self, initial, lessons, uninterrupted, tmp_path, monkeypatch, stopped_at):
        def stop(step, recipe):
            if step > stopped_at:
                raise KeyboardInterrupt
            return rate_at(step, recipe)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(learning, "rate_at", stop)
            distil(initial, *lessons, RECIPE, str(tmp_path))
        steps = []
        monkeypatch.setattr(learning, "rate_at", lambda step, recipe: steps.append(step) or rate_at(step, recipe))
        resumed = distil(initial, *lessons, RECIPE, str(tmp_path))
        assert steps == list(range(stopped_at // 2 * 2 + 1, RECIPE.steps + 1))
        for name, weight in uninterrupted[0].items():
            np.testing.assert_allclose(resumed[name], weight, rtol=0, atol=1e-6)

    @pytest.mark.training
    def test_vectors_come_nearer_to_the_targets(self, initial, lessons, tmp_path):
        distil(initial, *lessons, RECIPE._replace(steps=60, save_steps=60), str(tmp_path))
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
        for loss in ("pooled_loss", "mean_loss"):
            assert log[-1][loss] < 0.6 * log[0][loss]

    def test_an_epoch_has_every_text_once(self):
        lengths = np.random.default_rng(0).integers(3, 120, 3000)
        epochs = [batches_of_epoch(lengths, RECIPE, epoch) for epoch in (0, 1)]
        for batches in epochs:
            assert sorted(np.concatenate(batches)) == list(range(3000))
            assert all(len(b) <= 8 and len(b) * lengths[b].max() <= 200 for b in batches)
            assert sum(len(b) * lengths[b].max() for b in batches) < 1.1 * lengths.sum()  # little padding
        assert not np.array_equal(epochs[0][0], epochs[1][0])

    def test_padding(self):
        ids, mask = pad([np.array([7, 8, 9]), np.array([6])])
        assert ids.tolist() == [[7, 8, 9], [6, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]

    def test_the_rate_rises_and_falls(self):
        rates = [rate_at(step, Recipe(steps=100, rate=1.0)) for step in range(1, 101)]
        assert np.argmax(rates) in (4, 5) and rates[4] == pytest.approx(1, abs=0.02)
        assert np.all(np.diff(rates[:5]) > 0) and np.all(np.diff(rates[5:]) < 0) and 0 < rates[-1] < 0.02
        again = [rate_at(step, Recipe(steps=200, rate=1.0, cycles=2)) for step in range(1, 201)]
        assert again == [*rates, *rates]


class TestCorpus:
    @pytest.fixture
    def files(self, tmp_path):
        passages = [f"Passage {i} begins. Its middle is {i} long! Does it end at {i}?" for i in range(HELD_OUT + 50)]
        passages.insert(0, passages[-1].upper())  # the same text as one held out
        sentences = [f"A sentence {i}." for i in range(50)] + ["its middle is 2049 long"]
        (tmp_path / "sentences.txt").write_text("\n".join(sentences) + "\n")
        (tmp_path / "passages.txt").write_text("\n".join(passages) + "\n")
        return str(tmp_path / "sentences.txt"), str(tmp_path / "passages.txt")

    def test_what_is_held_out_is_not_learned_from(self, files, tmp_path):
        write_corpus(*files, 100, 100, str(tmp_path / "corpus"))
        texts = [
            json.loads(line)["text"]
            for name in ("sentences", "passages")
            for line in (tmp_path / "corpus" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert sum(text.startswith("A sentence") for text in texts) == 50 and "its middle is 2049 long" not in texts
        _, held_out = split_passages(files[1])
        assert len(held_out) == HELD_OUT and not {t.lower() for t in texts} & {t.lower() for t in held_out}

    def test_sentences(self):
        text = "It cost 3.50 dollars, i.e. nothing. Why? Nobody knows! The end"
        assert split_sentences(text) == ["It cost 3.50 dollars, i.e. nothing.", "Why?", "Nobody knows!", "The end"]


class TestCommand:
    """`python -m training` from a corpus to the card, with the small official encoder as the teacher."""

    @pytest.fixture
    def train(self, tmp_path, monkeypatch):
        def fetch(folder):
            shutil.copytree(REFERENCE / "bert_v1000", f"{folder}/encoder")
            shutil.copytree(REFERENCE / "preprocess_v1000", f"{folder}/preprocessor")

        monkeypatch.setattr(command.teacher, "fetch_teacher", fetch)
        for name, value in {"LAYERS": (0, 1), "VOCABULARY_SIZE": 700}.items():
            monkeypatch.setattr(command, name, value)
        monkeypatch.setattr("training.corpus.HELD_OUT", 20)
        monkeypatch.chdir(tmp_path)
        sentences, passages = some_texts(400), some_texts(60, seed=2)
        (tmp_path / "sentences.txt").write_text("".join(" ".join(text.split()) + "\n" for text in sentences))
        (tmp_path / "passages.txt").write_text(
            "".join(f"A {t}. B {t}. C.\n" for t in map(" ".join, map(str.split, passages)))
        )
        (tmp_path / "sts.csv").write_text("one dog,a dog,5\nblue,green sea,1\nmen,women,2.5\n")
        files = ("--sentences=sentences.txt", "--passages=passages.txt", "--sts=sts.csv")

        def run(*more):
            command.main([*files, "--work=work", "--output=made", "--n_sentences=100", "--n_passages=10", *more])

        return run

    @pytest.mark.training
    @pytest.mark.timeout(300)  # seven runs of the pipeline
    def test_corpus_in_weights_and_card_out(self, train, tmp_path, capsys):
        train("--steps=4")
        weights, vocabulary = unpack_weights("made/weights.npz"), default.read_vocabulary("made/vocabulary.txt")
        assert len(vocabulary) == 700 and weights["word_embeddings/embeddings"].shape == (700, 64)
        assert len(pipeline.read_table("work/table")[0]) == 110
        card = (tmp_path / "made" / "MODEL_CARD.md").read_text()
        n_parameters = sum(weight.size for weight in weights.values())
        for fact in (f"{n_parameters:,} parameters", "2 layers", "700", "100 sentences and 10 paragraphs", "4 batches"):
            assert fact in card
        rows = [line.split(" | ")[0].strip("| ") for line in card.splitlines() if line.startswith("| ")]
        for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
            assert len({line.count("|") for line in table.splitlines()}) == 1
        assert {"pooled_output, float32", "sequence_output:mean, bfloat16", "teacher", "idf bag of tokens"} <= set(rows)
        assert "Apache License" in (tmp_path / "made" / "LICENSE.txt").read_text()
        made = {name: os.stat(f"made/{name}").st_size for name in os.listdir("made")}
        shutil.rmtree("made")
        train("--steps=4")  # all is there
        assert {name: os.stat(f"made/{name}").st_size for name in os.listdir("made")} == made
        corpus = (tmp_path / "work" / "corpus" / "passages.jsonl").read_text().splitlines()
        assert len(corpus) == 10
        with pytest.raises(SystemExit, match="work was begun with --steps=4; go on with these"):
            train("--steps=6")
        with pytest.raises(SystemExit):
            train("--steps=5")
        assert "--steps=5 batches cannot be cut into --cycles=2 of equal length" in capsys.readouterr().err

    def test_a_file_that_is_missing_is_named(self, train, capsys):
        with pytest.raises(SystemExit):
            train("--sts=none.csv")
        assert "--sts=none.csv is not a file" in capsys.readouterr().err


class TestScores:
    def test_rank_correlation_equals_its_definition(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 9, 60).astype(float), rng.integers(0, 9, 60).astype(float)

        def ranks(values):  # one more than all below, and half of the others that are equal
            return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]

        x, y = np.array(ranks(a)), np.array(ranks(b))
        expected = ((x - x.mean()) * (y - y.mean())).sum() / np.sqrt(
            ((x - x.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum()
        )
        assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
        assert rank_correlation(a, a**3) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)

    def test_marks_of_a_small_exam(self):
        vectors = {"a": [2, 0], "b": [1, 0], "c": [0, 5], "d": [1, 1]}
        vectors |= {"p0": [1, 0], "p1": [0, 1], "s0": [3, 1], "s1": [2, 1]}  # s1 finds p0 before its own p1
        pairs, searches = [("a", "b", 5), ("a", "c", 0), ("a", "d", 3)], [("s0", "p0"), ("s1", "p1")]
        names = [("s0", "p0"), ("c", "p1"), ("a", "p1"), ("b", "p0")]  # a finds p0 first
        exam = Exam({}, pairs, searches, names, ["p0", "p1"])
        scores = examine(exam, {key: np.array(vector, np.float32) for key, vector in vectors.items()})
        assert scores == pytest.approx((1.0, 0.5, 1.0, 0.75, 0.75))

    def test_the_exam_takes_a_sentence_out_of_each_passage(self, tmp_path):
        with open(tmp_path / "sts.csv", "w", newline="") as file:
            csv.writer(file).writerows([("One, two.", "Three.", 2.5), ("Four.", "Five.", 0)])
        (tmp_path / "passages.txt").write_text("In one sentence the end.\nOne is here. Two is there. Three is last.\n")
        exam = make_exam(str(tmp_path / "sts.csv"), str(tmp_path / "passages.txt"))
        assert exam.pairs == [("pair/0/0", "pair/0/1", 2.5), ("pair/1/0", "pair/1/1", 0.0)]
        assert exam.texts["pair/0/0"] == "One, two." and exam.texts["sentence/1"] == "Two is there."
        assert exam.texts["passage/1"] == "One is here. Three is last."
        assert exam.searches == [("sentence/1", "passage/1")] and exam.passages == ["passage/0", "passage/1"]
        assert exam.names == [("name/passage/0", "passage/0"), ("name/passage/1", "passage/1")]
        assert (
            exam.texts["name/passage/0"] == "sentence the" and exam.texts["name/passage/1"] == "here three"
        )  # "one" is in both

    @pytest.mark.parametrize(
        ("sts", "passages", "says"),
        [
            ("a,b,1\na,b\n", "A. B. C.\n", r"record 2 is not two sentences and a number: \['a', 'b'\]"),
            ("a,b,much\n", "A. B. C.\n", "record 1 is not two sentences"),
            ("a,b,1\n", "A. B. C.\n", "needs two pairs"),
            ("a,b,1\na,b,2\n", "A. B.\n", "a passage of three sentences"),
        ],
    )
    def test_files_that_are_no_exam(self, sts, passages, says, tmp_path):
        (tmp_path / "sts.csv").write_text(sts)
        (tmp_path / "passages.txt").write_text(passages)
        with pytest.raises(SystemExit, match=says):
            print_scores([f"--sts={tmp_path}/sts.csv", f"--passages={tmp_path}/passages.txt"])

    def test_an_encoder_that_is_none_is_one_line(self, tmp_path):
        (tmp_path / "sts.csv").write_text("a,b,1\na,b,2\n")
        (tmp_path / "passages.txt").write_text("A. B. C.\n")
        files = [f"--sts={tmp_path}/sts.csv", f"--passages={tmp_path}/passages.txt"]
        with pytest.raises(SystemExit, match=r"training.scores: none is not a SavedModel"):
            print_scores([*files, "--encoder=none"])
        with pytest.raises(SystemExit, match=r"training.scores: .*none.csv"):
            print_scores([*files, f"--sts={tmp_path}/none.csv"])

    def test_the_bag_weighs_rare_tokens_more(self):
        texts = {"a": "1 1 2", "b": "1", "p": "1 3", "q": "2 2", "s": "3"}
        exam = Exam(texts, [("a", "b", 1)], [("s", "p")], [], ["p", "q"])
        bags = bag_of_tokens(exam, lambda given: [[int(token) for token in text.split()] for text in given])
        assert set(bags) == set(texts)
        # Of the pair's two sentences both have token 1, one has token 2; of the two passages one has each token.
        np.testing.assert_allclose(bags["a"], [0, 2 * np.log(3 / 3), np.log(3 / 2), 0], atol=1e-6)
        np.testing.assert_allclose(bags["q"], [0, 0, 2 * np.log(3 / 2), 0], atol=1e-6)
        np.testing.assert_allclose(bags["s"], [0, 0, 0, np.log(3 / 2)], atol=1e-6)
