"""What can be known of a run before it begins: its input, its model, and what the table has already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from pipeline.config import EmbedConfig, EncoderConfig, KeptField, PreprocessConfig, VectorConfig
from pipeline.embedding_spec import EmbeddingSpec, make_embedding_spec
from pipeline.engines.presets import find_device
from pipeline.errors import ConfigError, InputError, RunError, TableError
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.distributed import DistributedReuse
from pipeline.reuse.index import build_index
from pipeline.reuse.journal import journal_folder, list_segments
from pipeline.reuse.local import LocalReuse
from pipeline.sinks.writing import RowFormat
from pipeline.sources.planning import InputPlan, plan_dead_letters, plan_input
from pipeline.sources.sampling import infer_kept_fields, sample_input
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import Manifest
from pipeline.tables.store import ReusePlan, Store, open_store

# What defines a table: its vectors, and the form that its rows and dead letters are stored in.
MODEL_PATHS = ("encoder", "preprocessor")
DEFINING = (
    *(field.name for kind in (PreprocessConfig, EncoderConfig, VectorConfig) for field in fields(kind)),
    *("pair_field", "keep_fields", "output_format", "compression", "keep_text", "dead_letter_text"),
)
_LOGGER = logging.getLogger(__name__)


class ResolvedRun(NamedTuple):
    """A configuration with everything that can be known without touching the output."""

    config: EmbedConfig
    store: Store
    found: InputPlan
    n_documents: int  # of the input, about
    kept: tuple[KeptField, ...]
    plan: EmbeddingSpec


def resolve(config: EmbedConfig) -> ResolvedRun:
    """Checks everything that can be known without touching the output.

    Raises:
      EmbeamError: if the run could not succeed.
    """
    if not config.write.output:
        raise ConfigError("--output is missing; name the folder of the table: --output=table")
    if config.write.output_format == "parquet" and config.write.compression == "gzip":
        raise ConfigError("--compression=gzip: Parquet files are compressed inside; leave it out")
    store = open_store(config.write.output, config.write.work_dir)
    if config.reindex.retry_dead_letters:
        return resolve_retry(config, store)
    if not (config.read.input or config.read.query):
        raise ConfigError("--input is missing; name the files to embed: --input='corpus/*.txt'")
    found = plan_input(config.read)
    if not found.files:
        raise InputError(f"--input={' '.join(config.read.input)} matches only empty files; give files with text")
    for path in found.empty_files:
        _LOGGER.warning("%s is empty and holds no documents", path)
    sample = sample_input(found, config.read)
    kept = tuple(infer_kept_fields(sample.rows, config.read))
    plan = make_embedding_spec(config, find_device(config.workers))
    return ResolvedRun(config, store, found, sample.n_documents, kept, plan)


def resolve_retry(config: EmbedConfig, store: Store) -> ResolvedRun:
    """As `resolve`, for a run whose input is the live table's dead letters, and which leaves the table what it is.

    Raises:
      EmbeamError: if there are none that hold their texts, or a setting is not as the table's.
    """
    live = store.read_live().manifest
    if live is None:
        raise TableError(f"--retry_dead_letters: {store.shown} is no table yet; run without the flag first")
    if not live.dead_letters:
        raise RunError(f"--retry_dead_letters: {store.shown} has no dead letters; nothing is left to do")
    if live.settings["dead_letter_text"] != "full":
        raise ConfigError(
            f"--retry_dead_letters: the dead letters of {store.shown} hold no texts, as it was made with "
            f"--dead_letter_text={live.settings['dead_letter_text']}; run on the whole --input instead"
        )
    config = take_settings(config, live, store.shown)
    files = [(store.locate_dead_letters(live, file.name), file.n_bytes) for file in live.dead_letter_files]
    read = replace(config.read, input=(), id_field="", max_document_bytes=1 << 40)  # they have been read once
    write = replace(config.write, max_dead_fraction=1.0)
    found = plan_dead_letters(files, read)
    plan = make_embedding_spec(config, find_device(config.workers))
    n_documents = sum(live.dead_letters.values())
    return ResolvedRun(replace(config, read=read, write=write), store, found, n_documents, live.layout.kept, plan)


def take_settings(config: EmbedConfig, live: Manifest, shown: str) -> EmbedConfig:
    """A configuration with the settings that define the live table, whose rows and new rows have to fit together.

    A setting that has its default value may not have been given, and is the table's. An encoder or a preprocessor may
    have moved since: where one is named, `check_model` compares what is there with the table's.

    Raises:
      ConfigError: if a setting was given that is not as the table's.
    """
    given, default, own = config.flat(), EmbedConfig().flat(), {}
    for name in DEFINING:
        value, stored = given[name], live.settings.get(name, default[name])
        stored = tuple(stored) if isinstance(stored, list) else stored
        is_given = value not in (default[name], "auto")
        if is_given and name not in MODEL_PATHS and value != stored:
            value, stored = (",".join(one) if isinstance(one, tuple) else one for one in (value, stored))
            raise ConfigError(
                f"--retry_dead_letters: --{name}={value} contradicts {shown}, which was made with --{name}={stored}; "
                "leave it out, or leave --retry_dead_letters out to run on the whole --input"
            )
        own[name] = value if is_given and name in MODEL_PATHS else stored
    return EmbedConfig.from_flat(given | own)


def check_model(live: Manifest | None, plan: EmbeddingSpec, config: EmbedConfig) -> None:
    """Says what differs between the live table and the wanted one, if that means to embed everything again.

    Raises:
      TableError: if that is not wanted.
      ConfigError: if rows should be kept that cannot be made again.
    """
    if live is None or live.fingerprint == plan.fingerprint:
        return
    changes = "; ".join(describe_changes(live.identity, plan.identity))
    if config.reindex.on_model_change == "stop":
        raise TableError(
            f"{config.write.output} was made otherwise ({changes}) and --on_model_change=stop; leave that out to embed "
            "everything again, or give another --output"
        )
    if config.reindex.keeps_deleted:
        flag = "--deletes=keep" if config.reindex.deletes == "keep" else "--retry_dead_letters"
        raise ConfigError(
            f"{flag}: {config.write.output} was made otherwise ({changes}), and its rows cannot be kept beside new "
            "ones; give another --output, or leave the flag out to embed the whole input again"
        )
    _LOGGER.warning("%s was made otherwise (%s): everything is embedded again", config.write.output, changes)


def describe_changes(old: dict[str, Any], new: dict[str, Any], name: str = "") -> Iterator[str]:
    """What differs between two identities, such as `preprocessing.max_tokens 128 -> 256`."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from describe_changes(before, after, f"{name}{key}.")
        elif before != after:
            shown = (str(value) if len(str(value)) <= 40 else f"{str(value)[:12]}..." for value in (before, after))
            yield f"{name}{key} {' -> '.join(shown)}"


