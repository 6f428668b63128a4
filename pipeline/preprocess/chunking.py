"""Documents to chunks: tokenise, cut or window to the encoder's length, add [CLS] and [SEP]."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol, Union

import apache_beam as beam
import numpy as np

from pipeline import metrics
from pipeline.bundles import end_bundle
from pipeline.encoders.runtime import load_tensorflow
from pipeline.encoders.saved_model import resolve_handle
from pipeline.errors import ConfigError
from pipeline.preprocess.windows import Window, cut_texts
from pipeline.preprocess.wordpiece import Vocabulary, load_tokenizer
from pipeline.records import BundleCounts, Chunk, DeadLetter, Document

BUFFERED_DOCUMENTS = 1024  # the tokeniser's kernel costs about 0.2 ms a call, whatever it is given
BUFFERED_CHARACTERS = 4_000_000
UNKNOWN = "[UNK]"
OTHER_WORDS = "the tokeniser makes other words of the text than of its parts, so it is not cut"


def trim_pair(n_first: int, n_second: int, room: int) -> tuple[int, int]:
    """How many tokens of each of two segments fit into `room` tokens.

    Each segment may use half of the room, the first one the odd token, and what the other leaves over: the formula of
    the published preprocessor, whose result equals that of tensorflow_text's RoundRobinTrimmer.
    """
    second_half = room // 2
    first_half = room - second_half
    return (
        min(n_first, first_half + max(0, second_half - n_second)),
        min(n_second, second_half + max(0, first_half - n_first)),
    )


def hash_content(text: str, pair: Optional[str]) -> str:
    """Hash over all of a document that reaches the encoder: 32 hexadecimal digits."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    if pair is not None:
        digest.update(b"\xff" + pair.encode())  # 0xff occurs in no UTF-8 text
    return digest.hexdigest()


