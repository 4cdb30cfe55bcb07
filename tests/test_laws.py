"""The invariances that every part must keep: see each test's name."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from small import MODELS, MODERN, OLD, PLAIN, fresh, random_batch, run_steps

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, OptimizerConfig
from gptjax.decoding import generate, stream
from gptjax.model import (
    forward,
    init_cache,
    token_losses,
    unroll_blocks,
    weighted_loss,
)
from gptjax.sampling import Sampling
from gptjax.sharding import make_mesh, to_devices
from gptjax.step import abstract_state, jit_train_step, loss_and_grads

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
# Laws that the order of a block's parts could break.
old_too = pytest.mark.parametrize("model", [*MODELS.values(), OLD], ids=[*MODELS, "old"])
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(fsdp=8),
    "fsdp=4 tensor=2": MeshConfig(fsdp=4, tensor=2),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def params_of(model):
    """Parameters whose biases are not 0, as a trained model's are not."""
    params = fresh(model, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)


@old_too
def test_nothing_after_a_position_changes_what_is_predicted_there(model):
    params, rng = params_of(model), np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (1, model.context_size))
    run = jax.jit(lambda tokens: forward(params, tokens, model)[0])
    before = run(tokens)
    for changed in range(1, model.context_size):
        other = tokens.copy()
        other[:, changed:] = rng.integers(0, model.vocab_size, (1, model.context_size - changed))
        np.testing.assert_array_equal(before[:, :changed], run(other)[:, :changed])
        assert not np.array_equal(before[:, changed:], run(other)[:, changed:])


@old_too
def test_a_document_packed_with_others_is_predicted_as_if_alone(model):
    params, rng = params_of(model), np.random.default_rng(0)
    documents = [rng.integers(0, model.vocab_size, size) for size in (5, 17, 10)]
    segments = np.concatenate([np.full(len(one), i) for i, one in enumerate(documents)])[None]
    positions = np.concatenate([np.arange(len(one)) for one in documents])[None]
    run = jax.jit(functools.partial(forward, config=model))
    packed = {"segments_BT": jnp.array(segments), "positions_BT": jnp.array(positions)}
    together, _ = run(params, np.concatenate(documents)[None], **packed)
    alone = [run(params, one[None])[0] for one in documents]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), atol=1e-4)


@old_too
def test_with_a_cache_is_as_without(model):
    params = params_of(model)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, model.context_size))
    run = jax.jit(lambda tokens, cache: forward(params, tokens, model, cache=cache))
    whole, _ = run(tokens, None)
    cache, parts = init_cache(model, 2, model.context_size), []
    for part in np.split(tokens, [9, 10, 11], axis=1):
        logits, cache = run(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)
    assert int(cache.length) == model.context_size


@old_too
@pytest.mark.parametrize("left, right", [(0, 5), (3, 9)])
def test_padding_on_either_side_changes_no_prediction(model, left, right):
    params, size = params_of(model), 12
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, size))
    run = jax.jit(functools.partial(forward, config=model))
    plain, _ = run(params, tokens)
    padded = np.pad(tokens, ((0, 0), (left, right)), constant_values=1)
    positions = np.pad(np.arange(size)[None], ((0, 0), (left, right)), constant_values=-1)
    cache = init_cache(model, 1, model.context_size)
    logits, _ = run(params, padded, positions_BT=jnp.array(positions), cache=cache)
    np.testing.assert_allclose(logits[:, left : left + size], plain, atol=1e-4)


@every_model
def test_prompts_of_different_lengths_in_one_batch_go_on_as_alone_also_beyond_the_context(model):
    params, key = params_of(model), jax.random.key(2)
    prompts = [[1, 2, 3], [4, 5] * 8, [6], list(range(40))]
    greedy = Sampling(max_tokens=50, temperature=0)
    together = generate(params, prompts, model, greedy, key, end=None)
    for prompt, new in zip(prompts, together, strict=True):
        assert list(stream(params, prompt, model, greedy, key, end=None)) == new
        assert without_cache(params, prompt, model, 50) == new
    sampled = Sampling(max_tokens=10, temperature=1.0, top_k=20, top_p=0.9)
    first = generate(params, prompts, model, sampled, key, end=None)[0]
    assert list(stream(params, prompts[0], model, sampled, key, end=None)) == first


