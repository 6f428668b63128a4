"""Resolves a run before it begins: its input, its model, and the state of its table."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from pipeline.config import EmbedConfig, EncoderConfig, PreprocessConfig, VectorConfig
from pipeline.embedding_spec import EmbeddingSpec, make_embedding_spec
from pipeline.engines.presets import find_device
from pipeline.errors import ConfigError, EmbeamError, InputError, RunError, TableError, as_line
from pipeline.read_config import KeptField
from pipeline.records import Document, SkippedFile
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.index import VectorIndex, build_index
from pipeline.reuse.journal import journal_folder, list_segments
from pipeline.reuse.live_table import DistributedReuse
from pipeline.reuse.local import LocalReuse
from pipeline.run.command import spell_command
from pipeline.run.estimate import RowSize, live_row_bytes, measure_rows
from pipeline.sinks.writing import RowFormat
from pipeline.sources.planning import InputPlan, choose_id_field, plan_dead_letters, plan_input
from pipeline.sources.read import explain_bad_files
from pipeline.sources.sampling import infer_kept_fields, sample_input
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import GoneFiles, Manifest
from pipeline.tables.publish import check_free_space
from pipeline.tables.store import ReusePlan, Store
from pipeline.tables.stores import open_store

# The settings that define a table: its vectors, and how its rows and dead letters are stored.
MODEL_PATHS = ("encoder", "preprocessor")
DEFINING = (
    *(field.name for kind in (PreprocessConfig, EncoderConfig, VectorConfig) for field in fields(kind)),
    *("pair_field", "keep_fields", "output_format", "compression"),
    *("keep_text", "keep_source", "keep_unknown", "dead_letter_text"),
)
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with everything that can be found out without writing anything.

    Attributes:
      config: what the user asked for.
      store: where the table is kept.
      input: the files and how they are split.
      n_documents: of the input, about.
      kept: the kept fields, all with a type.
      spec: how documents become rows.
      form: how rows are written to files.
      live: the live table's manifest; None before the first run.
      version: of the live state.
      row_size: what the rows of the first documents are like.
    """

    config: EmbedConfig
    store: Store
    input: InputPlan
    n_documents: int
    kept: tuple[KeptField, ...]
    spec: EmbeddingSpec
    form: RowFormat
    live: Manifest | None
    version: str
    row_size: RowSize

    @property
    def rows_stay(self) -> bool:
        """Whether unchanged rows of the live table stay as they are stored."""
        return choose_policy(self.store, self.live, self.spec, self.form, self.config).rows_stay


class ResolvedInput(NamedTuple):
    """What a run reads, and how.

    Attributes:
      config: what the user asked for, changed where the input asks for it.
      plan: the files and how they are split.
      n_documents: of them, about.
      kept: the kept fields, all with a type.
      sample: some of the documents.
    """

    config: EmbedConfig
    plan: InputPlan
    n_documents: int
    kept: tuple[KeptField, ...]
    sample: list[Document]


def resolve(config: EmbedConfig) -> ResolvedRun:
    """Finds out everything that does not need a write; `find_stops` then finds what would stop the run.

    Raises:
      EmbeamError: if the run cannot begin: settings that do not fit, no input, an output that is not a table.
    """
    if not config.write.output:
        raise ConfigError("--output is missing; name the folder of the table: --output=table")
    if config.write.output_format == "parquet" and config.write.compression == "gzip":
        raise ConfigError("--compression=gzip: Parquet files are compressed inside; leave it out")
    store = open_store(config.write.output, config.write.work_dir)
    store.check(config)
    live, version = store.read_live()
    retries = config.reindex.retry_dead_letters
    found = resolve_dead_letters(config, store, live) if retries else resolve_input(config, store.work, live)
    config = found.config
    spec = make_embedding_spec(config, find_device(config.workers))
    form = store.choose_form(config, spec.layout(found.kept, config.write.keep_source))
    row_size = measure_rows(spec, form, found.sample)
    if live and form.layout.keep_unknown and not live.layout.keep_unknown and live.fingerprint == spec.fingerprint:
        _LOGGER.warning(
            "--keep_unknown: n_unknown is null in the rows of %s whose vectors are reused, because it was made without "
            "the flag; another --output has all numbers",
            store.shown,
        )
    return ResolvedRun(config, store, found.plan, found.n_documents, found.kept, spec, form, live, version, row_size)


def resolve_again(resolved: ResolvedRun) -> ResolvedRun:
    """The same run once the table is locked; resolves again if another run has published meanwhile."""
    if resolved.store.read_live().version == resolved.version:
        return resolved
    return resolve(resolved.config)


