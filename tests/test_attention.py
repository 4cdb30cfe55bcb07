"""Each implementation is the plain one; what cannot run is refused."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.attention import Mask, attend, choose
from gptjax.attention.kernels import cudnn, splash
from gptjax.config import ConfigError


def inputs(T, N=4, K=4, H=16):
    shapes = [(2, T, N, H), (2, T, K, H), (2, T, K, H), (2, T, N, H)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def with_gradients(run, q, k, v, out):
    """The output and the gradients of its product with `out`."""
    return jax.vjp(run, q, k, v)[0], *jax.vjp(run, q, k, v)[1](out)


def segments(T):
    return jnp.array(np.sort(np.random.default_rng(0).integers(0, 4, (2, T)), axis=1))


@pytest.mark.parametrize(
    "T, K, window, packed",
    [
        (1, 4, None, False),
        (7, 1, None, True),
        (128, 2, 1, False),
        (300, 4, None, False),
        (300, 1, 50, True),
        (300, 2, 200, True),
    ],
)
def test_blockwise_is_the_plain_one_with_its_gradients(T, K, window, packed):
    mask = Mask(window=window, segments_BT=segments(T) if packed else None)
    q, k, v, out = inputs(T, K=K)
    plain, blocks = (
        jax.jit(
            functools.partial(
                with_gradients, functools.partial(attend, mask=mask, implementation=name)
            )
        )(q, k, v, out)
        for name in ("xla", "blockwise")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), blocks, plain)


def test_blockwise_in_bfloat16_is_the_plain_one_within_its_rounding():
    run, given = jax.jit(attend, static_argnames="implementation"), inputs(300)[:3]
    exact = run(*given, Mask(), implementation="xla")
    rounded = run(*[x.astype(jnp.bfloat16) for x in given], Mask(), implementation="blockwise")
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("window, packed", [(None, False), (40, True)])
def test_splash_interpreted_is_the_plain_one(window, packed):
    mask = Mask(window=window, segments_BT=segments(128) if packed else None)
    q, k, v, _ = inputs(128, K=2, H=64)
    plain = attend(q, k, v, mask, implementation="xla")
    np.testing.assert_allclose(splash(q, k, v, mask, interpret=True), plain, atol=2e-5)


def test_no_scores_of_all_positions_exist_in_blockwise():
    """With at most 16 blocks of queries, the largest array is an eighth of [T, T] or less."""

    def largest(T):
        q, k, v, out = inputs(T, N=1, K=1)
        run = functools.partial(
            with_gradients, functools.partial(attend, mask=Mask(), implementation="blockwise")
        )
        jaxpr = jax.make_jaxpr(run)(q, k, v, out)
        return max(v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars)

    assert largest(2048) <= 2048 * 2048 / 8


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize(
    "platform, dtype, context_size, head_size, expected",
    [
        ("cpu", "float32", 256, 64, "blockwise"),
        ("gpu", "bfloat16", 1024, 64, "cudnn"),
        ("gpu", "float32", 1024, 64, "xla"),
        ("gpu", "bfloat16", 1024, 256, "xla"),
        ("tpu", "bfloat16", 1024, 128, "splash"),
        ("tpu", "bfloat16", 1000, 128, "xla"),
    ],
)
def test_auto_takes_the_fastest_that_is_possible_and_says_why(
    platform, dtype, context_size, head_size, expected
):
    name, reason = choose(
        "auto", platform, dtype=dtype, context_size=context_size, head_size=head_size
    )
    assert name == expected and reason


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_named_one_that_cannot_run_is_an_error_that_names_those_that_can(name):
    with pytest.raises(ConfigError, match=rf"{name}.*needs.*xla, blockwise"):
        choose(name, "cpu", dtype="float32", context_size=128, head_size=64)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_for_the_kernel_of_nvidia_say_the_same(causal, window, packed, monkeypatch):
    """What it is asked for, computed by JAX's own attention; that it can be asked for it JAX checks
    before it looks for a GPU.
    """
    mask = Mask(window=window, causal=causal, segments_BT=segments(24) if packed else None)
    bare = jax.ShapeDtypeStruct((2, 24, 4, 64), "bfloat16")
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.eval_shape(lambda x: cudnn(x, x, x, mask), bare)
    q, k, v, _ = inputs(24)
    expected = attend(q, k, v, mask, implementation="xla")
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(
        "jax.nn.dot_product_attention",
        lambda *arrays, implementation, **how: asked(*arrays, implementation="xla", **how),
    )
    np.testing.assert_allclose(cudnn(q, k, v, mask), expected, atol=1e-5)