def without_cache(params, prompt, model, max_tokens):
    """Greedy decoding that reads the whole window again for every token: the definition."""
    run = jax.jit(lambda tokens: forward(params, tokens, model)[0][0])
    text, start = list(prompt), max(0, len(prompt) - model.context_size)
    for _ in range(max_tokens):
        if len(text) - start > model.context_size:
            start = len(text) - model.context_size // 2
        window = text[start:]
        tokens = np.pad(window, (0, model.context_size - len(window)))[None]
        text.append(int(run(tokens)[len(window) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("plain", "data=8"),
        ("plain", "fsdp=8"),
        ("plain", "fsdp=4 tensor=2"),
        ("plain", "data=2 fsdp=2 tensor=2"),
        ("modern", "fsdp=4 tensor=2"),
    ],
)
def test_every_mesh_gives_the_losses_gradients_and_batches_of_one_device(name, mesh):
    config = Config(model=MODELS[name], optimizer=OPTIMIZER, batch_size=16, steps=20)
    one, many = on_one_device(config), run_steps(replace(config, mesh=MESHES[mesh]), 4, 8)[0]
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(
            [step[name] for step in many], [step[name] for step in one], rtol=5e-5
        )
    assert [step["data/batch_hash"] for step in many] == [step["data/batch_hash"] for step in one]


@functools.cache
def on_one_device(config):
    """Metrics of four steps."""
    return run_steps(config, 4)[0]


def test_a_mesh_gives_every_gradient_of_one_device():
    config = Config(model=MODERN, batch_size=16)
    batch, params, key = random_batch(config), params_of(MODERN), jax.random.key(0)
    _, one = jax.jit(lambda batch: loss_and_grads(params, batch, config, key))(batch)
    mesh = make_mesh(MESHES["data=2 fsdp=2 tensor=2"])
    with jax.set_mesh(mesh):
        _, many = jax.jit(lambda batch: loss_and_grads(params, batch, config, key))(
            to_devices(mesh, batch, 16)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), many, one)


def test_dropout_is_the_same_on_every_mesh():
    config = Config(model=replace(PLAIN, dropout=0.3), optimizer=OPTIMIZER, batch_size=16, steps=20)
    one, _ = run_steps(config, 3)
    # Not fsdp: what is drawn lets XLA's CPU runtime begin gathers of weights in another order on
    # each device, and now and then they wait for each other for ever.
    many, _ = run_steps(replace(config, mesh=MeshConfig(data=4, tensor=2)), 3, num_devices=8)
    np.testing.assert_allclose(
        [m["train/loss"] for m in many], [m["train/loss"] for m in one], rtol=5e-5
    )
    kept, _ = run_steps(replace(config, model=PLAIN), 3)
    assert kept[0]["train/loss"] != one[0]["train/loss"]


def test_the_loss_is_the_mean_over_the_weights_however_small_they_are():
    config, key = Config(model=PLAIN, batch_size=4), jax.random.key(0)
    batch, run = random_batch(config), jax.jit(loss_and_grads, static_argnames="config")
    params = params_of(PLAIN)
    small = batch._replace(weights_BT=batch.weights_BT * 1e-4)
    loss, lighter = (run(params, one, config=config, key=key)[0] for one in (batch, small))
    np.testing.assert_allclose(lighter, loss, rtol=1e-5)


@pytest.mark.parametrize("accumulate, mesh", [(4, MeshConfig()), (2, MESHES["data=8"])])
def test_accumulated_parts_are_one_batch_also_with_unequal_weights(accumulate, mesh):
    config = Config(model=PLAIN, optimizer=OPTIMIZER, batch_size=16, steps=20)
    one = on_one_device(config)
    num_devices = mesh.data or 1
    parts, _ = run_steps(replace(config, accumulate=accumulate, mesh=mesh), 4, num_devices)
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose([m[name] for m in parts], [m[name] for m in one], rtol=5e-5)