def resolve_input(config: EmbedConfig, own_table: str, live: Manifest | None) -> ResolvedInput:
    """Looks at the files that `--input` names, and at their first records.

    Args:
      config: of the run.
      own_table: the folder of its table, which is no input.
      live: the table's manifest; None before the first run.

    Raises:
      EmbeamError: if there are none, or they lack what the settings name.
    """
    if not (config.read.input or config.read.query):
        raise ConfigError("--input is missing; name the files to embed: --input='corpus/*.txt'")
    plan = plan_input(config.read, own_table)
    if not plan.files and plan.bad_files:
        raise explain_bad_files(plan.bad_files)
    if not plan.files:
        raise InputError(f"--input={' '.join(config.read.input)} matches only empty files; give files with text")
    for path in plan.empty_files:
        _LOGGER.warning("%s is empty", as_line(path))
    config = replace(config, read=choose_id_field(plan, config.read))
    sample = sample_input(plan, config.read)
    kept = tuple(infer_kept_fields(sample.fields, config.read, live.layout.kept if live else ()))
    return ResolvedInput(config, plan, sample.n_documents, kept, sample.build_documents(config.read, kept))


def resolve_dead_letters(config: EmbedConfig, store: Store, live: Manifest | None) -> ResolvedInput:
    """As `resolve_input`, for a run that reads the live table's dead letters and keeps its rows and settings.

    Raises:
      EmbeamError: if no dead letters hold their texts, or a setting differs from the table's.
    """
    if live is None:
        raise TableError(f"--retry_dead_letters: {store.shown} is not a table yet; run without the flag first")
    if not live.dead_letters:
        raise RunError(f"--retry_dead_letters: {store.shown} has no dead letters; nothing is left to do")
    if live.settings["dead_letter_text"] != "full":
        raise ConfigError(
            f"--retry_dead_letters: the dead letters of {store.shown} contain no texts, because it was made with "
            f"--dead_letter_text={live.settings['dead_letter_text']}; run on the whole --input instead"
        )
    check_too_long(config, live, store.shown)
    config = take_settings(config, live, store.shown)
    files = [(store.locate_dead_letters(live, file.name), file.n_bytes) for file in live.dead_letter_files]
    # They have been read once. A damaged file of them is a damaged table.
    read = replace(config.read, input=(), id_field="", max_document_bytes=1 << 40, on_bad_file="fail")
    config = replace(config, read=read, write=replace(config.write, max_dead_fraction=1.0))
    plan = plan_dead_letters(files, read, live.bad_files)
    return ResolvedInput(config, plan, sum(live.dead_letters.values()), live.layout.kept, [])


def check_too_long(config: EmbedConfig, live: Manifest, shown: str) -> None:
    """Says how texts that were rejected as too long are embedded: they fail again with the settings of the table.

    Raises:
      ConfigError: if there are no other dead letters, and the configuration does not ask to reject them again.
    """
    n = live.dead_letters.get("too_long", 0)
    if not n or config.preprocess.on_long == "reject":
        return
    whole = spell_command(live.settings, {"output": shown, "on_long": "truncate"})
    message = (
        f"--retry_dead_letters: {n:,} texts have more tokens than --max_tokens and fail again, because {shown} was "
        f"made with --on_long=reject; to cut them, make all rows of the table again: {whole}"
    )
    if n == sum(live.dead_letters.values()):
        raise ConfigError(message)
    _LOGGER.warning(message)


def take_settings(config: EmbedConfig, live: Manifest, shown: str) -> EmbedConfig:
    """A configuration with the settings that define the live table, so that its rows and the new rows fit together.

    A setting with its default value counts as not given; the table's value is used. An encoder or a preprocessor may
    have moved: if one is given, `check_model` compares it with the table's.

    Raises:
      ConfigError: if a given setting differs from the table's.
    """
    given, default, own = config.flat(), EmbedConfig().flat(), {}
    for name in DEFINING:
        value, stored = given[name], live.settings.get(name, default[name])
        stored = tuple(stored) if isinstance(stored, list) else stored
        is_given = value not in (default[name], "auto")
        if is_given and name not in MODEL_PATHS and value != stored:
            whole = spell_command(live.settings, {"output": shown, name: value})
            value, stored = (",".join(one) if isinstance(one, tuple) else one for one in (value, stored))
            raise ConfigError(
                f"--retry_dead_letters: --{name}={value} contradicts {shown}, which was made with --{name}={stored}; "
                f"leave it out, or make all rows of the table again: {whole}"
            )
        own[name] = value if is_given and name in MODEL_PATHS else stored
    return EmbedConfig.from_flat(given | own)


class NewRows(NamedTuple):
    """How many rows a run writes, and how many bytes one takes."""

    n_rows: int
    row_bytes: float


