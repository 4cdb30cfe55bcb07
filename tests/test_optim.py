"""The learning rate of every step, what decays, and AdamW against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODERN, PLAIN

from gptjax.config import LORA_TARGETS, Config, OptimizerConfig, TuneConfig
from gptjax.model import param_letters
from gptjax.optim import decays, learning_rate, make_optimizer
from gptjax.tuning import all_letters


def rates(steps=100, **settings):
    config = Config(steps=steps, optimizer=OptimizerConfig(learning_rate=1.0, **settings))
    return np.array([learning_rate(config, step) for step in range(steps + 1)])


def test_the_warm_up_is_linear_and_reaches_the_rate_at_its_end():
    np.testing.assert_allclose(rates(warmup_steps=4)[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert rates(warmup_steps=0)[0] == 1


def test_a_cosine_falls_from_the_warm_up_to_the_last_step():
    got = rates(warmup_steps=20, final_learning_rate=0.1)
    np.testing.assert_allclose(got[[20, 60, 100]], [1, 0.55, 0.1], rtol=1e-5)
    assert (np.diff(got[20:]) < 0).all()


def test_a_line_falls_evenly():
    got = rates(schedule="linear", final_learning_rate=0.0)
    np.testing.assert_allclose(got, np.linspace(1, 0, 101), atol=1e-6)


def test_constant_holds_until_the_decay():
    got = rates(schedule="constant", warmup_steps=10, decay_steps=25, final_learning_rate=0.0)
    assert (got[10:76] == 1).all()
    np.testing.assert_allclose(got[75:], np.linspace(1, 0, 26), atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_after_the_decay_the_rate_stays(schedule):
    got = rates(schedule=schedule, decay_steps=50, final_steps=30, final_learning_rate=0.25)
    np.testing.assert_allclose(got[70:], 0.25, rtol=1e-6)
    assert got[69] > 0.25


@pytest.mark.parametrize("model", [PLAIN, MODERN])
def test_matrices_and_embeddings_decay_and_nothing_else(model):
    for path, letters in jax.tree_util.tree_leaves_with_path(param_letters(model)):
        name = jax.tree_util.keystr(path)
        assert decays(letters) == ("bias" not in name and "norm" not in name), name


def test_both_matrices_of_an_adapter_decay():
    targets = tuple(LORA_TARGETS)
    config = Config(model=MODERN, tune=TuneConfig(lora_rank=2, lora_targets=targets))
    letters = all_letters(config)["lora"]
    assert len(jax.tree.leaves(letters)) == 2 * len(targets)
    assert all(jax.tree.leaves(jax.tree.map(decays, letters)))


def test_the_direction_is_adamw_by_its_definition():
    config = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.5, clip_norm=None)
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    optimizer = make_optimizer(config, {"matrix": "DF", "bias": "F"})
    state = optimizer.init(jax.tree.map(jnp.asarray, params))
    m = v = jax.tree.map(np.zeros_like, params)
    for t in range(1, 4):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        direction, state = optimizer.update(grads, state, params)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, v, grads)
        for name, decay in (("matrix", 0.5), ("bias", 0)):
            root = np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3
            expected = m[name] / (1 - 0.8**t) / root + decay * params[name]
            np.testing.assert_allclose(direction[name], expected, rtol=1e-4)


def test_gradients_are_clipped_to_their_global_norm():
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.0)
    optimizer = make_optimizer(config, {"a": "D", "b": "D"})
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    small = {"a": jnp.array([0.3, 0.0]), "b": jnp.array([0.4])}

    def moments(grads):
        return optimizer.update(grads, optimizer.init(params), params)[1]

    large = jax.tree.map(lambda x: 100 * x, small)
    twice = jax.tree.map(lambda x: 2 * x, small)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moments(large), moments(twice)
    )
    assert not np.allclose(moments(small)[1].mu["a"], moments(twice)[1].mu["a"])
