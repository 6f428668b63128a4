"""The code that a Beam user writes today to embed a text file: the reference of the benchmark `stock`.

Beam's own model handlers for TensorFlow load SavedModels through Keras, which refuses those of TF Hub, so the handler
is the user's own. It does what the pages of the modules show: load both, call one after the other, take a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import tensorflow as tf
import tensorflow_hub as hub
import tensorflow_text  # noqa: F401  registers the ops of the preprocessor
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner


class TextModel:
    def __init__(self, preprocessor: str, encoder: str) -> None:
        self.preprocessor = hub.load(preprocessor)
        self.encoder = hub.load(encoder)


class TextEncoderHandler(ModelHandler[str, PredictionResult, TextModel]):
    def __init__(self, preprocessor: str, encoder: str) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.encoder = encoder

    def load_model(self) -> TextModel:
        return TextModel(self.preprocessor, self.encoder)

    def run_inference(
        self, batch: Sequence[str], model: TextModel, inference_args: dict[str, Any] | None = None
    ) -> Iterator[PredictionResult]:
        outputs = model.encoder(model.preprocessor(tf.constant(batch)))
        for text, vector in zip(batch, outputs["pooled_output"].numpy(), strict=True):
            yield PredictionResult(text, vector)

    def batch_elements_kwargs(self) -> dict[str, Any]:
        return {"min_batch_size": 32, "max_batch_size": 32}


def to_example(result: PredictionResult) -> tf.train.Example:
    text = tf.train.BytesList(value=[str(result.example).encode()])
    vector = tf.train.FloatList(value=result.inference)
    features = {"text": tf.train.Feature(bytes_list=text), "embedding": tf.train.Feature(float_list=vector)}
    return tf.train.Example(features=tf.train.Features(feature=features))


def embed_texts(source: str, output: str, preprocessor: str, encoder: str) -> None:
    """Embeds each line of a text file and writes text and vector as tf.Example to TFRecord files."""
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        (
            pipeline
            | "Read" >> beam.io.ReadFromText(source)
            | "Embed" >> RunInference(TextEncoderHandler(preprocessor, encoder))
            | "ToExample" >> beam.Map(to_example)
            | "Write" >> beam.io.WriteToTFRecord(output, beam.coders.ProtoCoder(tf.train.Example), ".tfrecord")
        )