@every_model
@pytest.mark.parametrize(
    "change",
    [
        {"remat": "none"},
        {"remat": "full"},
        {"loss_piece": 8},
        {"loss_piece": 5},
        {"attention": "blockwise"},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(model, change):
    config = Config(model=replace(model, remat="dots", attention="xla"), batch_size=4)
    params, batch, key = params_of(model), random_batch(config), jax.random.key(0)
    changed = replace(config, model=replace(config.model, **change))
    run = jax.jit(loss_and_grads, static_argnames="config")
    plain, other = (run(params, batch, config=one, key=key) for one in (config, changed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), other, plain)


@old_too
def test_unrolled_is_as_scanned(model):
    params, tokens = params_of(model), jnp.arange(32)[None] % model.vocab_size
    scanned, _ = jax.jit(lambda: forward(params, tokens, model))()
    unrolled, _ = jax.jit(lambda: forward(params, tokens, model, run=unroll_blocks))()
    np.testing.assert_allclose(unrolled, scanned, atol=1e-4)


@every_model
def test_the_loss_with_its_own_gradient_is_the_plain_one(model):
    config = Config(model=replace(model, loss_piece=8), batch_size=4)
    params, batch = params_of(model), random_batch(config)

    def plain(params):
        logits, _ = forward(
            params,
            batch.tokens_BT,
            model,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
        )
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch.targets_BT[..., None], axis=-1
        )[..., 0]
        return -(batch.weights_BT * picked).sum()

    def pieces(params):
        return (batch.weights_BT * token_losses(params, batch, config.model)).sum()

    expected = jax.jit(jax.value_and_grad(plain))(params)
    for function in (pieces, lambda params: weighted_loss(params, batch, config.model)):
        got = jax.jit(jax.value_and_grad(function))(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), got, expected
        )


@pytest.mark.parametrize(
    "there", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)], ids=["same mesh", "another mesh"]
)
def test_ten_steps_are_five_saved_restored_and_five(tmp_path, there):
    here = MeshConfig(fsdp=4, tensor=2)
    config = Config(model=MODERN, optimizer=OPTIMIZER, batch_size=16, steps=10, mesh=here)
    whole, last = run_steps(config, 10, num_devices=8)
    _, state = run_steps(config, 5, num_devices=8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
        checkpoints.wait()
    mesh = make_mesh(there)
    config = replace(config, mesh=there)
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(abstract_state(config, mesh))
    step, metrics = jit_train_step(config, mesh), []
    for seed in range(5, 10):
        state, values = step(state, to_devices(mesh, random_batch(config, seed), 16))
        metrics.append(values["train/loss"].item())
    expected = [values["train/loss"] for values in whole[5:]]
    if there == here:
        assert metrics == expected
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(last))
    else:
        np.testing.assert_allclose(metrics, expected, rtol=5e-5)


def test_a_step_that_is_not_finite_leaves_everything_as_it_was_and_the_next_goes_on():
    config = Config(model=PLAIN, optimizer=OPTIMIZER, batch_size=8, steps=20)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    step = jit_train_step(config, mesh)
    _, state = run_steps(config, 2)
    before = jax.device_get(state)
    batch = random_batch(config)
    poisoned = batch._replace(weights_BT=np.full_like(batch.weights_BT, np.nan))
    state, metrics = step(state, to_devices(mesh, poisoned, 8))
    after = jax.device_get(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.opt_state),
        (before.params, before.opt_state),
    )
    assert (after.step, after.skipped, metrics["train/skipped"]) == (before.step + 1, 1, 1)
    state, metrics = step(state, to_devices(mesh, batch, 8))
    assert int(metrics["train/skipped"]) == 0 and np.isfinite(float(metrics["train/loss"]))
    assert not np.array_equal(
        before.params["head"]["norm"]["scale"], state.params["head"]["norm"]["scale"]
    )


def test_the_gradient_of_the_norm_is_its_derivative():
    from gptjax.layers import normalize

    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    for centred in (True, False):
        check_grads(
            lambda x, centred=centred: normalize(x, centred, 1e-5), (x,), order=1, modes=["rev"]
        )
