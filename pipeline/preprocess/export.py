"""Writes a BERT preprocessor as a SavedModel with the interface of TF Hub's `bert_en_uncased_preprocess`.

One letter glossary: B texts, L tokens. The loaded object offers

    preprocessor(strings)                                   [B] string -> dict of three [B, 128] int32
    preprocessor.tokenize(strings)                          [B] string -> ragged [B, (words), (pieces)] int32
    preprocessor.bert_pack_inputs([a] or [a, b], length)    ragged int32 -> dict of three [B, length] int32
    preprocessor.tokenize.get_special_tokens_dict()         names -> scalars

Loading it needs `import tensorflow_text` first, as for the module on TF Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.encoders.saving import SPECIAL_TOKENS, check_vocabulary, new_folder, saveable, vocabulary_file

if TYPE_CHECKING:
    import tensorflow as tf

DEFAULT_LENGTH = 128  # tokens


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