def is_encodable(text: str) -> bool:
    """Whether a text has a UTF-8 form; JSON can spell half of a surrogate pair, which has none."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Splitter(Protocol):
    """Turns documents into chunks; a document that cannot be chunked becomes a dead letter."""

    def split(self, documents: Sequence[Document]) -> Iterator[Union[Chunk, DeadLetter]]: ...


@dataclass(frozen=True)
class WordpieceRule:
    """How documents are cut for a WordPiece encoder. `load()` makes the splitter, on a worker.

    Attributes:
      vocabulary: of the encoder.
      max_tokens: the most tokens of a chunk, [CLS] and [SEP] included.
      on_long: truncate, reject, or chunk or average: cut into windows.
      overlap: tokens that neighbouring windows share.
      prefix: put before the text of every chunk.
      by_sentence: windows end at sentence ends where they can.
    """

    vocabulary: Vocabulary
    max_tokens: int
    on_long: str = "truncate"
    overlap: int = 0
    prefix: str = ""
    by_sentence: bool = False

    def load(self) -> Splitter:
        return WordpieceSplitter(self)


class WordpieceSplitter:
    def __init__(self, rule: WordpieceRule) -> None:
        self.rule = rule
        self._tokenizer = load_tokenizer(rule.vocabulary)
        self._cls = np.int32(rule.vocabulary.id_of("[CLS]")).tobytes()
        self._sep = np.int32(rule.vocabulary.id_of("[SEP]")).tobytes()
        self._unknown = rule.vocabulary.id_of(UNKNOWN)
        self._room = rule.max_tokens - 2
        self._prefix, _ = self._tokenizer.tokenize([rule.prefix])

    def split(self, documents: Sequence[Document]) -> Iterator[Union[Chunk, DeadLetter]]:
        texts = [self.rule.prefix + document.text for document in documents]
        pairs = [document.pair for document in documents if document.pair is not None]
        ids, splits = self._tokenizer.tokenize(texts + pairs)
        buffer, ends = ids.tobytes(), splits.tolist()
        unknown = self._count_unknown(ids, splits)
        windows = self._cut_long(documents, ids, splits)
        next_pair = len(texts)
        for i, (document, text) in enumerate(zip(documents, texts, strict=True)):
            tokens = buffer[4 * ends[i] : 4 * ends[i + 1]]
            content_hash = hash_content(text, document.pair)
            if document.pair is not None:
                pair = buffer[4 * ends[next_pair] : 4 * ends[next_pair + 1]]
                next_pair += 1
                yield self._join_pair(document, content_hash, tokens, pair)
            elif self._is_cut(document, ends[i + 1] - ends[i]):
                own = next(windows)
                if own is None:
                    yield DeadLetter.of("preprocess", "other_words", OTHER_WORDS, document, content_hash)
                else:
                    yield from self._make_chunks(document, content_hash, own)
            else:
                yield self._truncate(document, content_hash, tokens, unknown[i])

    def _is_cut(self, document: Document, n_tokens: int) -> bool:
        return document.pair is None and n_tokens > self._room and self.rule.on_long in ("chunk", "average")

    def _cut_long(
        self, documents: Sequence[Document], ids: np.ndarray, splits: np.ndarray
    ) -> Iterator[Optional[list[Window]]]:
        """The windows of each document that is cut; None for one that cannot be cut between words."""
        n_prefix, counts = len(self._prefix), np.diff(splits).tolist()
        cut = [i for i, document in enumerate(documents) if self._is_cut(document, counts[i])]
        if not cut:
            return iter(())
        texts = [documents[i].text for i in cut]
        parts = [ids[splits[i] + n_prefix : splits[i + 1]] for i in cut]
        try:
            return iter(self._cut(texts, parts))
        except ValueError:  # one of them; which one is found by trying each alone
            return (self._try_cut(text, part) for text, part in zip(texts, parts, strict=True))

    def _cut(self, texts: list[str], parts: list[np.ndarray]) -> list[list[Window]]:
        rule, splits = self.rule, np.concatenate(([0], np.cumsum([len(part) for part in parts])))
        size = self._room - len(self._prefix)
        cut = cut_texts(texts, np.concatenate(parts), splits, self._tokenizer, size, rule.overlap, rule.by_sentence)
        return list(cut)

    def _try_cut(self, text: str, part: np.ndarray) -> Optional[list[Window]]:
        try:
            return self._cut([text], [part])[0]
        except ValueError:
            return None

    def _count_unknown(self, ids: np.ndarray, splits: np.ndarray) -> list[int]:
        """[UNK] among the tokens of each text that fit into one chunk."""
        found = np.flatnonzero(ids == self._unknown)
        if not len(found):
            return [0] * (len(splits) - 1)
        begins = splits[:-1]
        low, high = np.searchsorted(found, (begins, np.minimum(splits[1:], begins + self._room)))
        counts: list[int] = (high - low).tolist()
        return counts

    def _truncate(
        self, document: Document, content_hash: str, tokens: bytes, n_unknown: int
    ) -> Union[Chunk, DeadLetter]:
        n, room = len(tokens) // 4, self._room
        if n > room and self.rule.on_long == "reject":
            return self._reject(document, content_hash, n + 2)
        kept = min(n, room)
        ids = self._cls + tokens[: 4 * kept] + self._sep
        return Chunk(document, content_hash, 0, 1, ids, kept + 2, kept, n - kept, 0, len(document.text), n_unknown)

    def _make_chunks(self, document: Document, content_hash: str, windows: list[Window]) -> Iterator[Chunk]:
        head, n_windows = self._cls + self._prefix.tobytes(), len(windows)
        n_prefix, n_unknown = len(self._prefix), np.count_nonzero(self._prefix == self._unknown)
        for number, (start, end, own) in enumerate(windows):
            ids, n = head + own.tobytes() + self._sep, n_prefix + len(own)
            unknown = int(n_unknown + np.count_nonzero(own == self._unknown))
            yield Chunk(document, content_hash, number, n_windows, ids, n + 2, n, 0, start, end, unknown)

    def _join_pair(
        self, document: Document, content_hash: str, first: bytes, second: bytes
    ) -> Union[Chunk, DeadLetter]:
        n_first, n_second = len(first) // 4, len(second) // 4
        kept_first, kept_second = trim_pair(n_first, n_second, self.rule.max_tokens - 3)
        n_cut = n_first + n_second - kept_first - kept_second
        if n_cut and self.rule.on_long == "reject":
            return self._reject(document, content_hash, n_first + n_second + 3)
        ids = self._cls + first[: 4 * kept_first] + self._sep + second[: 4 * kept_second] + self._sep
        n_unknown = int(np.count_nonzero(np.frombuffer(ids, "<i4") == self._unknown))
        n = kept_first + kept_second
        return Chunk(document, content_hash, 0, 1, ids, kept_first + 2, n, n_cut, n_unknown=n_unknown)

    def _reject(self, document: Document, content_hash: str, n_tokens: int) -> DeadLetter:
        message = f"{n_tokens} tokens exceed --max_tokens={self.rule.max_tokens} and --on_long=reject"
        return DeadLetter.of("preprocess", "too_long", message, document, content_hash)


@dataclass(frozen=True)
class PreprocessorRule:
    """A preprocessor SavedModel of unknown kind, called as it is; it cuts long texts by its own rules.

    Attributes:
      folder: of the SavedModel on the machine that planned the run.
      max_tokens: what it packs to.
      prefix: put before every text.
      handle: the name by which another machine finds it.
    """

    folder: str
    max_tokens: int
    prefix: str = ""
    handle: str = ""

    def load(self) -> Splitter:
        return PreprocessorSplitter(self)


class PreprocessorSplitter:
    def __init__(self, rule: PreprocessorRule) -> None:
        self.rule = rule
        self._tf = load_tensorflow()
        folder = rule.folder if os.path.isdir(rule.folder) else resolve_handle(rule.handle)
        self._model = self._tf.saved_model.load(folder)

    def split(self, documents: Sequence[Document]) -> Iterator[Union[Chunk, DeadLetter]]:
        texts = [self.rule.prefix + document.text for document in documents]
        singles = [i for i, document in enumerate(documents) if document.pair is None]
        doubles = [i for i, document in enumerate(documents) if document.pair is not None]
        chunks: dict[int, Chunk] = {}
        for group in (singles, doubles):
            if not group:
                continue
            segments = [[texts[i] for i in group]]
            if group is doubles:
                segments.append([documents[i].pair or "" for i in group])
            ids, mask, types = self._pack(segments)
            for row, i in enumerate(group):
                size = int(mask[row].sum())
                document = documents[i]
                chunks[i] = Chunk(
                    document=document,
                    content_hash=hash_content(texts[i], document.pair),
                    number=0,
                    n_chunks=1,
                    ids=ids[row, :size].astype("<i4").tobytes(),
                    n_first=size - int(types[row, :size].sum()),
                    n_content=max(1, size - 2),
                    n_truncated=None,
                )
        for i in range(len(documents)):
            yield chunks[i]

    def _pack(self, segments: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tf = self._tf
        if hasattr(self._model, "tokenize") and hasattr(self._model, "bert_pack_inputs"):
            tokens = [self._model.tokenize(tf.constant(segment)) for segment in segments]
            packed = self._model.bert_pack_inputs(tokens, seq_length=tf.constant(self.rule.max_tokens))
        elif len(segments) > 1:
            raise ConfigError(f"{self.rule.folder} cannot pack two segments; give documents without a pair")
        else:
            packed = self._model(tf.constant(segments[0]))
        return tuple(packed[name].numpy() for name in ("input_word_ids", "input_mask", "input_type_ids"))


@dataclass(frozen=True)
class TextRule:
    """For encoders that take strings: the text is the chunk, and tokens are not counted."""

    prefix: str = ""

    def load(self) -> Splitter:
        return self

    def split(self, documents: Sequence[Document]) -> Iterator[Union[Chunk, DeadLetter]]:
        for document in documents:
            if document.pair is not None:
                raise ConfigError(f"{document.id!r} has a pair, and this encoder takes one string; join the two")
            text = self.prefix + document.text
            yield Chunk(document, hash_content(text, None), 0, 1, text.encode(), 0, 1, None)


SplitRule = Union[WordpieceRule, PreprocessorRule, TextRule]


class SplitDocuments(beam.DoFn):
    """Documents to chunks, a buffer at a time; all chunks of a document leave in one bundle."""

    def __init__(self, rule: SplitRule) -> None:
        self.rule = rule

    def setup(self) -> None:
        self._splitter = self.rule.load()

    def start_bundle(self) -> None:
        self._buffer: list[Document] = []
        self._characters = 0
        self._counts: defaultdict[str, float] = defaultdict(int)

    def process(self, document: Document) -> Iterable[Any]:
        if not (is_encodable(document.text) and is_encodable(document.pair or "")):
            self._counts["documents"] += 1
            self._counts["dead_letters"] += 1
            message = "the text holds half of a surrogate pair, which no encoding can express"
            text = document.text.encode("utf-8", "backslashreplace").decode()
            dead_letter = DeadLetter("preprocess", "invalid_utf8", message, document.origin, document.id, text)
            return [beam.pvalue.TaggedOutput("dead_letters", dead_letter)]
        self._buffer.append(document)
        self._characters += len(document.text) + len(document.pair or "")
        if len(self._buffer) >= BUFFERED_DOCUMENTS or self._characters >= BUFFERED_CHARACTERS:
            return self._flush()
        return ()

    def finish_bundle(self) -> Iterable[Any]:
        yield from end_bundle(self._flush())
        counted = BundleCounts.of("preprocess", dict(self._counts))
        yield from end_bundle([beam.pvalue.TaggedOutput("bundle_counts", counted)])

    def _flush(self) -> Iterator[Any]:
        documents, self._buffer, self._characters = self._buffer, [], 0
        if not documents:
            return
        spot_checks = [document for document in documents if document.is_spot_check]
        wanted = [document for document in documents if not document.is_spot_check] if spot_checks else documents
        begun = time.perf_counter()
        outputs = list(self._splitter.split(wanted))
        self._counts["tokenize_seconds"] += time.perf_counter() - begun
        self._counts["documents"] += len(wanted)
        metrics.TOKENS.inc(sum(output.n_content for output in outputs if isinstance(output, Chunk)))
        for output in outputs:
            if isinstance(output, DeadLetter):
                self._counts["dead_letters"] += 1
                yield beam.pvalue.TaggedOutput("dead_letters", output)
            else:
                self._counts["chunks"] += 1
                self._counts["tokens"] += output.n_content
                self._counts["truncated_tokens"] += output.n_truncated or 0
                if output.n_unknown is not None:
                    self._counts["unknown_tokens"] += output.n_unknown
                yield output
        if spot_checks:
            yield from (output for output in self._splitter.split(spot_checks) if isinstance(output, Chunk))


@dataclass
class Preprocess(beam.PTransform):
    """PCollection[Document] -> (PCollection[Chunk], PCollection[DeadLetter], PCollection[BundleCounts])."""

    rule: SplitRule

    def expand(self, documents: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        outputs = documents | "SplitDocuments" >> beam.ParDo(SplitDocuments(self.rule)).with_outputs(
            "dead_letters", "bundle_counts", main="chunks"
        )
        return outputs.chunks, outputs.dead_letters, outputs.bundle_counts
