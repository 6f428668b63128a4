"""Trains the student to give the teacher's vectors, which it reads from an embedding table.

The loss, the same for `pooled_output` and for the mean of all tokens: one minus the cosine to the teacher's vector,
plus ten times the mean squared difference between the two matrices of cosines within the batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.encoders.architecture import infer_architecture
from training.student import make_forward

WARM_UP = 0.05  # of a cycle
WEIGHT_DECAY = 0.01
LARGEST_NORM = 1.0  # of the gradient
SORTED_BATCHES = 50  # batches whose texts are sorted by length together


class Recipe(NamedTuple):
    """Steps and learning rates of the training.

    Attributes:
      steps: batches.
      rate: the highest learning rate; in each cycle it is reached after a warm-up and falls linearly to nothing.
      cycles: how many, of equal length.
      batch_texts, batch_tokens: the most in a batch, padding counted.
      seed: another one makes another order of the texts.
      save_steps: steps from one checkpoint to the next.
    """

    steps: int
    rate: float
    cycles: int = 1
    batch_texts: int = 256
    batch_tokens: int = 6144
    seed: int = 0
    save_steps: int = 100


def batches_of_epoch(lengths: np.ndarray, recipe: Recipe, epoch: int) -> list[np.ndarray]:
    """Cuts all texts into batches of similar lengths, in random order; the same for the same seed and epoch."""
    rng = np.random.Generator(np.random.PCG64([recipe.seed, epoch]))
    order = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), SORTED_BATCHES * recipe.batch_texts):
        block = order[start : start + SORTED_BATCHES * recipe.batch_texts]
        block = block[np.argsort(lengths[block], kind="stable")]
        while len(block):
            longest = np.maximum.accumulate(lengths[block[: recipe.batch_texts]])
            fits = longest * np.arange(1, len(longest) + 1) <= recipe.batch_tokens
            count = max(1, int(fits.sum()))
            batches.append(block[:count])
            block = block[count:]
    return [batches[i] for i in rng.permutation(len(batches))]


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [B, L], of rows of token ids."""
    mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int32)


def distil(
    initial: Mapping[str, np.ndarray], tokens: Sequence[np.ndarray], targets: np.ndarray, recipe: Recipe, folder: str
) -> dict[str, np.ndarray]:
    """Trains a student, or continues where an earlier call in the same folder was stopped.

    Args:
      initial: the student's weights by official name.
      tokens: each text's token ids, [CLS] and [SEP] included.
      targets: the teacher's vector of each text, float32 [texts, D], of length 1.
      folder: for checkpoints and `log.jsonl`, which has a line with the mean losses of every ten steps.

    Returns:
      The trained weights by official name.
    """
    import tensorflow as tf

    os.makedirs(folder, exist_ok=True)
    lengths = np.array([len(row) for row in tokens])
    variables = {name: tf.Variable(value, name=name) for name, value in initial.items()}
    forward = make_forward(variables, infer_architecture({name: value.shape for name, value in initial.items()}))
    trained = list(variables.values())
    optimizer = tf.keras.optimizers.AdamW(recipe.rate, weight_decay=WEIGHT_DECAY, beta_2=0.98, epsilon=1e-6)
    optimizer.build(trained)
    optimizer.exclude_from_weight_decay(var_list=[v for v in trained if len(v.shape) == 1])

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, targets.shape[1]], tf.float32),
        ],
        autograph=False,
    )
    def learn(ids: tf.Tensor, mask: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        cosines = tf.matmul(target, target, transpose_b=True)  # [B, B]

        def distance(vectors: tf.Tensor) -> tf.Tensor:
            unit = tf.nn.l2_normalize(vectors, -1)  # [B, D]
            apart = 1.0 - tf.reduce_mean(tf.reduce_sum(unit * target, -1))
            return apart + 10.0 * tf.reduce_mean(tf.square(tf.matmul(unit, unit, transpose_b=True) - cosines))

        with tf.GradientTape() as tape:
            losses = [distance(vectors) for vectors in forward(ids, mask)]
            loss = tf.add_n(losses)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, trained), LARGEST_NORM)
        optimizer.apply_gradients(zip(map(tf.convert_to_tensor, gradients), trained, strict=True))
        return tf.stack(losses)

    done = tf.Variable(0, dtype=tf.int64)
    names = {f"weight_{i}": variable for i, variable in enumerate(trained)}
    checkpoint = tf.train.Checkpoint(done=done, optimizer=optimizer, **names)
    manager = tf.train.CheckpointManager(checkpoint, os.path.join(folder, "checkpoints"), max_to_keep=2)
    checkpoint.restore(manager.latest_checkpoint)
    start = int(done.numpy())
    clock, recent = time.time(), []
    step = 0
    epoch = 0
    while step < recipe.steps:
        for batch in batches_of_epoch(lengths, recipe, epoch):
            if step == recipe.steps:
                break
            step += 1
            if step <= start:
                continue
            optimizer.learning_rate.assign(rate_at(step, recipe))
            ids, mask = pad([tokens[i] for i in batch])
            recent.append(learn(ids, mask, targets[batch]).numpy())
            if step % 10 == 0:
                _report(folder, step, recipe, np.mean(recent, 0), (time.time() - clock) / (step - start))
                recent = []
            if step % recipe.save_steps == 0 or step == recipe.steps:
                done.assign(step)
                manager.save()
        epoch += 1
    return {name: variable.numpy() for name, variable in variables.items()}


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, counted from 1."""
    length = recipe.steps // recipe.cycles
    past = (step - 1) % length  # steps of its cycle before it
    warm = max(1.0, WARM_UP * length)
    return recipe.rate * min((past + 1) / warm, (length - past) / max(1.0, length - warm))


def _report(folder: str, step: int, recipe: Recipe, losses: Any, seconds: float) -> None:
    line = {"step": step, "pooled_loss": round(float(losses[0]), 5), "mean_loss": round(float(losses[1]), 5)}
    with open(os.path.join(folder, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    left = round((recipe.steps - step) * seconds)
    print(
        f"step {step:,} of {recipe.steps:,}  loss {losses[0]:.4f} pooled, {losses[1]:.4f} mean  "
        f"{left // 60}m{left % 60:02}s left",
        file=sys.stderr,
        flush=True,
    )
