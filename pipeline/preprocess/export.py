"""Writes a BERT preprocessor as a SavedModel with the interface of TF Hub's `bert_en_uncased_preprocess`.

One letter glossary: B texts, L tokens. The loaded object offers

    preprocessor(strings)                                   [B] string -> dict of three [B, 128] int32
    preprocessor.tokenize(strings)                          [B] string -> ragged [B, (words), (pieces)] int32
    preprocessor.bert_pack_inputs([a] or [a, b], length)    ragged int32 -> dict of three [B, length] int32
    preprocessor.tokenize.get_special_tokens_dict()         names -> scalars

Loading it needs `import tensorflow_text` first, as for the module on TF Hub.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import EncoderError
from pipeline.signals import on_stop

if TYPE_CHECKING:
    import tensorflow as tf

SPECIAL_TOKENS = {
    "padding_id": "[PAD]",
    "start_of_sequence_id": "[CLS]",
    "end_of_segment_id": "[SEP]",
    "mask_id": "[MASK]",
}
UNKNOWN = "[UNK]"
DEFAULT_LENGTH = 128  # tokens


def check_vocabulary(vocabulary: Sequence[str]) -> None:
    """Checks that a list of word pieces can be written as a file of lines and read back by TensorFlow.

    Raises:
      EncoderError: if a special token is missing, or a piece is empty, repeated or holds a line break.
    """
    seen: set[str] = set()
    for number, piece in enumerate(vocabulary):
        if not piece or "\n" in piece or "\r" in piece:
            raise EncoderError(
                f"piece {number} of the vocabulary, {piece!r}, is empty or holds a line break; remove it"
            )
        if piece in seen:
            raise EncoderError(f"piece {number} of the vocabulary, {piece!r}, occurs twice; keep one of them")
        seen.add(piece)
    for token in [*SPECIAL_TOKENS.values(), UNKNOWN]:
        if token not in seen:
            raise EncoderError(f"the vocabulary lacks {token}; add it as a piece of its own")


def trimmed_lengths(lengths: Sequence[Any], room: Any) -> list[Any]:
    """Shares the room for tokens between one or two segments, as the preprocessor on TF Hub does.

    Two segments are cut to equal lengths, the first keeping the odd token; what one does not need goes to the other.

    Args:
      lengths: one or two [B] int tensors, the tokens of each segment.
      room: scalar, tokens that all segments may keep together.

    Returns:
      Like `lengths`: how many leading tokens each segment keeps.
    """
    import tensorflow as tf

    if len(lengths) == 1:
        return [tf.minimum(lengths[0], room)]
    first, second = lengths
    small = room // 2
    large = room - small
    return [
        tf.minimum(first, large + tf.maximum(small - second, 0)),
        tf.minimum(second, small + tf.maximum(large - first, 0)),
    ]


def pack(
    segments: Sequence[tf.RaggedTensor], length: Any, *, start: int, end: int, padding: int
) -> dict[str, tf.Tensor]:
    """Trims one or two segments and lays them out as [CLS] a [SEP] (b [SEP]) [PAD]...

    Args:
      segments: one or two ragged int32 tensors, [B, (pieces)] or [B, (words), (pieces)].
      length: scalar, tokens per row of the result.
      start: id of [CLS].
      end: id of [SEP].
      padding: id of [PAD].

    Returns:
      `input_word_ids`, `input_mask` (1 where there is a token) and `input_type_ids` (1 from the second segment on, its
      [SEP] included), each [B, length] int32.
    """
    import tensorflow as tf

    segments = [s.merge_dims(1, 2) if s.ragged_rank == 2 else s for s in segments]  # [B, (pieces)]
    lengths = [s.row_lengths() for s in segments]  # [B]
    room = tf.cast(length, tf.int64) - len(segments) - 1
    n_texts = segments[0].nrows()

    def column(value: int) -> tf.Tensor:
        return tf.fill([n_texts, 1], tf.constant(value, tf.int32))  # [B, 1]

    ids, types = [column(start)], [column(0)]
    for number, (segment, kept) in enumerate(zip(segments, trimmed_lengths(lengths, room), strict=True)):
        first = segment.row_starts()  # [B]
        tokens = tf.gather(segment.flat_values, tf.ragged.range(first, first + kept))  # [B, (kept)]
        ids += [tokens, column(end)]
        types += [tf.fill([n_texts, 1], number), tf.zeros_like(tokens) + number]
    word_ids = tf.concat(ids, axis=1)  # [B, (tokens)]
    shape = tf.stack([-1, length])
    return {
        "input_word_ids": word_ids.to_tensor(padding, shape=shape),  # [B, L]
        "input_mask": tf.ones_like(word_ids).to_tensor(0, shape=shape),  # [B, L]
        "input_type_ids": tf.concat(types, axis=1).to_tensor(0, shape=shape),  # [B, L]
    }


@contextlib.contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """Yields a temporary folder beside `folder` that takes its name when the block ends well, and else is removed.

    Raises:
      EncoderError: if `folder` exists already and is not empty.
    """
    folder = os.path.abspath(folder)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=os.path.dirname(folder))
    forget = on_stop(lambda: shutil.rmtree(temporary, ignore_errors=True))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner may read.
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if not os.path.lexists(folder):
                raise
            raise EncoderError(f"{folder} exists already; remove it or name another folder") from error
    finally:
        forget()
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def vocabulary_file(vocabulary: Sequence[str]) -> Iterator[str]:
    """Yields the path of a temporary `vocab.txt`, one piece per line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(piece + "\n" for piece in vocabulary)
        yield path


