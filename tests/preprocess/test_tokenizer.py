"""Token ids against the official preprocessor: golden strings, the code points of Unicode, and random texts."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders.inputs import pack_chunks
from pipeline.encoders.saved_model import describe_saved_model
from pipeline.errors import EncoderError
from pipeline.preprocess import wordpiece
from pipeline.preprocess.chunking import PreprocessorRule, WordpieceRule, WordpieceSplitter
from pipeline.preprocess.wordpiece import Tokenizer, Vocabulary, agrees_with_preprocessor, find_vocabulary
from pipeline.records import Chunk, Document
from tests.support.official import (
    INPUTS,
    golden_strings,
    golden_texts,
    official_pack,
    official_preprocessor,
    save_module,
    tokenize_together,
    vocabulary,
)
from tests.support.paths import ENCODER, PREPROCESSOR, REFERENCE

N_CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)
BLOCK = 1 << 16  # texts in one call of a kernel


@functools.cache
def tokenizer(lower_case: bool = True) -> Tokenizer:
    return Tokenizer(Vocabulary(tuple(vocabulary()), lower_case))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "golden_preprocess_v1000.npz") as arrays:
        return dict(arrays)


def golden_tokens(i: int) -> list[int]:
    """Token ids of golden string i, its words joined."""
    words, pieces = golden()["tokenize/word_splits"], golden()["tokenize/piece_splits"]
    return golden()["tokenize/flat_values"][pieces[words[i]] : pieces[words[i + 1]]].tolist()


def to_lists(ids: np.ndarray, splits: np.ndarray) -> list[list[int]]:
    return [ids[start:end].tolist() for start, end in itertools.pairwise(splits)]


def split(documents: Sequence[Document], max_tokens: int) -> list[Chunk]:
    rule = WordpieceRule(Vocabulary(tuple(vocabulary())), max_tokens)
    chunks = list(WordpieceSplitter(rule).split(documents))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return chunks


def build_official_kernel(pieces: Sequence[str], lower_case: bool) -> Any:
    """The op inside the official preprocessors, straight from a vocabulary."""
    keys = tf.lookup.KeyValueTensorInitializer(list(pieces), tf.range(len(pieces), dtype=tf.int64))
    table = tf.lookup.StaticVocabularyTable(keys, num_oov_buckets=1)
    return tensorflow_text.BertTokenizer(table, lower_case=lower_case, token_out_type=tf.int32)


def test_golden_strings_have_their_golden_tokens():
    texts = golden_texts()
    assert to_lists(*tokenizer().tokenize(texts)) == [golden_tokens(i) for i in range(len(texts))]


@pytest.mark.parametrize("kernel", ["_fast", "_exact"])
def test_broken_utf8_has_its_golden_tokens_too(kernel):
    """Such strings cannot be documents, whose texts are str; so the kernels beneath get the bytes themselves."""
    broken = golden_strings()[220:]
    for string in broken:
        with pytest.raises(UnicodeDecodeError):
            string.decode()
    ids, splits = Tokenizer._run(getattr(tokenizer(), kernel), broken)
    assert to_lists(ids, splits) == [golden_tokens(i) for i in range(220, 230)]


@pytest.mark.parametrize(("case", "length"), [("pack8", 8), ("pack16", 16), ("pack32", 32), ("pack512", 512)])
def test_golden_strings_are_packed_as_the_official_preprocessor_packs_them(case, length):
    documents = [Document(str(i), text) for i, text in enumerate(golden_texts())]
    packed = pack_chunks(split(documents, length), len(documents), length)
    for name in INPUTS:
        np.testing.assert_array_equal(packed[name], golden()[f"{case}/{name}"][:220])


def test_golden_strings_are_packed_as_the_official_preprocessor_does_by_default():
    documents = [Document(str(i), text) for i, text in enumerate(golden_texts())]
    packed = pack_chunks(split(documents, 128), len(documents), 128)
    for name in INPUTS:
        np.testing.assert_array_equal(packed[name], golden()[f"default128/{name}"][:220])


@pytest.mark.parametrize("length", [8, 15, 32, 128])
def test_golden_pairs_are_packed_as_the_official_preprocessor_packs_them(length):
    strings = golden_strings()
    pairs = {i: (strings[i], strings[-1 - i]) for i in range(230)}
    valid = [i for i in pairs if i < 220 and 229 - i < 220]
    documents = [Document(str(i), pairs[i][0].decode(), pairs[i][1].decode()) for i in valid]
    packed = pack_chunks(split(documents, length), len(documents), length)
    for name in INPUTS:
        np.testing.assert_array_equal(packed[name], golden()[f"pair{length}/{name}"][valid])
    assert len(valid) == 210


def letters() -> list[str]:
    """Every letter, mark and digit that Python knows, plain and as normalisation leaves it.

    Without ideographs and Hangul syllables: each is a word of its own or decomposed, as those that are in are.
    """
    found = set()
    for character in map(chr, range(N_CODE_POINTS)):
        if unicodedata.category(character)[0] in "LMN":
            folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", character).casefold())
            found.update(character + unicodedata.normalize("NFD", folded))
    return sorted(
        c for c in found if unicodedata.category(c)[0] in "LMN" and not "\u3400" <= c <= "\ud7a3" and c < "\U00020000"
    )


@functools.cache
def wide_vocabulary() -> tuple[str, ...]:
    """Pieces for letters of all scripts: with fewer, two different normalisations would both be [UNK]."""
    return tuple(dict.fromkeys([*vocabulary(), *(form for c in letters() for form in (c, f"##{c}"))]))


# What the fast kernel was found to do otherwise, also where it keeps case, as ranges: this is no copy of the product's
# list, but what the sweep must find if that were empty.
DIFFERENT = [0x1680, 0x1B4E, 0x1B4F, 0x1B7F, 0x2028, 0x2029, 0x10D6E, 0x113D4, 0x113D5, 0x113D7, 0x113D8]
DIFFERENT += [0x11BE1, 0x16D6D, 0x16D6E, 0x16D6F, 0x1E5FF]
DIFFERENT_CASED = [*DIFFERENT, 0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
both_cases = pytest.mark.parametrize("lower_case", [True, False], ids=["uncased", "cased"])


def find_differences(code_points: Sequence[int], lower_case: bool, fast_only: bool = False) -> list[str]:
    """The code points that we tokenise unlike the official kernel, or that the fast kernel alone does."""
    pieces = wide_vocabulary()
    ours = Tokenizer(Vocabulary(pieces, lower_case))
    official = build_official_kernel(pieces, lower_case)
    different = []
    for start in range(0, len(code_points), BLOCK):
        block = code_points[start : start + BLOCK]
        texts = [f"a{chr(c)}b {chr(c)}1" for c in block]  # inside a word, alone and before a digit
        expected = official.tokenize(texts).merge_dims(-2, -1)
        ids, splits = Tokenizer._run(ours._fast, texts) if fast_only else ours.tokenize(texts)
        if not (np.array_equal(ids, expected.flat_values) and np.array_equal(splits, expected.row_splits)):
            pairs = zip(block, to_lists(ids, splits), expected.to_list(), strict=True)
            different += [hex(c) for c, mine, theirs in pairs if mine != theirs]
    return different


@both_cases
def test_code_points_are_tokenized_as_by_the_official_kernel(lower_case):
    """All of the alphabets, every 97th of the rest, and those that are known to be special."""
    found = {*range(0x3100), *range(0x3100, N_CODE_POINTS, 97), *DIFFERENT_CASED} - set(SURROGATES)
    assert find_differences(sorted(found), lower_case) == []


@pytest.mark.exhaustive
@both_cases
def test_every_code_point_is_tokenized_as_by_the_official_kernel(lower_case):
    code_points = [c for c in range(N_CODE_POINTS) if c not in SURROGATES]
    assert len(code_points) == N_CODE_POINTS - 2048
    assert find_differences(code_points, lower_case) == []


@both_cases
def test_the_sweep_would_find_what_the_fast_kernel_does_differently(lower_case):
    """The fast kernel alone fails it; without this, the sweep might compare nothing."""
    known = DIFFERENT if lower_case else DIFFERENT_CASED
    assert find_differences(known, lower_case, fast_only=True) == [hex(c) for c in known]


TRICKY = (
    "\x00\t\n\r\x1c\x85\xa0\xad\u0130\u0131ßςΣſﬁ½Å\u0301\u0345"
    "\u1680\u180e\u200b\u200d\u2028\u2029\u202e\ufeff\ufffd[]#'。、"
)
WORDS = st.sampled_from(
    ["unaffable", "[CLS]", "[SEP]", "[UNK]", "##ing", "it's", "x" * 99, "x" * 101, "é" * 60, "漢字"]
)
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(
    st.one_of(st.text(CHARACTERS, max_size=30), st.text(st.sampled_from(TRICKY), max_size=6), WORDS), max_size=6
).map("".join)


@settings(max_examples=100)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_any_texts_have_the_official_preprocessors_tokens(texts):
    assert to_lists(*tokenizer().tokenize(texts)) == tokenize_together(texts)


@settings(max_examples=30)
@given(st.lists(TEXTS, min_size=2, max_size=2), st.integers(4, 60))
def test_any_pair_is_packed_as_the_official_preprocessor_packs_it(segments, length):
    preprocessor = official_preprocessor()
    tokens = [preprocessor.tokenize(tf.constant([segment])) for segment in segments]
    expected = preprocessor.bert_pack_inputs(tokens, seq_length=tf.constant(length))
    packed = pack_chunks(split([Document("", *segments)], length), 1, length)
    for name in INPUTS:
        np.testing.assert_array_equal(packed[name], expected[name])


def test_a_text_is_tokenized_the_same_in_any_company():
    texts = [*golden_texts(), "a\u2028b", "plain"]
    together = to_lists(*tokenizer().tokenize(texts))
    alone = [to_lists(*tokenizer().tokenize([text]))[0] for text in texts]
    assert together == alone


def test_no_texts_have_no_tokens():
    assert to_lists(*tokenizer().tokenize([])) == []


# --- where the vocabulary and the case rule come from ----------------------------------------------------------------


def planned_vocabulary(encoder: str, preprocessor: str = "") -> Vocabulary:
    rule = make_embedding_spec(EmbedConfig.from_flat({"encoder": encoder, "preprocessor": preprocessor})).split
    assert isinstance(rule, WordpieceRule)
    return rule.vocabulary


@pytest.mark.parametrize("preprocessor", [PREPROCESSOR, ""], ids=["preprocessor", "encoder"])
def test_the_vocabulary_and_the_case_rule_are_those_of_the_official_models(preprocessor):
    assert planned_vocabulary(ENCODER, preprocessor) == Vocabulary(tuple(vocabulary()), lower_case=True)


@pytest.mark.parametrize("agrees", [True, False])
def test_a_preprocessor_is_loaded_once_for_the_comparison_of_tokens(agrees, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))
    load, loaded = tf.saved_model.load, []
    monkeypatch.setattr(tf.saved_model, "load", lambda folder: loaded.append(folder) or load(folder))
    compared = Vocabulary(tuple(vocabulary()), lower_case=agrees)
    for _ in range(2):
        assert agrees_with_preprocessor(compared, PREPROCESSOR) is agrees
    assert loaded == [PREPROCESSOR]
    monkeypatch.setattr(tensorflow_text, "__version__", "another")
    assert agrees_with_preprocessor(compared, PREPROCESSOR) is agrees
    assert loaded == [PREPROCESSOR] * 2


def save_bert_preprocessor(folder: str, vocab_file: str, lower_case: bool) -> str:
    """A preprocessor of the BERT family made of tensorflow_text's own layers, as anybody may export one."""

    class Preprocessor(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vocab = tf.saved_model.Asset(vocab_file)
            keys = tf.lookup.TextFileInitializer(
                self.vocab, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
            )
            self.table = tf.lookup.StaticVocabularyTable(keys, num_oov_buckets=1)
            self.bert = tensorflow_text.BertTokenizer(self.table, lower_case=lower_case, token_out_type=tf.int32)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
            return self.bert.tokenize(texts)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, texts: tf.Tensor) -> dict[str, tf.Tensor]:
            ids = self.bert.tokenize(texts).merge_dims(-2, -1).to_tensor(shape=[None, 128])
            return dict.fromkeys(INPUTS, ids)

    tf.saved_model.save(Preprocessor(), folder)
    return folder


