"""Every setting of a run: one frozen dataclass per stage, checked when it is built.

A field is the single place of a setting: its name is the command-line flag, the key in a configuration file and the
keyword in Python; its metadata holds the help text and the choices.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional

from pipeline.errors import ConfigError
from pipeline.read_config import ReadConfig
from pipeline.settings import CheckedConfig, convert_setting, setting

MIB = 1 << 20
ACCELERATORS = ("nvidia-l4", "nvidia-tesla-t4", "nvidia-tesla-a100", "nvidia-a100-80gb", "nvidia-h100-80gb")
POOLINGS = ("mean", "max", "cls")


@dataclass(frozen=True)
class VectorChoice:
    """Which tensor of the encoder becomes the vector: `output`, `output:pooling` or `output/layer:pooling`."""

    output: str
    layer: Optional[int] = None
    pooling: str = ""

    @property
    def is_pooled_output(self) -> bool:
        return self.output in ("pooled_output", "default")

    @classmethod
    def parse(cls, text: str) -> VectorChoice:
        head, _, pooling = text.partition(":")
        output, slash, layer = head.partition("/")
        try:
            number = int(layer) if slash else None
        except ValueError:
            raise ConfigError(
                f"--vector={text}: {layer!r} is not a layer number; write encoder_outputs/-1:mean"
            ) from None
        if pooling and pooling not in POOLINGS + ("tokens",):
            raise ConfigError(
                f"--vector={text}: {pooling!r} is not a pooling; use one of {', '.join(POOLINGS)}, tokens"
            )
        if output in ("sequence_output", "encoder_outputs") and not pooling:
            raise ConfigError(f"--vector={text} is a matrix per text; say how to pool it, as in --vector={text}:mean")
        if output == "encoder_outputs" and number is None:
            raise ConfigError(f"--vector={text} names no layer; write encoder_outputs/-1:{pooling} for the last one")
        if output == "pooled_output" and pooling:
            raise ConfigError(f"--vector={text}: pooled_output is one vector already; drop ':{pooling}'")
        return cls(output, number, pooling)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"/{self.layer}"
        return f"{self.output}{layer}" + (f":{self.pooling}" if self.pooling else "")


@dataclass(frozen=True)
class PreprocessConfig(CheckedConfig):
    """Preprocessing"""

    preprocessor: str = setting(
        "folder or handle of the preprocessor SavedModel; default: the encoder's own vocabulary", "", metavar="PATH"
    )
    max_tokens: int = setting(
        "maximum number of tokens per input, including [CLS] and [SEP]; 0 means the encoder's maximum", 0
    )
    on_long: str = setting(
        "what to do with texts that are longer than --max_tokens",
        "truncate",
        ("truncate", "chunk", "average", "reject"),
    )
    chunk_overlap: int = setting("tokens that neighbouring chunks share, at most: no word is cut for them", 0)
    chunk_by: str = setting(
        "where chunks end: tokens: at the last word that fits; sentence: at a sentence's end in the second half",
        "tokens",
        ("tokens", "sentence"),
    )
    text_prefix: str = setting("prefix of every text and of every chunk, such as 'query: '", "", metavar="TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens and self.max_tokens < 3:
            raise ConfigError(f"--max_tokens={self.max_tokens} leaves no room between [CLS] and [SEP]; use 3 or more")
        if self.chunk_overlap < 0:
            raise ConfigError(f"--chunk_overlap={self.chunk_overlap} is negative; use 0 or more")
        if self.chunk_overlap and not self.cuts_windows:
            raise ConfigError(
                f"--chunk_overlap={self.chunk_overlap} needs chunks; add --on_long=chunk or --on_long=average"
            )
        if self.chunk_by != "tokens" and not self.cuts_windows:
            raise ConfigError(f"--chunk_by={self.chunk_by} needs chunks; add --on_long=chunk or --on_long=average")

    @property
    def cuts_windows(self) -> bool:
        """Whether a long text becomes several inputs of the encoder."""
        return self.on_long in ("chunk", "average")


@dataclass(frozen=True)
class BatchConfig(CheckedConfig):
    """Batching"""

    batch_tokens: int = setting(
        "budget of one batch: rows x padded length, in tokens (bytes for text encoders); 0 fits it to the device", 0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens < 0:
            raise ConfigError(f"--batch_tokens={self.batch_tokens} is negative; leave it out to fit it to the device")


@dataclass(frozen=True)
class EncoderConfig(CheckedConfig):
    """Encoder"""

    encoder: str = setting(
        "folder, gs:// or s3:// path or hub handle; default: the built-in encoder", "", metavar="PATH"
    )
    vector: str = setting(
        "output to store: pooled_output, or sequence_output or encoder_outputs/N with :mean, :max, :cls or :tokens",
        "pooled_output",
        metavar="OUTPUT",
    )
    encoder_graph: str = setting(
        "fast: our own graph of the encoder, checked against the published one; auto: fast if the check succeeds",
        "auto",
        ("auto", "fast", "published"),
    )
    precision: str = setting(
        "precision of the fast graph's matrix products; auto: 16 bits if the processor or GPU supports them natively",
        "float32",
        ("float32", "bfloat16", "float16", "auto"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        VectorChoice.parse(self.vector)
        if self.encoder_graph == "published" and self.precision in ("bfloat16", "float16"):
            raise ConfigError(f"--precision={self.precision} needs the fast graph; leave out --encoder_graph=published")


@dataclass(frozen=True)
class VectorConfig(CheckedConfig):
    """Vectors"""

    normalize: bool = setting("scale every vector to length 1", False)
    dimensions: int = setting("keep only the first N dimensions; 0 keeps all", 0)
    dtype: str = setting("number type of the stored vectors", "float32", ("float32", "float16", "int8", "binary"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimensions < 0:
            raise ConfigError(f"--dimensions={self.dimensions} is negative; leave it out to keep all")


@dataclass(frozen=True)
class WriteConfig(CheckedConfig):
    """Output"""

    output: str = setting("folder of the table, duckdb://FILE/TABLE or bq://PROJECT.DATASET.TABLE", "", metavar="DIR")
    work_dir: str = setting("gs:// folder for the lock, journal and dead letters of a bq:// table", "", metavar="DIR")
    output_format: str = setting("format of the table's files", "tfrecord", ("tfrecord", "parquet"))
    compression: str = setting("compression of the table's files", "none", ("none", "gzip"))
    shard_bytes: int = setting("size at which a new file is started", 256 * MIB)
    keep_text: bool = setting("store the text of each row beside its vector", False)
    keep_source: bool = setting("store the path of each document's file beside its vector", False)
    keep_unknown: bool = setting("store how many tokens of each row are [UNK], in the column n_unknown", False)
    dead_letter_text: str = setting("what dead letters contain of the text", "full", ("full", "hash", "none"))
    max_dead_fraction: float = setting("stop when more than this share of the documents cannot be embedded", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("shard_bytes")
        if not 0 <= self.max_dead_fraction <= 1:
            raise ConfigError(f"--max_dead_fraction={self.max_dead_fraction} is not a share; use a number from 0 to 1")


@dataclass(frozen=True)
class ReindexConfig(CheckedConfig):
    """Reindexing"""

    deletes: str = setting(
        "what to do with rows of documents that are gone from the input: apply drops them", "apply", ("apply", "keep")
    )
    max_delete_fraction: float = setting("stop when more than this share of the table's documents is gone", 0.2)
    on_model_change: str = setting(
        "what to do if the table was made with another encoder or vector settings: embed everything again, or stop",
        "embed",
        ("embed", "stop"),
    )
    verify_live: bool = setting(
        "compare the live table's files with their checksums first; damaged ones are made again", False
    )
    retry_dead_letters: bool = setting("try the table's dead letters again, instead of reading --input", False)
    create_vector_index: bool = setting("create a nearest-neighbour index for a table in a database", False)
    validate: str = setting("check a snapshot before it is published; off publishes it unchecked", "on", ("on", "off"))
    keep_snapshots: int = setting("number of snapshots to keep, including the live one", 2)
    grace_seconds: int = setting("how long a snapshot that is no longer live is kept for its readers", 3600)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("keep_snapshots")
        if not 0 <= self.max_delete_fraction <= 1:
            raise ConfigError(
                f"--max_delete_fraction={self.max_delete_fraction} is not a share; use a number from 0 to 1"
            )
        if self.grace_seconds < 0:
            raise ConfigError(f"--grace_seconds={self.grace_seconds} is negative; use 0 or more")

    @property
    def keeps_deleted(self) -> bool:
        """Whether rows of documents that the run does not see are kept: on request, or when it retries dead letters."""
        return self.deletes == "keep" or self.retry_dead_letters


@dataclass(frozen=True)
class WorkerConfig(CheckedConfig):
    """Workers of a distributed engine"""

    accelerator: str = setting(
        f"GPU of the workers that encode: {', '.join(ACCELERATORS)}; without one they encode on CPUs",
        "",
        metavar="NAME",
    )
    encoder_threads: int = setting("batches that one GPU processes at a time; 0 fits it to the GPU", 0)
    encoder_processes: int = setting("processes that share one GPU, each with its own model and share of the memory", 1)
    encoder_machine: str = setting(
        "machine type of the workers with a GPU; default: the smallest type with that GPU", "", metavar="TYPE"
    )
    encoder_memory: str = setting("memory of a worker that encodes, such as 32GB", "", metavar="SIZE")
    provisioning: str = setting(
        "how Dataflow gets workers with a GPU: flex-start waits until one is free, spot workers may be preempted",
        "standard",
        ("standard", "spot", "flex-start"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("encoder_processes")
        if self.accelerator and self.accelerator not in ACCELERATORS:
            raise ConfigError(f"--accelerator={self.accelerator} is not one of {', '.join(ACCELERATORS)}")
        if self.encoder_threads < 0:
            raise ConfigError(
                f"--encoder_threads={self.encoder_threads} is negative; leave it out to fit it to the GPU"
            )
        if self.encoder_processes > 1 and not self.accelerator:
            raise ConfigError(
                f"--encoder_processes={self.encoder_processes} is for processes that share a GPU; name it with "
                "--accelerator"
            )
        if self.provisioning != "standard" and not self.accelerator:
            raise ConfigError(f"--provisioning={self.provisioning} is for GPUs; name one with --accelerator")
        if self.encoder_memory and not re.fullmatch(r"\d+(MB|GB|MiB|GiB)", self.encoder_memory):
            raise ConfigError(f"--encoder_memory={self.encoder_memory} is not a size; write it as 32GB")


@dataclass(frozen=True)
class EmbedConfig:
    """All settings of a run. `EmbedDocuments` uses the four parts in the middle, and `write.keep_*`."""

    read: ReadConfig = ReadConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    batching: BatchConfig = BatchConfig()
    encoder: EncoderConfig = EncoderConfig()
    vectors: VectorConfig = VectorConfig()
    write: WriteConfig = WriteConfig()
    reindex: ReindexConfig = ReindexConfig()
    workers: WorkerConfig = WorkerConfig()

    def __post_init__(self) -> None:
        choice = VectorChoice.parse(self.encoder.vector)
        if self.preprocess.on_long == "average" and choice.pooling == "tokens":
            raise ConfigError("--on_long=average cannot average token matrices; use --on_long=chunk with :tokens")
        if self.write.keep_source and any(field.name == "source" for field in self.read.kept_fields()):
            raise ConfigError("--keep_fields=source would collide with the column of --keep_source; leave one out")
        if self.read.pair_field and self.preprocess.cuts_windows:
            raise ConfigError(
                f"--on_long={self.preprocess.on_long} cannot split pairs; use --on_long=truncate or --on_long=reject"
            )

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> EmbedConfig:
        """Builds the configuration from one flat mapping of setting names to values.

        Args:
          values: setting name to value; strings are converted to the setting's type, lists are joined to tuples.

        Raises:
          ConfigError: if a name is unknown or a value does not fit.
        """
        remaining, known = dict(values), [f.name for kind in STAGE_CONFIGS for f in fields(kind)]
        parts = {}
        for part, kind in zip(fields(cls), STAGE_CONFIGS, strict=True):
            own = {f.name: convert_setting(f, remaining.pop(f.name)) for f in fields(kind) if f.name in remaining}
            parts[part.name] = kind(**own)
        if remaining:
            name = sorted(remaining)[0]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "embeam embed --help lists them all"
            raise ConfigError(f"unknown setting {name!r}; {hint}")
        return cls(**parts)

    def flat(self) -> dict[str, Any]:
        """The inverse of `from_flat`."""
        parts = [dataclasses.asdict(getattr(self, part.name)) for part in fields(self)]
        return {name: value for part in parts for name, value in part.items()}


STAGE_CONFIGS: tuple[type, ...] = (
    ReadConfig,
    PreprocessConfig,
    BatchConfig,
    EncoderConfig,
    VectorConfig,
    WriteConfig,
    ReindexConfig,
    WorkerConfig,
)