def saveable(**attributes: Any) -> tf.Module:
    """Returns an object with these attributes, all of which `tf.saved_model.save` writes."""
    import tensorflow as tf

    class Saveable(tf.Module):
        variables = trainable_variables = None  # properties in tf.Module, which could not be saved under these names

    result = Saveable()
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


def export_preprocessor(vocabulary: Sequence[str], folder: str, *, lower_case: bool = True) -> None:
    """Writes a preprocessor for one WordPiece vocabulary; the folder appears only when it is complete.

    Args:
      vocabulary: pieces in the order of their ids, [PAD], [UNK], [CLS], [SEP] and [MASK] among them.
      folder: local path to create.
      lower_case: fold case and strip accents, as for uncased encoders.

    Raises:
      EncoderError: if the vocabulary cannot be used or the folder exists.
    """
    import tensorflow as tf

    check_vocabulary(vocabulary)
    with new_folder(folder) as temporary, vocabulary_file(vocabulary) as path:
        preprocessor, serve = _preprocessor(vocabulary, path, lower_case)
        tf.saved_model.save(preprocessor, temporary, signatures={"serving_default": serve})


def _preprocessor(vocabulary: Sequence[str], path: str, lower_case: bool) -> tuple[tf.Module, Any]:
    import tensorflow as tf
    import tensorflow_text as text

    special = {name: vocabulary.index(token) for name, token in SPECIAL_TOKENS.items()}
    lines = tf.lookup.TextFileInitializer(
        path, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
    )
    table = tf.lookup.StaticVocabularyTable(lines, num_oov_buckets=1)
    tokenizer = text.BertTokenizer(table, token_out_type=tf.int32, lower_case=lower_case)

    def pack_segments(segments: Sequence[tf.RaggedTensor], length: Any) -> dict[str, tf.Tensor]:
        return pack(
            segments,
            length,
            start=special["start_of_sequence_id"],
            end=special["end_of_segment_id"],
            padding=special["padding_id"],
        )

    def tokenize(sentences: tf.Tensor, training: bool = False, mask: None = None) -> tf.RaggedTensor:
        return tokenizer.tokenize(sentences)  # [B, (words), (pieces)]

    def bert_pack_inputs(inputs: list[Any], seq_length: Any = DEFAULT_LENGTH) -> dict[str, tf.Tensor]:
        return pack_segments(inputs, seq_length)

    def preprocess(sentences: tf.Tensor, training: bool = False, mask: None = None) -> dict[str, tf.Tensor]:
        return pack_segments([tokenizer.tokenize(sentences)], DEFAULT_LENGTH)

    def get_special_tokens_dict() -> dict[str, tf.Tensor]:
        return {
            name: tf.constant(value, tf.int32) for name, value in {**special, "vocab_size": len(vocabulary)}.items()
        }

    def serve(sentences: tf.Tensor) -> dict[str, tf.Tensor]:
        # The module on TF Hub was exported by Keras, which named its outputs so, in the order of their sorted keys.
        outputs = preprocess(sentences)
        names = ["bert_pack_inputs", "bert_pack_inputs_1", "bert_pack_inputs_2"]
        return dict(zip(names, (outputs[key] for key in sorted(outputs)), strict=True))

    sentences = tf.TensorSpec([None], tf.string, name="sentences")
    called, tokenized, packed = (tf.function(f, autograph=False) for f in (preprocess, tokenize, bert_pack_inputs))
    for training in (True, False):
        called.get_concrete_function(sentences, training, None)
        tokenized.get_concrete_function(sentences, training, None)
    for ragged_rank in (1, 2):
        segment = tf.RaggedTensorSpec([None] * (ragged_rank + 1), tf.int32, ragged_rank, tf.int64)
        for n_segments in (1, 2):
            packed.get_concrete_function([segment] * n_segments, tf.TensorSpec([], tf.int32, name="seq_length"))

    no_weights: dict[str, list[tf.Variable]] = {"variables": [], "trainable_variables": [], "regularization_losses": []}
    special_tokens = tf.function(get_special_tokens_dict, input_signature=[])
    preprocessor = saveable(
        __call__=called,
        tokenize=saveable(__call__=tokenized, get_special_tokens_dict=special_tokens, table=table, **no_weights),
        bert_pack_inputs=saveable(__call__=packed, **no_weights),
        **no_weights,
    )
    return preprocessor, tf.function(serve, autograph=False).get_concrete_function(sentences)
