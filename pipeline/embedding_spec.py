"""Resolves a configuration to an embedding spec: encoder, tokeniser, batch shapes and fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import EmbedConfig, PreprocessConfig
from pipeline.encoders.cache import hash_file
from pipeline.encoders.load import measure_dimension
from pipeline.encoders.runtime import Device, load_tensorflow, this_device
from pipeline.encoders.saved_model import TOKEN_INPUTS, SavedModelSpec, describe_saved_model, resolve_handle
from pipeline.encoders.spec import EncoderSpec, describe_encoder
from pipeline.errors import ConfigError, EncoderError
from pipeline.preprocess.batching import COMPILED_STEPS, LENGTH_STEPS, Buckets, bucket_lengths
from pipeline.preprocess.chunking import PreprocessorRule, SplitRule, TextRule, WordpieceRule
from pipeline.preprocess.pieces import is_separable
from pipeline.preprocess.sentences import SENTENCE_RULE
from pipeline.preprocess.windows import WINDOW_RULE
from pipeline.preprocess.wordpiece import Vocabulary, agrees_with_preprocessor, find_vocabulary, load_tokenizer
from pipeline.read_config import KeptField
from pipeline.sinks.layout import TableLayout
from pipeline.vectors.finishing import VectorRule

GPU_BATCH_TOKENS, TEXT_BATCH_BYTES = 16384, 16384
CPU_BATCH_NUMBERS, CPU_BATCH_TOKENS = 6 << 20, 2048  # of a feed-forward's output; where its width is unknown
FIXED_PREPROCESSOR_LENGTH = 128  # of a preprocessor that packs to one fixed length which it does not specify


@dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that workers need to turn documents into rows; small and picklable.

    Attributes:
      encoder: what is loaded.
      split: how documents become chunks.
      buckets: the batch shapes.
      vectors: how encoded chunks become rows.
      dimension: D of the stored vectors.
      identity: all that changes a vector, as JSON values.
    """

    encoder: EncoderSpec
    split: SplitRule
    buckets: Buckets
    vectors: VectorRule
    dimension: int
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The sha256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def layout(self, kept: tuple[KeptField, ...] = (), sourced: bool = False) -> TableLayout:
        rule = self.vectors
        flags = (rule.tokens, rule.counts_tokens, rule.keep_text, rule.chunked)
        own = {"has_offsets": rule.chunked, "keep_unknown": rule.keep_unknown and rule.counts_tokens}
        return TableLayout(rule.vectors.dtype, self.dimension, *flags, sourced=sourced, kept=kept, **own)


def make_embedding_spec(config: EmbedConfig, device: Device | None = None) -> EmbeddingSpec:
    """Resolves a configuration.

    Args:
      config: all settings.
      device: what the encoder will run on; by default this machine's.

    Raises:
      ConfigError: if settings do not fit the encoder or each other.
      EncoderError: if the encoder or the preprocessor is not usable as such.
    """
    load_tensorflow()  # first, because it silences TensorFlow's messages
    device = device or this_device()
    encoder, model = describe_encoder(config.encoder, device)
    if encoder.takes == "texts" and config.read.pair_field:
        raise ConfigError(f"--pair_field={config.read.pair_field}: this encoder takes one string; join the fields")
    split, preprocessing = choose_split_rule(config.preprocess, encoder, model, config.read.pair_field)
    if encoder.takes == "texts":
        lengths = tuple(1 << power for power in range(4, 32))
    else:
        assert not isinstance(split, TextRule)
        lengths = tuple(bucket_lengths(split.max_tokens, COMPILED_STEPS if device.is_gpu else LENGTH_STEPS))
    native = encoder.dimension or measure_dimension(encoder)
    encoder = replace(encoder, dimension=native)
    if config.vectors.dimensions > native:
        raise ConfigError(f"--dimensions={config.vectors.dimensions} exceeds the encoder's {native}; lower it")
    dimension = config.vectors.dimensions or native
    identity = {
        "encoder": dict(encoder.identity),
        "vector": str(encoder.choice),
        "preprocessing": preprocessing,
        "graph": encoder.graph,
        "precision": encoder.precision,
        "normalize": config.vectors.normalize,
        "dimensions": dimension,
        "dtype": config.vectors.dtype,
    }
    rule = VectorRule(
        vectors=config.vectors,
        average=config.preprocess.on_long == "average",
        chunked=config.preprocess.on_long == "chunk",
        tokens=encoder.choice.pooling == "tokens",
        counts_tokens=encoder.takes == "tokens",
        keep_text=config.write.keep_text,
        keep_unknown=config.write.keep_unknown,
    )
    buckets = Buckets(lengths, config.batching.batch_tokens or choose_batch_tokens(encoder, device))
    return EmbeddingSpec(encoder, split, buckets, rule, dimension, identity)