def prepare_local_reuse(
    store: Store, live: Manifest | None, spec: EmbeddingSpec, form: RowFormat, scratch: str, config: EmbedConfig
) -> ReusePlan:
    """Indexes what may be reused, for the local engine: the live table and the journal of earlier attempts."""
    folder = os.path.join(scratch, "known")
    os.makedirs(folder)
    policy = choose_policy(store, live, spec, form, config)
    lost = store.find_damaged(live, config.reindex.verify_live) if live else set()
    indexes = store.read_indexes(live, folder, lost) if live else ()
    build_index(folder, indexes, list_segments(store.work, spec.fingerprint), policy.same_fingerprint)
    reuse = LocalReuse(folder, spec.split.prefix, policy, form.layout.keep_text)
    if live is None:
        return ReusePlan(reuse)
    return ReusePlan(reuse, store.reader(live, folder), store.live_files(live))


def prepare_distributed_reuse(
    store: FolderStore,
    live: Manifest | None,
    spec: EmbeddingSpec,
    form: RowFormat,
    folder: str,
    inputs: Sequence[str],
    config: EmbedConfig,
) -> ReusePlan:
    """Lists what may be reused, for distributed engines."""
    lost = store.find_damaged(live, config.reindex.verify_live) if live else set()
    reader = store.reader(live, "") if live else None
    reuse = DistributedReuse(
        files=tuple(store.list_live_files(live, lost)) if live else (),
        journal=journal_folder(store.work, spec.fingerprint),
        reader=reader,
        policy=choose_policy(store, live, spec, form, config),
        form=form,
        folder=folder,
        shard_bytes=config.write.shard_bytes,
        inputs=tuple(inputs),
        prefix=spec.split.prefix,
    )
    return ReusePlan(reuse, reader)


def choose_policy(
    store: Store, live: Manifest | None, spec: EmbeddingSpec, form: RowFormat, config: EmbedConfig
) -> ReusePolicy:
    """What a run may reuse of a table."""
    same_fingerprint = live is not None and live.fingerprint == spec.fingerprint
    return ReusePolicy(same_fingerprint, live is not None and store.can_copy(live, form), config.reindex.keeps_deleted)
