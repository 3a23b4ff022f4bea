import math

import jax
import numpy as np
import pytest

import dsv3_jax as ds
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.training.evaluate import evaluate, make_evaluator
from dsv3_jax.training.state import init_state


def test_bits_per_byte_counts_scored_tokens_only(small):
    state = init_state(small)
    T = small.train.seq_len
    tokens = np.random.default_rng(0).integers(0, small.model.vocab_size, (2, T + 1))
    segments = np.ones((2, T + 1), np.int32)
    segments[1, 5:] = 0
    batch = make_batch(tokens, segments)
    batch.weights[0, 0, :3] = 0
    batches = [batch._replace(num_bytes=np.array([7, 6]))]
    result = evaluate(make_evaluator(small), state.variables, batches)

    forward = jax.jit(ds.forward, static_argnums=0)
    logits = forward(small.model, state.variables, batch.tokens, batch.positions, batch.segment_ids).logits
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.labels[0, :, :, None], -1)[:, :, 0]
    nll = -(log_p * batch.weights[0]).sum()
    assert result is not None
    assert result.num_tokens == (T - 3) + 4
    assert result.num_bytes == 13
    assert result.loss == pytest.approx(nll / result.num_tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / 13, rel=1e-5)


def test_nothing_scored_is_no_result():
    tokens, labels = np.zeros((1, 4), np.int32), np.zeros((1, 1, 4), np.int32)
    nothing = Batch(tokens, labels, np.zeros((1, 1, 4), np.float32), num_bytes=np.array([0]))
    only_an_end = nothing._replace(weights=np.eye(1, 4, dtype=np.float32)[None])
    for batches in ([], [nothing], [only_an_end]):
        assert evaluate(lambda variables, batch: jax.numpy.zeros(()), {}, batches) is None