def choose_batch_tokens(encoder: EncoderSpec, device: Device) -> int:
    """The budget of a batch: large enough to keep the device busy, small enough for its caches.

    On CPUs a feed-forward's output should fit into the last cache; GPUs need thousands of tokens at once.
    """
    if encoder.takes == "texts":
        return TEXT_BATCH_BYTES
    if device.is_gpu:
        return device.batch_tokens or GPU_BATCH_TOKENS
    if encoder.architecture is None:
        return CPU_BATCH_TOKENS
    return min(2 * CPU_BATCH_TOKENS, max(CPU_BATCH_TOKENS // 4, CPU_BATCH_NUMBERS // encoder.architecture.feedforward))


def choose_split_rule(
    config: PreprocessConfig, encoder: EncoderSpec, model: SavedModelSpec, pair_field: str = ""
) -> tuple[SplitRule, dict[str, Any]]:
    """Chooses how documents are tokenised and cut; also returns the part of the identity that this determines.

    Raises:
      ConfigError: if the settings do not fit the encoder.
      EncoderError: if the preprocessor is not a preprocessor.
    """
    if encoder.takes == "texts":
        for flag, value in (("preprocessor", config.preprocessor), ("max_tokens", config.max_tokens or "")):
            if value:
                raise ConfigError(
                    f"--{flag}={value}: this encoder takes strings and tokenises them itself; leave it out"
                )
        if config.on_long != "truncate":
            raise ConfigError(f"--on_long={config.on_long}: this encoder tokenises itself; leave it out")
        return TextRule(config.text_prefix), {"kind": "none", "prefix": config.text_prefix}
    max_tokens = config.max_tokens or encoder.positions
    if max_tokens > encoder.positions:
        raise ConfigError(
            f"--max_tokens={max_tokens} exceeds the encoder's {encoder.positions} positions; "
            "lower it; --on_long=chunk keeps all of a long text"
        )
    cutting = {"max_tokens": max_tokens, "on_long": config.on_long, "prefix": config.text_prefix}
    if config.preprocessor:
        model = describe_saved_model(resolve_handle(config.preprocessor), config.preprocessor)
        if not set(TOKEN_INPUTS) <= set(model.outputs):
            raise EncoderError(
                f"--preprocessor={config.preprocessor} gives {', '.join(sorted(model.outputs))}, not the encoder's "
                "three inputs; is it an encoder?"
            )
    vocabulary = find_vocabulary(model)
    if config.preprocessor and (vocabulary is None or not agrees_with_preprocessor(vocabulary, model.folder)):
        return _use_preprocessor_as_is(config, model, max_tokens, cutting, pair_field)
    if vocabulary is None:
        raise ConfigError(f"--encoder={encoder.handle} has no vocabulary; name its preprocessor with --preprocessor")
    if encoder.vocabulary_size and len(vocabulary.pieces) > encoder.vocabulary_size:
        raise ConfigError(
            f"--preprocessor={config.preprocessor} has {len(vocabulary.pieces):,} pieces and the encoder "
            f"{encoder.vocabulary_size:,}; they do not belong together"
        )
    if config.cuts_windows:
        check_windows(config, vocabulary, max_tokens)
        cutting |= {"windows": WINDOW_RULE, "chunk_by": config.chunk_by}
        if config.chunk_by == "sentence":
            cutting["sentences"] = SENTENCE_RULE
    pieces = hashlib.sha256("\n".join(vocabulary.pieces).encode("utf-8", "surrogateescape")).hexdigest()
    identity = {
        "kind": "wordpiece",
        "vocabulary": pieces,
        "lower_case": vocabulary.lower_case,
        "overlap": config.chunk_overlap,
        **cutting,
    }
    by_sentence = config.chunk_by == "sentence"
    rule = WordpieceRule(vocabulary, max_tokens, config.on_long, config.chunk_overlap, config.text_prefix, by_sentence)
    return rule, identity


def check_windows(config: PreprocessConfig, vocabulary: Vocabulary, max_tokens: int) -> None:
    """Raises ConfigError if the prefix or the overlap leaves no room in a window, or the prefix is not separate."""
    prefix, n_prefix = config.text_prefix, 0
    if prefix:
        if not is_separable(prefix):
            raise ConfigError(
                f"--text_prefix={prefix!r} runs into the first word of each chunk; end it with a space, as in "
                f"{prefix + ' '!r}"
            )
        n_prefix = len(load_tokenizer(vocabulary).tokenize([prefix])[0])
    room = max_tokens - 2 - n_prefix
    if room < 1:
        raise ConfigError(
            f"--text_prefix={prefix!r} has {n_prefix} tokens and leaves no room for text in {max_tokens}; shorten it, "
            "or raise --max_tokens"
        )
    if config.chunk_overlap >= room:
        beside = f" beside the prefix's {n_prefix}" if n_prefix else ""
        raise ConfigError(
            f"--chunk_overlap={config.chunk_overlap} leaves nothing new in {max_tokens} tokens{beside}; lower it"
        )


def _use_preprocessor_as_is(
    config: PreprocessConfig, model: SavedModelSpec, max_tokens: int, cutting: dict[str, Any], pair_field: str
) -> tuple[SplitRule, dict[str, Any]]:
    shown = f"--preprocessor={config.preprocessor} is of an unknown kind and called as it is"
    if config.on_long != "truncate":
        raise ConfigError(f"{shown}: it cuts long texts itself; leave out --on_long={config.on_long}")
    if not {"tokenize", "bert_pack_inputs"} <= model.methods:
        if pair_field:
            raise ConfigError(f"{shown}: it cannot pack two segments; leave out --pair_field={pair_field}")
        length = model.outputs["input_word_ids"][-1] or FIXED_PREPROCESSOR_LENGTH
        if config.max_tokens not in (0, length):
            raise ConfigError(f"{shown}: it packs to {length} tokens; leave out --max_tokens")
        if length > max_tokens:
            raise ConfigError(f"{shown}: it packs to {length} tokens, and the encoder takes {max_tokens}; use another")
        max_tokens = length
    weights = sorted(str(path) for path in Path(model.folder, "variables").glob("*"))
    hashes = [hash_file(path) for path in (f"{model.folder}/saved_model.pb", *weights)]
    hashes += [hash_file(f"{model.folder}/{name}") for name in model.assets]
    rule = PreprocessorRule(model.folder, max_tokens, config.text_prefix, config.preprocessor)
    return rule, {"kind": "as is", "files": hashes, **cutting}
