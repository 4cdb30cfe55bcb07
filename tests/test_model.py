"""The sizes of the presets, the parameters by their letters, and the pieces against their
formulas.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODELS, MODERN, PLAIN, fresh, logits_of

from gptjax.config import GPT2, GPT3, MeshConfig
from gptjax.layers import rotate
from gptjax.model import abstract_params, forward, param_letters, resolve
from gptjax.sharding import make_mesh


def num_params(model):
    shapes = abstract_params(replace(model, vocab_multiple=1), make_mesh(MeshConfig(data=8)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_gpt2_small_has_the_parameters_of_hugging_faces():
    assert num_params(GPT2["small"]) == 124_439_808


@pytest.mark.parametrize(
    "name, millions",
    [("medium", 355), ("large", 774), ("xl", 1558)],
)
def test_gpt2_has_the_parameters_that_its_release_states(name, millions):
    assert round(num_params(GPT2[name]) / 1e6) == millions


@pytest.mark.parametrize(
    "name, billions",
    [
        ("small", 0.125),
        ("medium", 0.35),
        ("large", 0.76),
        ("xl", 1.3),
        ("2.7b", 2.7),
        ("6.7b", 6.7),
        ("13b", 13.0),
        ("175b", 175.0),
    ],
)
def test_gpt3_has_the_parameters_of_table_2_1(name, billions):
    assert num_params(GPT3[name]) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_parameter_has_the_shape_of_its_letters_and_layers_come_first(model):
    params, letters = fresh(model, jax.random.key(0)), param_letters(model)
    jax.tree.map(
        lambda leaf, word: np.testing.assert_equal(
            leaf.shape, tuple(model.sizes[letter] for letter in word)
        ),
        params,
        letters,
    )
    assert all(word.startswith("L") for word in jax.tree.leaves(letters["blocks"]))
    assert set(params) == {"embedding", "blocks", "head"}


def test_initial_weights_are_gpt2s():
    model = replace(PLAIN, width=256, num_layers=8, initial_scale=0.02)
    params = fresh(model, jax.random.key(0))
    blocks = params["blocks"]
    for weight, scale in [
        (params["embedding"]["tokens"], 0.02),
        (blocks["attention"]["query"], 0.02),
        (blocks["ffn"]["up"], 0.02),
        (blocks["attention"]["out"], 0.02 / 4),
        (blocks["ffn"]["down"], 0.02 / 4),
    ]:
        assert float(weight.std()) == pytest.approx(scale, rel=0.05)
    assert not blocks["ffn"]["up_bias"].any() and (blocks["ffn_norm"]["scale"] == 1).all()
    assert not np.array_equal(blocks["ffn"]["up"][0], blocks["ffn"]["up"][1])


def test_padding_of_the_vocabulary_is_never_predicted_and_changes_nothing():
    padded = fresh(PLAIN, jax.random.key(0))
    tokens = np.arange(8)[None]
    logits = logits_of(padded, tokens, config=PLAIN)
    assert logits.shape == (1, 8, PLAIN.vocab_size)
    plain = replace(PLAIN, vocab_multiple=1)
    cut = padded | {"embedding": dict(padded["embedding"])}
    cut["embedding"]["tokens"] = cut["embedding"]["tokens"][: PLAIN.vocab_size]
    np.testing.assert_allclose(logits_of(cut, tokens, config=plain), logits, atol=1e-5)


def test_rope_depends_on_distance_only_and_keeps_lengths():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def product(at_q, at_k):
        turned = [rotate(x, jnp.array([[at]]), 10_000.0) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 3) == pytest.approx(product(905, 903), abs=1e-3)
    assert product(5, 3) != pytest.approx(product(5, 4), abs=1e-3)
    np.testing.assert_allclose(rotate(q, jnp.array([[0]]), 10_000.0), q, atol=1e-6)


def test_angles_of_distant_positions_keep_their_precision_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    a, b = np.asarray(rotate(x, jnp.array([[256, 257]]), 10_000.0), np.float32)[0, :, 0]
    assert abs(a - b).max() > 0.5


def test_a_banded_layer_sees_its_window_and_no_further():
    model = replace(PLAIN, num_layers=1, window=3)
    params, tokens = fresh(model, jax.random.key(0)), np.arange(16)[None]
    changed = tokens.copy()
    changed[0, 4] = 50
    run = jax.jit(lambda tokens: forward(params, tokens, model)[0][0])
    a, b = run(tokens), run(changed)
    differ = [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
    assert differ == [4 <= position < 7 for position in range(16)]


def test_auto_is_resolved_by_platform():
    auto = replace(MODERN, compute_dtype="auto", attention="auto")
    on_cpu, on_gpu = resolve(auto, "cpu")[0], resolve(auto, "gpu")[0]
    assert (on_cpu.compute_dtype, on_cpu.attention) == ("float32", "blockwise")
    assert (on_gpu.compute_dtype, on_gpu.attention) == ("bfloat16", "cudnn")


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = replace(PLAIN, compute_dtype="bfloat16")
    params = fresh(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, exact = (logits_of(params, np.arange(8)[None], config=one) for one in (model, PLAIN))
    assert logits.dtype == jnp.float32
    assert 0 < abs(logits - exact).max() < 0.1 * abs(exact).max()
