"""The fast graph against golden vectors of the official code, and how it is chosen, proven and recorded.

The two tiny references are in `tests/reference`. Larger ones take gigabytes: `tests/reference/export_official.py`
writes them, and `EMBEAM_REFERENCE=DIR pytest tests/encoders/test_fast.py` runs these tests over all that DIR holds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import EmbedConfig, EncoderConfig, VectorChoice
from pipeline.embedding_spec import make_embedding_spec
from pipeline.encoders import architecture, export, load, onednn, parity, runtime, spec
from pipeline.encoders.architecture import Architecture, canonical_names, infer_architecture, recognise_architecture
from pipeline.encoders.base import TokenEncoder
from pipeline.encoders.export import encode, export_encoder, initial_weights
from pipeline.encoders.fast import TOKEN_STEPS, build_graph, round_up_tokens
from pipeline.encoders.load import load_encoder
from pipeline.encoders.mode import VERSION, Mode, choose_mode, choose_modes
from pipeline.encoders.onednn import has_fused_kernels
from pipeline.encoders.parity import ParityCheck
from pipeline.encoders.runtime import native_half_precision
from pipeline.encoders.saved_model import list_variables
from pipeline.encoders.spec import describe_encoder
from pipeline.encoders.weights import arrange_weights, read_weights
from pipeline.errors import ConfigError, EncoderError
from pipeline.records import Batch, Chunk, Document
from tests.support.official import INPUTS, official_outputs, vocabulary
from tests.support.paths import ENCODER, REFERENCE
from tests.support.tables import assert_close

pytestmark = pytest.mark.numeric

TOLERANCES = {"tiny": 2e-5, "small": 1e-4, "base": 1e-4, "large": 5e-4}  # max abs, two orders of summation in float32
HOME = Path(os.environ.get("EMBEAM_REFERENCE", REFERENCE))
FIXTURES = ["tiny_v1000", "bert_v1000"]
LARGER = [
    path.name
    for path in sorted(HOME.iterdir())
    if (HOME / f"golden_{path.name}.npz").exists() and not path.name.startswith(("preprocess", *FIXTURES))
]
MODELS = [*FIXTURES, *LARGER]
MODES = {
    "packed": Mode(),
    "padded": Mode(packed=False),
    "fused": Mode(fused=True),
    "laid out": Mode(fused=True, laid_out=True),
    "compiled": Mode(compiled=True, packed=False),
}
needs_fused_kernels = pytest.mark.skipif(not has_fused_kernels(), reason="this TensorFlow has no oneDNN")


def home_of(name: str) -> Path:
    return REFERENCE if (REFERENCE / name).exists() else HOME


def read_architecture(folder: Path) -> Architecture:
    found = recognise_architecture({name: shape for name, (_, shape) in list_variables(str(folder)).items()})
    assert isinstance(found, Architecture), found
    return found


def make_encoder(folder: Path, choice: VectorChoice, mode: Mode) -> TokenEncoder:
    a = read_architecture(folder)
    return TokenEncoder(choice, build_graph(read_weights(str(folder), a, choice, mode), a, choice, mode))


def golden_cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(home_of(name) / f"golden_{name}.npz") as golden:
        for key in golden.files:
            case, _, array = key.partition("/")
            cases.setdefault(case, {})[array] = golden[key]
    return {case: arrays for case, arrays in cases.items() if "input_mask" in arrays}


def golden_outputs(arrays: Mapping[str, np.ndarray], n_layers: int) -> dict[VectorChoice, np.ndarray]:
    """What the golden file says of every output, by the choice that asks for it."""
    found = {}
    if "pooled_output" in arrays:
        found[VectorChoice("pooled_output")] = arrays["pooled_output"]
    if "sequence_output" in arrays:
        found[VectorChoice("sequence_output", None, "tokens")] = arrays["sequence_output"]
        found[VectorChoice("sequence_output", None, "cls")] = arrays["sequence_output"][:, 0]
    for layer in range(n_layers) if "encoder_outputs" in arrays else ():
        found[VectorChoice("encoder_outputs", layer, "tokens")] = arrays["encoder_outputs"][layer]
        found[VectorChoice("encoder_outputs", layer, "cls")] = arrays["encoder_outputs"][layer][:, 0]
    return found


def meaningful(mask: np.ndarray) -> np.ndarray:
    """Where `[B, L]` outputs mean something: at real tokens, and everywhere in a row without any."""
    return (mask > 0) | ~(mask > 0).any(1, keepdims=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def compare_with_golden(name: str, mode: Mode, cases: Mapping[str, Mapping[str, np.ndarray]]) -> list[tuple]:
    """(case, choice, ours, golden) for all outputs of some cases, where they mean something."""
    folder = home_of(name) / name
    encoders: dict[VectorChoice, TokenEncoder] = {}
    found = []
    for case, arrays in cases.items():
        for choice, expected in golden_outputs(arrays, read_architecture(folder).layers).items():
            encoder = encoders.setdefault(choice, encoders.get(choice) or make_encoder(folder, choice, mode))
            ours = encoder.run({name: arrays[name] for name in INPUTS})
            assert ours.shape == expected.shape and ours.dtype == np.float32
            if choice.pooling == "tokens":
                ours, expected = (array[meaningful(arrays["input_mask"])] for array in (ours, expected))
            found.append((case, choice, ours, expected))
    return found


def check_golden(name: str, mode: Mode, only: Sequence[str] = ()) -> None:
    """Compares every output of all cases, or of some, with the golden one."""
    tolerance = next((value for size, value in TOLERANCES.items() if size in name), TOLERANCES["tiny"])
    cases = {case: arrays for case, arrays in golden_cases(name).items() if not only or case in only}
    compared = compare_with_golden(name, mode, cases)
    assert len(compared) >= 2 * len(cases) > 0
    for case, choice, ours, expected in compared:
        assert np.abs(ours - expected).max() <= tolerance, f"{case} {choice}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_every_output_is_the_golden_one(name):
    check_golden(name, choose_mode("float32"))


def on_this_machine(mode: str) -> Any:
    return pytest.param(mode, marks=needs_fused_kernels if MODES[mode].fused else ())


@pytest.mark.parametrize("mode", map(on_this_machine, ["packed", "padded", "fused", "laid out"]))
@pytest.mark.parametrize("name", FIXTURES)
def test_so_it_is_in_other_modes(name, mode):
    check_golden(name, MODES[mode], ("b5_s16_ragged", "b3_s16_holey_mask", "b8_s128_ragged"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", map(on_this_machine, ["packed", "padded", "laid out"]))
@pytest.mark.parametrize("name", FIXTURES)
def test_so_it_is_in_every_mode(name, mode):
    check_golden(name, MODES[mode])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIXTURES)
def test_layers_compiled_by_xla_give_the_golden_vectors(name):
    check_golden(name, MODES["compiled"], ("b5_s16_ragged", "b3_s16_holey_mask"))


def test_layers_compiled_by_xla_give_the_official_pooled_output():
    encoder = make_encoder(Path(ENCODER), VectorChoice("pooled_output"), MODES["compiled"])
    arrays = golden_cases("tiny_v1000")["b5_s16_ragged"]
    assert_close(encoder.run({name: arrays[name] for name in INPUTS}), arrays["pooled_output"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    ["tiny_v1000", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS[1:] if "large" not in name)],
)
def test_bfloat16_stays_near_the_float32_of_the_published_module(name):
    folder = home_of(name) / name
    proven = ParityCheck(str(folder), read_architecture(folder), name).prove("bfloat16")
    for mode in {choose_mode("bfloat16", proven.attention), Mode("bfloat16", emulated=True)}:
        compared = compare_with_golden(name, mode, golden_cases(name))
        assert min(cosines(ours, expected).min() for _, _, ours, expected in compared) >= 0.999, mode
        assert max(np.abs(ours - expected).max() for _, _, ours, expected in compared) > 1e-4, "that was float32"


@needs_fused_kernels
def test_kernels_that_laid_out_their_weights_do_not_mix_up_two_encoders():
    a = Architecture(1, 16, 2, 8, 64, 1000, 64)
    choice, mode = VectorChoice("pooled_output"), MODES["laid out"]
    batch = {name: np.ones((2, 9), np.int32) for name in INPUTS}
    encoders, expected = [], []
    for seed in (1, 2):
        weights = initial_weights(a.layers, a.width, a.heads, a.vocabulary, a.positions, seed=seed)
        tensors = {name: tf.constant(weight) for name, weight in weights.items()}
        expected.append(encode(tensors, batch)["pooled_output"].numpy())
        graph = build_graph(arrange_weights(tensors.__getitem__, a, choice, mode), a, choice, mode)
        encoders.append(TokenEncoder(choice, graph))
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    for _ in range(2):
        for encoder, vectors in zip(encoders, expected, strict=True):
            assert_close(encoder.run(batch), vectors)


@pytest.mark.parametrize("mode", choose_modes("bfloat16") + choose_modes("float32"), ids=str)
def test_weights_stay_outside_the_graph_of_which_optimisers_make_copies(mode):
    a, choice = read_architecture(Path(ENCODER)), VectorChoice("pooled_output")
    graph = build_graph(read_weights(ENCODER, a, choice, mode), a, choice, mode).graph.as_graph_def()
    sizes = [node.ByteSize() for node in graph.node if node.op == "Const"]
    assert sizes and max(sizes) < 1000 < a.width * a.width


def test_without_onednn_the_graph_takes_ordinary_ops(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert choose_modes("float32") == [Mode()]
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    monkeypatch.setattr(onednn, "LAYER_NORM", "_OpOfAnotherBuild")
    assert choose_modes("float32") == [Mode()]


@pytest.mark.parametrize(
    ("cosines", "attention"),
    [((0.9996, 0.9999), "bfloat16"), ((0.9990, 0.9993), "float32"), ((0.9930, 0.9920), "bfloat16")],
)
def test_attention_is_rounded_where_that_is_near_enough(cosines, attention, monkeypatch):
    modes = [Mode("bfloat16", "bfloat16"), Mode("bfloat16")]
    found = dict(zip(modes, cosines, strict=True))
    monkeypatch.setattr(parity, "choose_modes", lambda precision: modes)
    monkeypatch.setattr(parity, "remembered", lambda name, *_: [0.1, found[modes["-float32-" in name]]])
    check = ParityCheck(ENCODER, read_architecture(Path(ENCODER)), "weights")
    assert check.prove("bfloat16").attention == attention


def test_lengths_from_1_to_512_and_what_stands_under_the_padding_change_nothing():
    encoder = make_encoder(Path(ENCODER), VectorChoice("pooled_output"), Mode())
    rng = np.random.default_rng(4)
    for length in (1, 2, 3, 31, 200, 511, 512):
        ids = rng.integers(0, 1000, (2, length)).astype(np.int32)
        types = rng.integers(0, 3, (2, length)).astype(np.int32)  # a type of 2 adds nothing in the official code
        mask = (np.arange(length) < [[length], [max(1, length // 2)]]).astype(np.int32)
        inputs = dict(zip(INPUTS, (ids, mask, types), strict=True))
        assert_close(encoder.run(inputs), official_outputs(inputs)["pooled_output"], length)


@pytest.mark.parametrize("graph", ["fast", "published"])
def test_the_loaded_encoder_gives_the_golden_vectors(graph):
    found, _ = describe_encoder(EncoderConfig(encoder=ENCODER, encoder_graph=graph))
    assert found.graph == graph
    encoder, n_rows = load_encoder(found), 0
    for case, arrays in golden_cases("tiny_v1000").items():
        ids, mask, types = (arrays[name] for name in INPUTS)
        chunks = []
        for row in range(len(ids)):
            n = int(mask[row].sum())
            n_first = int((types[row, :n] == 0).argmin()) if types[row, :n].any() else n
            if mask[row, :n].all() and not types[row, :n_first].any() and types[row, n_first:n].all() and n:
                packed = ids[row, :n].astype("<i4").tobytes()  # a text or a pair is typed like that
                chunks.append((row, Chunk(Document("", ""), "", 0, 1, packed, n_first, n, 0)))
        if not chunks or "pooled_output" not in arrays:
            continue
        batch = Batch([chunk for _, chunk in chunks], ids.shape[1])
        vectors = np.asarray(encoder.encode(batch))
        assert_close(vectors, arrays["pooled_output"][[row for row, _ in chunks]], case)
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, encoder.encode(batch)), "the same batch gives other numbers"
        n_rows += len(chunks)
    assert n_rows > 20


# --- which SavedModels are of a known family -------------------------------------------------------------------------


def save_by_hand(
    folder: Path,
    first_layer: int = 0,
    change: Mapping[str, Any] | None = None,
    head: bool = False,
) -> str:
    """A SavedModel around our reference forward pass, with layers numbered from anywhere and weights changed."""
    weights = initial_weights(3, 16, 2, 1000, positions=64, seed=5) | dict(change or {})
    weights = {name: weight for name, weight in weights.items() if weight is not None}

    def rename(name: str) -> str:
        for i in reversed(range(3)):
            prefix = architecture.TALKING_HEADS.layer_name(i) + "/"
            if name.startswith(prefix):
                return f"transformer_scaffold_{i + first_layer}/{name[len(prefix) :]}"
        return name

    variables = {name: tf.Variable(weight, name=rename(name)) for name, weight in weights.items()}
    inputs = {name: tf.TensorSpec([None, None], tf.int32, name=name) for name in INPUTS}
    call = tf.function(lambda inputs: encode(variables, inputs), autograph=False)
    call.get_concrete_function(inputs)
    path = folder.parent / "vocab.txt"
    path.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    from pipeline.encoders.saving import saveable

    more = {"mlm": saveable(bias=tf.Variable(np.zeros(5, np.float32), name="predictions/bias"))} if head else {}
    module = saveable(
        __call__=call,
        variables=list(variables.values()),
        vocab_file=tf.saved_model.Asset(str(path)),
        do_lower_case=tf.Variable(True, trainable=False),
        **more,
    )
    tf.saved_model.save(module, str(folder))
    return str(folder)


def describe(folder: str | Path, **settings: Any) -> spec.EncoderSpec:
    return describe_encoder(EncoderConfig(encoder=str(folder), **settings))[0]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("module_cache")
def test_layers_may_be_numbered_from_anywhere_and_a_language_model_head_be_beside(tmp_path):
    plain = describe(save_by_hand(tmp_path / "plain"))
    moved = describe(save_by_hand(tmp_path / "moved", first_layer=24, head=True))
    assert plain.graph == moved.graph == "fast"
    assert plain.identity == moved.identity
    batch = {name: np.ones((2, 9), np.int32) for name in INPUTS}
    assert_close(*(load_encoder(found).run(batch) for found in (plain, moved)))


def test_layers_are_numbered_from_0_whatever_number_they_have():
    shapes = {name: weight.shape for name, weight in initial_weights(3, 16, 2, 1000, positions=64).items()}
    moved = {}
    for name, shape in shapes.items():
        head, _, rest = name.partition("/")
        if head.startswith("transformer_scaffold"):
            head = f"transformer_scaffold_{int(head.rpartition('_')[2]) + 24 if head[-1].isdigit() else 24}"
        moved[f"{head}/{rest}"] = shape
    assert set(moved) != set(shapes)
    found = canonical_names(moved)
    assert {found[name]: shape for name, shape in moved.items()} == shapes
    assert recognise_architecture(moved) == recognise_architecture(shapes) == infer_architecture(shapes)


def test_sizes_and_family_are_inferred():
    talking, plain = (read_architecture(REFERENCE / name) for name in FIXTURES)
    assert talking == Architecture(2, 64, 4, 16, 256, 1000, 512)
    assert plain == Architecture(2, 64, 4, 16, 256, 1000, 512, family="bert")


@pytest.mark.usefixtures("module_cache")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "transformer_scaffold_1/feedforward/gate_0/bias",
            None,
            "transformer_scaffold_1/feedforward/gate_0/bias is missing",
        ),
        ("extra/kernel", np.zeros(3, np.float32), "extra/kernel is unused"),
        ("cls_transform/bias", np.zeros(1, np.float32), "cls_transform/bias has shape"),
    ],
)
def test_a_variable_too_few_too_many_or_of_another_shape_is_named(name, value, message, tmp_path, caplog):
    with pytest.raises(EncoderError, match=message):
        weights = initial_weights(3, 16, 2, 1000, positions=64) | {name: value}
        infer_architecture({key: weight.shape for key, weight in weights.items() if weight is not None})
    if value is None:
        return  # our reference forward pass cannot do without it
    folder = save_by_hand(tmp_path / "model", change={name: value})
    with caplog.at_level(logging.WARNING):
        assert describe(folder).graph == "published"
    assert message in caplog.text
    with pytest.raises(EncoderError, match=message):
        describe(folder, encoder_graph="fast")
    with pytest.raises(EncoderError, match=message):
        describe(folder, precision="bfloat16")


@pytest.mark.usefixtures("module_cache")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("LAYER_NORM_EPSILON", 0.1, id="another epsilon"),
        pytest.param("MASKED_LOGIT", -3.0, id="another mask", marks=pytest.mark.exhaustive),
    ],
)
def test_a_graph_that_computes_something_else_runs_as_published_and_says_so(name, value, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export, name, value)
    export_encoder(initial_weights(1, 16, 2, 1000, positions=64), vocabulary(), str(tmp_path / "model"))
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        found = describe(tmp_path / "model")
    assert (found.graph, found.architecture, found.parity) == ("published", None, None)
    assert set(found.identity) == {"files", "weights"}, "sizes do not tell what this graph computes"
    assert "the fast graph does not give the same vectors (max abs" in caplog.text
    with pytest.raises(EncoderError, match="does not give the same vectors"):
        describe(tmp_path / "model", encoder_graph="fast")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("module_cache")
def test_erf_instead_of_tanh_is_noticed(tmp_path, monkeypatch):
    real = tf.nn.gelu
    weights = initial_weights(4, 64, 4, 1000, positions=64)
    monkeypatch.setattr(tf.nn, "gelu", lambda x, approximate: real(x, approximate=False))
    export_encoder(weights, vocabulary(), str(tmp_path / "erf"))
    monkeypatch.undo()
    export_encoder(weights, vocabulary(), str(tmp_path / "tanh"))
    differences = []
    for name in ("tanh", "erf"):
        a = read_architecture(tmp_path / name)
        differences.append(ParityCheck(str(tmp_path / name), a, name).prove("float32").max_abs)
    assert differences[0] < 1e-5 < 3e-4 < differences[1]
    assert describe(tmp_path / "erf").graph == "published"


# --- what is resolved before a run, and what is written of it ---------------------------------------------------------


def test_auto_takes_the_precision_of_the_machine():
    found = describe(ENCODER, precision="auto")
    assert found.precision == (native_half_precision() or "float32") and found.native


@pytest.mark.parametrize(
    ("flags", "most", "expected"),
    [
        ({"avx2", "avx512_bf16"}, "", "bfloat16"),
        ({"avx2", "amx_bf16"}, "AVX512_CORE_AMX", "bfloat16"),
        ({"avx2", "avx512_bf16"}, "avx2", ""),
        ({"avx2", "avx512_bf16"}, "AVX512_CORE_VNNI", ""),
        ({"avx2", "avx512f"}, "", ""),
    ],
)
def test_a_processor_has_bfloat16_unless_onednn_is_held_to_older_instructions(flags, most, expected, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert native_half_precision() == expected


def test_graph_and_precision_are_part_of_the_fingerprint():
    settings = [{}, {"encoder_graph": "published"}, {"precision": "bfloat16"}, {"precision": "float16"}]
    plans = [make_embedding_spec(EmbedConfig.from_flat({"encoder": ENCODER, **flags})) for flags in settings]
    assert len({plan.fingerprint for plan in plans}) == 4
    assert plans[0].identity["encoder"] == plans[1].identity["encoder"]
    assert plans[0].encoder.parity and plans[1].encoder.parity is None


def test_reduced_precision_of_the_published_graph_is_refused():
    with pytest.raises(ConfigError, match="--precision=bfloat16 needs the fast graph"):
        EncoderConfig(encoder_graph="published", precision="bfloat16")


def test_a_precision_that_is_too_inaccurate_is_refused_or_not_chosen_by_auto(monkeypatch, caplog):
    monkeypatch.setattr(parity, "LOWEST_COSINE", 1.1)
    with pytest.raises(EncoderError, match="--precision=bfloat16 is too inaccurate for this encoder"):
        describe(ENCODER, precision="bfloat16")
    monkeypatch.setattr(runtime, "native_half_precision", lambda: "bfloat16")
    with caplog.at_level(logging.WARNING):
        assert describe(ENCODER, precision="auto").precision == "float32"
    assert "float32 is used instead of bfloat16" in caplog.text


def test_a_worker_without_the_precision_that_was_planned_fails_the_run(monkeypatch):
    planned = replace(describe(ENCODER, precision="bfloat16"), native=True)
    monkeypatch.setattr(load, "native_half_precision", lambda: "")
    with pytest.raises(EncoderError, match="planned on a machine that supports it natively"):
        load_encoder(planned)


def test_a_parity_check_is_cached_but_not_for_other_arithmetic(own_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(ParityCheck, "_measure", lambda *arguments: calls.append(arguments) or [0.0, 1.0])
    for n_calls in (1, 1):
        assert describe(ENCODER).graph == "fast" and len(calls) == n_calls
    monkeypatch.setattr(parity, "VERSION", VERSION + 1)
    assert describe(ENCODER).graph == "fast" and len(calls) == 2


@pytest.mark.parametrize("figures", ["[0.0]", "[0.0, 1.0, 2.0]", "[0.0, null]", "true"])
def test_a_damaged_parity_check_is_repeated(figures, own_cache, tmp_path):
    proven = describe(ENCODER).parity
    (path,) = (tmp_path / "cache" / "remembered").iterdir()
    path.write_text(figures)
    assert describe(ENCODER).parity == proven


def test_a_parity_check_that_cannot_run_fails_and_is_not_cached(own_cache, monkeypatch, caplog):
    def fail(*arguments: Any) -> list[float]:
        raise MemoryError("no room")

    monkeypatch.setattr(ParityCheck, "_measure", fail)
    with caplog.at_level(logging.WARNING):
        assert describe(ENCODER).graph == "published"
    assert "the parity check failed: no room" in caplog.text
    monkeypatch.setattr(ParityCheck, "_measure", lambda *arguments: [0.0, 1.0])
    assert describe(ENCODER).graph == "fast"


def test_few_numbers_of_tokens_are_computed_and_little_for_nothing():
    rounded = [int(round_up_tokens(tf.constant(n))) for n in range(1, 5000)]
    assert rounded[:128] == list(range(1, 129))
    assert all(n <= more <= n + n / TOKEN_STEPS for n, more in enumerate(rounded, 1))
    assert len({more for more in rounded if 2048 < more <= 4096}) == TOKEN_STEPS