@pytest.mark.parametrize(
    "lower_case",
    [pytest.param(True, id="uncased", marks=pytest.mark.exhaustive), pytest.param(False, id="cased")],
)
def test_the_case_rule_is_read_from_the_preprocessors_graph(lower_case, tmp_path):
    folder = save_bert_preprocessor(str(tmp_path / "bert"), f"{ENCODER}/assets/vocab.txt", lower_case)
    assert planned_vocabulary(ENCODER, folder) == Vocabulary(tuple(vocabulary()), lower_case)


@both_cases
def test_the_case_rule_is_read_from_the_encoders_variable(lower_case, tmp_path):
    folder = save_module(
        tmp_path / "encoder",
        call=tf.function(lambda ids: ids, input_signature=[tf.TensorSpec([None], tf.int32)]),
        do_lower_case=tf.Variable(lower_case, trainable=False),
        vocab_file=tf.saved_model.Asset(f"{ENCODER}/assets/vocab.txt"),
    )
    assert find_vocabulary(describe_saved_model(folder)) == Vocabulary(tuple(vocabulary()), lower_case)


def test_that_a_preprocessor_has_our_tokens_is_found_out_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path))
    calls = []
    monkeypatch.setattr(wordpiece, "_compare_tokens", lambda *arguments: calls.append(arguments) or len(calls) == 1)
    uncased, cased = (Vocabulary(tuple(vocabulary()), lower_case) for lower_case in (True, False))
    found = [agrees_with_preprocessor(rule, PREPROCESSOR) for rule in (uncased, uncased, cased, cased)]
    assert (found, len(calls)) == ([True, True, False, False], 2)


