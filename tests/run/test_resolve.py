"""Settings that cannot work are refused in one sentence, before a run begins and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError, InputError
from pipeline.run.resolve import resolve
from tests.support.corpora import write_lines
from tests.support.paths import ENCODER

REFUSED = [
    ({"max_tokens": 10_000}, "--max_tokens=10000 exceeds the encoder's"),
    ({"max_tokens": 2}, "--max_tokens=2 leaves no room"),
    ({"max_tokens": 8, "on_long": "chunk", "chunk_overlap": 6}, "--chunk_overlap=6 leaves nothing new"),
    ({"chunk_overlap": 3}, "--chunk_overlap=3 needs chunks"),
    ({"chunk_overlap": -1}, "--chunk_overlap=-1 is negative"),
    ({"dimensions": 65}, "--dimensions=65 exceeds the encoder's 64"),
    ({"dimensions": -1}, "--dimensions=-1 is negative"),
    ({"vector": "pooled"}, "--vector=pooled: .* has no output 'pooled'; it gives"),
    ({"vector": "encoder_outputs/99:mean"}, "--vector=encoder_outputs/99:mean: .* layers"),
    ({"vector": "encoder_outputs/x:mean"}, "'x' is not a layer number"),
    ({"vector": "encoder_outputs:mean"}, "names no layer"),
    ({"vector": "sequence_output"}, "say how to pool it"),
    ({"vector": "sequence_output:sum"}, "'sum' is not a pooling"),
    ({"vector": "pooled_output:mean"}, "drop ':mean'"),
    ({"vector": "sequence_output:tokens", "on_long": "average"}, "--on_long=average cannot average"),
    ({"pair_field": "b", "on_long": "chunk"}, "--on_long=chunk cannot split pairs"),
    ({"dtype": "float8"}, "--dtype=float8 is not one of float32"),
    ({"on_long": "cut"}, "--on_long=cut is not one of truncate"),
    ({"on_empty": "drop"}, "--on_empty=drop is not one of reject"),
    ({"input_format": "xml"}, "--input_format=xml is not one of auto"),
    ({"text_mode": "page"}, "--text_mode=page is not one of line"),
    ({"output_format": "csv"}, "--output_format=csv is not one of tfrecord"),
    ({"compression": "zip"}, "--compression=zip is not one of none"),
    ({"dead_letter_text": "some"}, "--dead_letter_text=some is not one of full"),
    ({"output_format": "parquet", "compression": "gzip"}, "--compression=gzip: Parquet"),
    ({"batch_tokens": -1}, "--batch_tokens=-1 is negative"),
    ({"split_bytes": 0}, "--split_bytes=0 must be at least 1"),
    ({"shard_bytes": -1}, "--shard_bytes=-1 must be at least 1"),
    ({"max_document_bytes": 0}, "--max_document_bytes=0 must be at least 1"),
    ({"limit": -1}, "--limit=-1 is negative"),
    ({"max_dead_fraction": 1.5}, "--max_dead_fraction=1.5 is not a share"),
    ({"max_dead_fraction": "nan"}, "--max_dead_fraction=nan is not a share"),
    ({"text_field": ""}, "--text_field is empty"),
    ({"keep_fields": "a,a"}, "names 'a' twice"),
    ({"keep_fields": "id"}, "--keep_fields=id would collide"),
    ({"keep_fields": "text"}, "use --keep_text"),
    ({"keep_fields": "a:date"}, "--keep_fields=a:date is not name or name:type"),
    ({"keep_fields": "a"}, "--keep_fields=a: .* is plain text"),
    ({"id_field": "a"}, "--id_field=a: .* is plain text"),
    ({"normalize": "perhaps"}, "--normalize=perhaps is not true or false"),
    ({"batch_tokens": "many"}, "--batch_tokens=many is not a whole number"),
    ({"batch_tokens": 1.5}, "--batch_tokens=1.5 is not a whole number"),
    ({"max_dead_fraction": "half"}, "--max_dead_fraction=half is not a number"),
    ({"max_dead_fraction": [0.5]}, "--max_dead_fraction=.*0.5.* is not a number"),
    ({"encoder": ["a"]}, "--encoder="),
    ({"batch_token": 3}, "'batch_token'.*batch_tokens"),
    ({"input": ()}, "--input is missing"),
    ({"output": ""}, "--output is missing"),
    ({"input": "nothing-*.txt"}, r"--input=.*nothing-\*\.txt matches no file"),
    ({"input": "empty.txt"}, "only empty files"),
]


@pytest.mark.parametrize(
    ("settings", "says"),
    REFUSED,
    ids=lambda value: None if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_setting_that_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.txt", "a dog")
    (tmp_path / "empty.txt").touch()
    defaults = {"input": "a.txt", "output": "table", "encoder": ENCODER}
    resolve(EmbedConfig.from_flat(defaults))  # nothing else is wrong
    with pytest.raises((ConfigError, InputError), match=says) as caught:
        resolve(EmbedConfig.from_flat(defaults | settings))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]


def test_paths_are_taken_as_their_text(tmp_path):
    config = EmbedConfig.from_flat({"input": [tmp_path / "a,b.txt", "c.txt"], "output": tmp_path, "encoder": Path("e")})
    assert config.read.input == (f"{tmp_path}/a,b.txt", "c.txt")
    assert (config.write.output, config.encoder.encoder) == (str(tmp_path), "e")
    assert EmbedConfig.from_flat({"input": tmp_path}).read.input == (str(tmp_path),)
