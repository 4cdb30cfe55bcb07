"""Rows whose positions are split over devices give the numbers of whole rows."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launch import figures, finish, in_processes, make_folder, start
from small import MODERN, PLAIN, fresh, random_batch, run_steps
from test_attention import equations, inputs, segments, with_gradients

from gptjax.attention import Mask, attend, choose_across, from_ring, to_ring
from gptjax.attention.kernels import splash
from gptjax.attention.ring import Rule, journey
from gptjax.config import Config, MeshConfig, OptimizerConfig
from gptjax.decoding import generate
from gptjax.losses import unembed_loss
from gptjax.sampling import Sampling
from gptjax.sharding import in_use, make_mesh, replicated, to_devices
from gptjax.step import loss_and_grads

RING, GATHERED = {"context_attention": "ring"}, {"context_attention": "all_gather"}
SPLIT = {"split_residual": True}


def mesh_of(**sizes):
    config = MeshConfig(**{"data": 1} | sizes)
    num_devices = config.data * config.fsdp * config.tensor * config.context
    return make_mesh(config, jax.devices()[:num_devices])


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "across, implementation, context, K, window, packed, causal",
    [
        ("ring", "blockwise", 4, 2, None, True, True),
        ("ring", "xla", 3, 4, 30, True, True),
        ("ring", "blockwise", 4, 1, 2, False, True),
        ("ring", "blockwise", 2, 4, 1, False, True),
        ("ring", "blockwise", 4, 2, 25, True, False),
        ("ring", "blockwise", 3, 2, None, False, False),
        ("all_gather", "xla", 4, 2, None, True, True),
        ("all_gather", "blockwise", 3, 4, 30, True, True),
        ("all_gather", "blockwise", 4, 2, 25, True, False),
    ],
)
def test_over_split_rows_is_the_plain_one_with_its_gradients(
    across, implementation, context, K, window, packed, causal
):
    T = 24 * context
    mask = Mask(window, causal, segments_BT=segments(T) if packed else None)
    q, k, v, out = inputs(T, K=K)
    plain = jax.jit(
        lambda *x: with_gradients(functools.partial(attend, mask=mask, implementation="xla"), *x)
    )(q, k, v, out)

    def split(q, k, v):
        ordered = (q, k, v, mask.segments_BT)
        if across == "ring":
            ordered = [None if x is None else to_ring(x) for x in ordered]
        split_mask = replace(mask, across=across, segments_BT=ordered[3])
        y = attend(*ordered[:3], split_mask, implementation=implementation)
        return from_ring(y) if across == "ring" else y

    with jax.set_mesh(mesh_of(context=context, tensor=2 if K == 2 else 1)):
        found = jax.jit(functools.partial(with_gradients, split))(q, k, v, out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, plain)


@pytest.mark.parametrize("context", [2, 3, 4])
def test_the_order_of_the_ring_has_a_chunk_from_either_end_and_goes_back(context):
    x_BT = jnp.arange(2 * context)[None]
    with jax.set_mesh(mesh_of(context=context)):
        ordered = jax.jit(to_ring)(x_BT)
        assert ordered[0].tolist() == [
            chunk for d in range(context) for chunk in (d, 2 * context - 1 - d)
        ]
        np.testing.assert_array_equal(jax.jit(from_ring)(ordered), x_BT)


def test_under_a_causal_mask_all_devices_have_the_same_work():
    at_home, (leg,) = journey(8, 128, Rule(None, causal=True))
    assert at_home.table.shape == (1, 8, 1, 3) and leg.meetings.table.shape == (7, 8, 2, 3)
    assert at_home.whole == (True,) and leg.meetings.whole == (True, True)
    assert (leg.meetings.table[..., 2] > 0).all()


@pytest.mark.parametrize("window, visits", [(1, []), (2, [1, 1]), (130, [2, 2]), (1000, [7])])
def test_visits_that_no_window_reaches_are_not_made(window, visits):
    _, legs = journey(8, 128, Rule(window, causal=True))
    assert [len(leg.meetings.table) for leg in legs] == visits


def test_nothing_in_a_ring_is_as_long_as_the_row_squared():
    T = 4096
    run = functools.partial(attend, mask=Mask(across="ring"), implementation="xla")
    with jax.set_mesh(mesh_of(context=4)):
        jaxpr = jax.make_jaxpr(functools.partial(with_gradients, run))(*inputs(T, N=1, K=1))
    largest = max(v.aval.size for one in equations(jaxpr.jaxpr) for v in one.outvars)
    assert largest <= T * T / 32


def test_splash_for_a_part_of_the_queries_is_the_plain_one():
    T, H, part = 256, 64, 128
    q, k, v, _ = inputs(T, K=2, H=H)
    for mask in (Mask(), Mask(40, segments_BT=segments(T))):
        plain = attend(q, k, v, mask, implementation="xla")
        own = None if mask.segments_BT is None else mask.segments_BT[:, part:]
        rest = replace(mask, segments_BT=own, segments_BS=mask.segments_BT, offset=jnp.int32(part))
        found = splash(q[:, part:], k, v, rest, interpret=True)
        np.testing.assert_allclose(found, plain[:, part:], atol=2e-5)


def test_which_way_rows_are_split():
    assert choose_across("auto", "blockwise", 64, 1) is None
    assert choose_across("auto", "blockwise", 64, 4) == "ring"
    assert choose_across("auto", "blockwise", 60, 4) == "all_gather"
    assert choose_across("auto", "cudnn", 64, 4) == "all_gather"
    assert choose_across("ring", "cudnn", 64, 4) == "ring"
    assert choose_across("all_gather", "blockwise", 64, 4) == "all_gather"


# --- training ------------------------------------------------------------------------------------


@functools.cache
def steps_of(model, mesh, num_devices):
    config = Config(
        model=model,
        mesh=mesh,
        # At 1e-2 rounding grows to more than the tolerance, on some processors.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        batch_size=8,
        steps=20,
    )
    return run_steps(config, 20, num_devices)[0]


def cases(*values):
    """Parameters with short names, all but the first two of them slow."""
    return [
        pytest.param(
            *value,
            id=" ".join(f"{name}={one}" for part in value[-2:] for name, one in part.items()),
            marks=[pytest.mark.slow] if number >= 2 else [],
        )
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "model, change, axes",
    cases(
        (MODERN, RING, {"context": 4}),
        (MODERN, RING | SPLIT, {"fsdp": 2, "tensor": 2, "context": 2}),
        (MODERN, RING, {"context": 2}),
        (MODERN, GATHERED, {"context": 2}),
        (MODERN, GATHERED, {"context": 4}),
        (MODERN, RING, {"fsdp": 2, "tensor": 2, "context": 2}),
        (MODERN, GATHERED | SPLIT | {"loss_piece": 8}, {"tensor": 2, "context": 2}),
        (PLAIN, {"loss_piece": 1}, {"context": 2}),  # less than one of each part
        (PLAIN, RING, {"data": 2, "context": 4}),
        (PLAIN, GATHERED, {"fsdp": 2, "tensor": 2, "context": 2}),
        (PLAIN, SPLIT | {"remat": "none"}, {"fsdp": 2, "tensor": 2}),
        (PLAIN, RING | SPLIT | {"remat": "full"}, {"fsdp": 2, "tensor": 2, "context": 2}),
        (replace(PLAIN, dropout=0.3), RING | SPLIT, {"tensor": 2, "context": 2}),
    ),
)
def test_twenty_steps_over_split_rows_are_those_of_one_device(model, change, axes):
    one = steps_of(model, MeshConfig(), 1)
    many = steps_of(replace(model, **change), MeshConfig(**axes), math.prod(axes.values()))
    losses = [[step["train/loss"] for step in steps] for steps in (many, one)]
    np.testing.assert_allclose(*losses, rtol=0, atol=5e-5)
    assert [step["data/batch_hash"] for step in many] == [step["data/batch_hash"] for step in one]


@pytest.mark.parametrize(
    "change, axes",
    cases(
        (RING | SPLIT, {"fsdp": 2, "tensor": 2, "context": 2}),
        (GATHERED, {"context": 4}),
        (RING, {"context": 4}),
        (SPLIT, {"fsdp": 4, "tensor": 2}),
    ),
)
def test_every_gradient_is_that_of_one_device(change, axes):
    config, key = Config(model=MODERN, batch_size=8), jax.random.key(0)
    batch, params = random_batch(config), fresh(config.model, key)
    _, one = jax.jit(lambda batch: loss_and_grads(params, batch, config, key))(batch)
    mesh = mesh_of(**axes)
    changed = replace(config, model=replace(config.model, **change))
    with jax.set_mesh(mesh):
        _, many = jax.jit(lambda batch: loss_and_grads(params, batch, changed, key))(
            to_devices(mesh, batch, config.batch_size)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), many, one)


def test_pieces_of_the_loss_move_no_positions():
    """A piece has its share of every device: gradients are added over them, nothing is gathered."""
    mesh, config = mesh_of(context=4), replace(PLAIN, loss_piece=8)
    x_BTD = jax.ShapeDtypeStruct((2, 64, 32), jnp.float32, sharding=in_use(mesh, "BTD"))
    ids_BT, weights_BT = (
        jax.ShapeDtypeStruct((2, 64), dtype, sharding=in_use(mesh, "BT"))
        for dtype in (jnp.int32, jnp.float32)
    )
    unembedding = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=replicated(mesh))

    def gradients(x_BTD, unembedding, ids_BT, weights_BT):
        loss = functools.partial(unembed_loss, config=config)
        return jax.grad(loss, argnums=(0, 1))(x_BTD, unembedding, ids_BT, weights_BT)

    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(x_BTD, unembedding, ids_BT, weights_BT).compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text


def test_a_mesh_that_splits_rows_generates_the_tokens_of_one_device():
    params, prompts = fresh(MODERN, jax.random.key(0)), [[1, 2, 3, 4] * 4, [5, 6]]
    greedy, key = Sampling(max_tokens=24, temperature=0), jax.random.key(1)
    one = generate(params, prompts, MODERN, greedy, key, end=None)
    mesh = mesh_of(context=4)
    with jax.set_mesh(mesh):
        many = generate(
            jax.device_put(params, replicated(mesh)), prompts, MODERN, greedy, key, end=None
        )
    assert many == one


@pytest.mark.slow
def test_processes_that_each_have_a_part_of_every_row(tmp_path):
    folder = make_folder(tmp_path)
    steps = ["--steps", "20", "--save-every", "20"]
    finish(start(folder, "whole", *steps))
    whole = figures(folder, "whole")
    ring, axes = ["--mesh.context", "4"], ["--mesh.context", "2", "--mesh.fsdp", "2"]
    several = [*axes, "--mesh.tensor", "2", "--model.split-residual"]
    for count, options in ((2, ring), (4, several)):
        run = f"by-{count}"
        in_processes(folder, run, count, *steps, *options, devices=2)
        split = figures(folder, run)
        assert whole.keys() == split.keys()
        for step, figure in whole.items():
            assert split[step]["data/batch_hash"] == figure["data/batch_hash"]
            for name in ("train/loss", "eval/loss"):
                if figure[name] is not None:  # not every step is evaluated
                    assert split[step][name] == pytest.approx(figure[name], rel=0, abs=5e-5)