def test_a_preprocessor_that_is_called_as_it_is_may_come_from_another_machine():
    texts = [text for text in golden_texts() if text.strip()][:20]
    rule = PreprocessorRule("/on/another/machine", max_tokens=24, handle=PREPROCESSOR)
    chunks = list(rule.load().split([Document(str(i), text) for i, text in enumerate(texts)]))
    assert len(chunks) == len(texts) > 10
    for text, chunk in zip(texts, chunks, strict=True):
        packed = official_pack([text], 24)
        size = int(packed["input_mask"].sum())
        assert np.frombuffer(chunk.ids, "<i4").tolist() == packed["input_word_ids"][0, :size].tolist()


def test_the_cased_tokens_are_those_of_the_official_kernel():
    texts = [*golden_texts(), "MiXeD cAsE Étude", "a\u00a0b\u2003c"]
    expected = build_official_kernel(vocabulary(), False).tokenize(texts).merge_dims(-2, -1).to_list()
    assert to_lists(*tokenizer(lower_case=False).tokenize(texts)) == expected
    assert to_lists(*tokenizer(lower_case=True).tokenize(texts)) != expected


def test_a_vocabulary_without_the_special_pieces_is_refused():
    with pytest.raises(EncoderError, match=r"\[CLS\]"):
        WordpieceSplitter(WordpieceRule(Vocabulary(("[UNK]", "a")), 16))


def test_a_vocabulary_file_may_have_windows_line_ends(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(vocabulary()).encode())
    assert Vocabulary.read(str(path), True) == Vocabulary(tuple(vocabulary()), True)