def estimate_new_rows(resolved: ResolvedRun) -> NewRows:
    """Estimates how many rows a run writes at least, before its input is read.

    Unchanged rows need no space, as their files are linked. How many there are is not known yet: at most all.
    """
    n_rows = round(resolved.n_documents * resolved.row_size.rows_per_document)
    keeps_rows = resolved.rows_stay and not resolved.config.reindex.retry_dead_letters
    if resolved.live and keeps_rows:
        n_rows = max(0, n_rows - resolved.live.rows)
    return NewRows(n_rows, live_row_bytes(resolved.live, resolved.form) or resolved.row_size.row_bytes)


def find_stops(resolved: ResolvedRun, new_rows: NewRows) -> Iterator[EmbeamError]:
    """Finds the errors that stop a run before it reads its input: a run raises the first, a dry run prints all.

    Args:
      resolved: the run.
      new_rows: what it writes.
    """
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_bad_files(resolved.input.bad_files, resolved.config),
        lambda: check_limit(resolved.live, resolved.config),
        lambda: check_model(resolved.live, resolved.spec, resolved.config),
        lambda: resolved.store.check_columns(resolved.live, resolved.form.layout),
        lambda: check_free_space(resolved.store.work, new_rows.n_rows, round(new_rows.row_bytes)),
    )
    return collect_errors(checks)


def collect_errors(checks: Iterable[Callable[[], None]]) -> Iterator[EmbeamError]:
    """Yields the errors that some checks raise."""
    for check in checks:
        try:
            check()
        except EmbeamError as error:
            yield error


def check_bad_files(bad_files: Sequence[SkippedFile], config: EmbedConfig) -> None:
    """Raises InputError if there are files that cannot be read, and the run does not skip them."""
    if bad_files and config.read.on_bad_file == "fail" and not config.reindex.retry_dead_letters:
        raise explain_bad_files(bad_files)


def check_limit(live: Manifest | None, config: EmbedConfig) -> None:
    """Raises ConfigError if a trial run would replace a table."""
    if config.read.limit and live:
        raise ConfigError(
            f"--limit={config.read.limit} is for trials and --output={config.write.output} already holds a table; "
            "give another folder"
        )


def check_model(live: Manifest | None, spec: EmbeddingSpec, config: EmbedConfig) -> None:
    """Checks that the run may embed everything again, if the live table's vectors were made with other settings.

    Raises:
      TableError: if --on_model_change=stop forbids it.
      ConfigError: if a flag asks to keep rows that cannot be kept.
    """
    changes = "; ".join(find_changes(live, spec))
    if changes and config.reindex.on_model_change == "stop":
        raise TableError(
            f"{config.write.output} was made with other settings ({changes}) and --on_model_change=stop; leave "
            "that out to embed everything again, or give another --output"
        )
    if changes and config.reindex.keeps_deleted:
        flag = "--deletes=keep" if config.reindex.deletes == "keep" else "--retry_dead_letters"
        raise ConfigError(
            f"{flag}: {config.write.output} was made with other settings ({changes}), and its rows cannot be "
            "kept beside new ones; give another --output, or leave the flag out to embed the whole input again"
        )


def find_changes(live: Manifest | None, spec: EmbeddingSpec) -> list[str]:
    """The settings that make all vectors of the live table unusable; empty if they can be used."""
    if live is None or live.fingerprint == spec.fingerprint:
        return []
    return list(describe_changes(live.identity, spec.identity)) or ["its manifest does not say which"]


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
    store: Store,
    live: Manifest | None,
    spec: EmbeddingSpec,
    form: RowFormat,
    scratch: str,
    inputs: Sequence[str],
    config: EmbedConfig,
) -> ReusePlan:
    """Indexes the vectors that the local engine may reuse: the live table and the journal of earlier attempts."""
    folder = os.path.join(scratch, "known")
    os.makedirs(folder)
    policy = choose_policy(store, live, spec, form, config)
    lost = store.find_damaged(live, config.reindex.verify_live) if live else set()
    indexes = store.read_indexes(live, folder, lost) if live else ()
    build_index(folder, indexes, list_segments(store.work, spec.fingerprint), policy.same_fingerprint)
    reuse = LocalReuse(folder, spec.split.prefix, policy, form.layout.keep_text, frozenset(inputs))
    if live is None:
        return ReusePlan(reuse)
    gone = GoneFiles.of(VectorIndex(folder).sources, reuse.inputs)
    return ReusePlan(reuse, store.reader(live, folder), store.live_files(live), gone)


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
    return ReusePlan(reuse, reader, gone=GoneFiles.of(store.list_sources(reuse.files), frozenset(inputs)))


def choose_policy(
    store: Store, live: Manifest | None, spec: EmbeddingSpec, form: RowFormat, config: EmbedConfig
) -> ReusePolicy:
    """What a run may reuse of a table."""
    same_fingerprint = live is not None and live.fingerprint == spec.fingerprint
    same_layout = live is not None and store.can_copy(live, form)
    return ReusePolicy(same_fingerprint, same_layout, config.reindex.keeps_deleted, form.layout.sourced)
