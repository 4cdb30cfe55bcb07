"""Heads of labels: the losses they have, and that they keep the laws of the model."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from small import MODERN, PLAIN, fresh, logits_of, random_batch, run_steps

from gptjax.attention import Mask, attend
from gptjax.config import Config, ConfigError, MeshConfig, OptimizerConfig, TaskConfig, violations
from gptjax.data import Batch
from gptjax.decoding import generate
from gptjax.losses import label_losses
from gptjax.model import forward, init_cache, token_losses, weighted_loss
from gptjax.sampling import Sampling
from gptjax.step import following_weights

HEADS = {
    "label": replace(PLAIN, head="label", num_labels=61),  # as many as random_batch has targets
    "mean": replace(MODERN, head="label", num_labels=61, pool="mean"),
    "labels": replace(MODERN, head="labels", num_labels=40),
    "span": replace(PLAIN, head="span", bidirectional=True, attention="blockwise"),
}
MESHES = [MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)]
each_head = pytest.mark.parametrize("head", HEADS)
losses_of = jax.jit(token_losses, static_argnames="config")


@pytest.mark.slow
@each_head
def test_every_mesh_and_accumulated_parts_give_the_same_losses(head):
    # At a higher rate steps blow up how sums are rounded.
    config = Config(model=HEADS[head], batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-3))
    if head == "label":
        config = replace(config, task=TaskConfig(label_smoothing=0.1, lm_weight=0.5))
    alone, _ = run_steps(config, 3)
    meshes = MESHES if head == "span" else MESHES[2:]  # each takes long to compile
    others = [run_steps(replace(config, mesh=mesh), 3, 8)[0] for mesh in meshes]
    others.append(run_steps(replace(config, accumulate=4), 3)[0])
    for metrics in others:
        for mine, theirs in zip(metrics, alone, strict=True):
            for name in ("train/loss", "train/grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=2e-5)


@each_head
def test_packed_is_alone_and_padding_changes_nothing(head):
    model = HEADS[head]
    params = fresh(model, jax.random.key(0))
    batch = random_batch(Config(model=model, batch_size=4))
    packed, size = np.asarray(losses_of(params, batch, config=model)), model.context_size
    for row in range(4):
        for number in (1, 2):
            here = np.flatnonzero(batch.segments_BT[row] == number)
            before = size - len(here)  # as much padding as there is room
            alone = Batch(*(np.zeros_like(x) for x in batch))
            for filled, given in zip(alone, batch, strict=True):
                filled[0, before:] = given[row, here]
            alone.segments_BT[0, before:] = 1
            mine = np.asarray(losses_of(params, alone, config=model))[0, before:]
            # Words of bits of a first token would lie before it.
            first = 1 if head == "labels" else 0
            np.testing.assert_allclose(
                mine[first:], packed[row, here][first:], rtol=1e-4, atol=1e-5
            )


def test_a_loss_of_classes_is_the_cross_entropy_and_smoothing_spreads_it():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 3, 4)).astype(np.float32)
    batch = Batch(*[np.array([[2, 0, 3]], np.int32)] * 5)
    model = replace(PLAIN, head="label", num_labels=4)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    plain = -logprobs[0, [0, 1, 2], [2, 0, 3]]
    np.testing.assert_allclose(label_losses(logits, batch, model)[0], plain, rtol=1e-5)
    smooth = 0.8 * plain - 0.2 * logprobs[0].mean(-1)
    np.testing.assert_allclose(label_losses(logits, batch, model, 0.2)[0], smooth, rtol=1e-5)


def test_a_loss_of_label_sets_reads_the_bits_of_all_words():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 3, 40)).astype(np.float32)
    there = np.zeros(40)
    there[[0, 30, 31, 39]] = 1
    targets = np.array([[0, 1 | 1 << 8, 1 | 1 << 30]], np.int32)
    batch = Batch(targets, targets, targets, targets, targets)
    shares = 1 / (1 + np.exp(-logits[0, 2].astype(np.float64)))
    expected = -(there * np.log(shares) + (1 - there) * np.log(1 - shares)).sum()
    losses = label_losses(logits, batch, HEADS["labels"])
    assert losses[0, 2] == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_spans_is_the_mean_of_both_ends_over_the_segment():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 6, 2)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
    targets = np.array([[0, 1, 2, 0, 3, 0]], np.int32)
    batch = Batch(targets, targets, targets, segments, segments)
    losses = np.asarray(label_losses(logits, batch, HEADS["span"]))[0]
    first = logits[0, :3] - np.log(np.exp(logits[0, :3]).sum(0))
    second = logits[0, 3:5] - np.log(np.exp(logits[0, 3:5]).sum(0))
    expected = [0, -first[1, 0], -first[2, 1], 0, -second[1].mean(), 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_spans_takes_memory_linear_in_the_positions():
    def temporary(T):
        model = replace(HEADS["span"], context_size=T)

        def loss(logits_BTC, rows_BT):
            return label_losses(logits_BTC, Batch(*[rows_BT] * 5), model).sum()

        shapes = jax.ShapeDtypeStruct((1, T, 2), "float32"), jax.ShapeDtypeStruct((1, T), "int32")
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 6 * temporary(1024)


def test_pooled_logits_are_the_mean_over_the_segment_until_there():
    model = HEADS["mean"]
    params = fresh(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    places = {
        "segments_BT": np.array([[1] * 4 + [2] * 5, [1] * 9], np.int32),
        "positions_BT": np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], range(9)], np.int32),
    }
    each = logits_of(params, tokens, config=replace(model, pool="last"), **places)
    found = logits_of(params, tokens, config=model, **places)
    for row, start, stop in [(0, 0, 4), (0, 4, 9), (1, 0, 9)]:
        counts = np.arange(1, stop - start + 1)[:, None]
        expected = np.cumsum(each[row, start:stop], axis=0) / counts
        np.testing.assert_allclose(found[row, start:stop], expected, rtol=1e-5, atol=1e-6)
    alone = logits_of(params, tokens[1:], config=model)
    np.testing.assert_allclose(alone[0], found[1], rtol=1e-5, atol=1e-6)
    last = forward(params, tokens, model, **places, only=8)[0]
    np.testing.assert_allclose(last[:, 0], found[:, 8], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="give whole segments and no cache"):
        forward(params, tokens, model, cache=init_cache(model, 2, 9))


def test_a_bidirectional_model_sees_what_comes_after_within_its_segment():
    for attention in ("xla", "blockwise"):
        model = replace(HEADS["span"], attention=attention, window=3)
        params = fresh(model, jax.random.key(0))
        tokens = np.arange(12, dtype=np.int32)[None]
        segments = np.repeat([1, 2], 6)[None]
        run = functools.partial(logits_of, params, config=model, segments_BT=segments)
        other = tokens.copy()
        other[0, 5] = 60
        changed = np.abs(run(other) - run(tokens))
        reached = changed.max(axis=(0, 2)) > 1e-6
        assert reached.tolist() == [False] + [True] * 5 + [False] * 6  # two layers of reach 2


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_of_queries_see_what_comes_after_as_the_plain_attention_does(window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 160, 2, 4)).astype(np.float32) for _ in range(3))  # two blocks
    segments = np.repeat([1, 2], [100, 60])[None]
    mask = Mask(window=window, causal=False, segments_BT=jax.numpy.asarray(segments))

    def gradients(implementation):
        def total(*given):
            return (attend(*given, mask, implementation=implementation) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    for mine, theirs in zip(
        *map(jax.tree.leaves, map(gradients, ("blockwise", "xla"))), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_token_that_follows_is_added():
    model = HEADS["label"]
    params = fresh(model, jax.random.key(0))
    batch = random_batch(Config(model=model, batch_size=2))
    weights = np.asarray(following_weights(batch))
    assert weights.sum() == pytest.approx(1)
    ends = batch.segments_BT[:, :-1] != batch.segments_BT[:, 1:]
    assert not weights[:, :-1][ends].any() and not weights[:, -1].any()
    one = following_weights(batch._replace(segments_BT=np.ones_like(batch.segments_BT)))
    assert not np.asarray(one)[:, -1].any()  # what follows it is not in the row
    loss_of = jax.jit(weighted_loss, static_argnames="config")
    both = loss_of(params, batch, config=model, lm_weights_BT=weights)
    lm = replace(model, head="lm", num_labels=None)
    following = batch._replace(targets_BT=np.roll(batch.tokens_BT, -1, 1), weights_BT=weights)
    expected = loss_of(params, batch, config=model) + loss_of(params, following, config=lm)
    assert both == pytest.approx(float(expected), rel=1e-5)


def test_a_head_of_labels_writes_no_text():
    model = HEADS["label"]
    with pytest.raises(ConfigError, match="writes no text"):
        generate({}, [[1]], model, Sampling(), jax.random.key(0), end=0)


def test_heads_that_make_no_sense_are_refused():
    def told(**fields):
        task = fields.pop("task", TaskConfig())
        return " ".join(violations(Config(model=replace(PLAIN, **fields), task=task)))

    assert "model.num_labels is None" in told(head="label")
    assert "model.num_labels = 3" in told(num_labels=3)
    assert "model.bidirectional" in told(bidirectional=True)
    assert "model.pool = 'mean'" in told(pool="mean")
    entities = TaskConfig(kind="entities", train=("x",))
    assert "model.pool = 'mean'" in told(pool="mean", task=entities)
    assert "model.pool" not in told(pool="mean", task=replace(entities, kind="classify"))
    assert "task.label_smoothing" in told(task=TaskConfig(label_smoothing=0.1))
    weighted = TaskConfig(kind="classify", train=("x",), lm_weight=1.0)
    assert "task.lm_weight" in told(bidirectional=True, task=weighted)
