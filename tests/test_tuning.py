"""Training a part of the parameters, or adapters."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small import MODERN, PLAIN, first_state, logits_of, random_batch, run_steps

from gptjax.config import Config, MeshConfig, OptimizerConfig, TuneConfig, violations
from gptjax.step import loss_and_grads
from gptjax.tuning import joined, merged, rates, trained

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
ALL = TuneConfig(lora_rank=3, lora_targets=("query", "key", "value", "out", "up", "gate", "down"))


def config_of(model=PLAIN, **tune) -> Config:
    return Config(model=model, optimizer=OPTIMIZER, batch_size=8, tune=TuneConfig(**tune))


def first_params(config: Config) -> dict:
    return first_state(config.model, config.optimizer, config.tune).params


def changed(config: Config) -> tuple[dict, dict]:
    """By path, whether a parameter is another one after two steps; and the optimizer's state."""
    before = first_params(config)
    _, after = run_steps(config, 2)
    found = {}
    for (path, old), new in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(after.params), strict=True
    ):
        differs = (np.asarray(old) != np.asarray(new)).reshape(len(old), -1).any(axis=1)
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = differs
    return found, after.opt_state


def test_only_the_last_blocks_and_the_head_are_trained():
    for layers in (0, 1):
        found, opt_state = changed(config_of(layers=layers))
        for path, differs in found.items():
            if path.startswith("blocks"):
                assert differs.tolist() == [False] * (2 - layers) + [True] * layers, path
            else:
                assert differs.any() == path.startswith("head"), path
        moments = {leaf.shape[0] for leaf in jax.tree.leaves(opt_state) if leaf.ndim > 1}
        assert moments == ({1} if layers else set())


def test_adapters_are_trained_alone_and_begin_with_the_model_as_it_is():
    config = replace(config_of(replace(PLAIN, head="label", num_labels=61)), tune=ALL)
    config = replace(config, tune=replace(ALL, lora_targets=("query", "down")))
    found, _ = changed(config)
    named = {path for path, differs in found.items() if differs.any()}
    adapters = {f"lora/{name}/{part}" for name in ("query", "down") for part in ("down", "up")}
    assert named == adapters | {"head/label", "head/label_bias"}
    params = first_params(config)
    same = jax.tree.map(np.array_equal, merged(params, config)["blocks"], params["blocks"])
    assert all(jax.tree.leaves(same))


def test_merged_weights_are_the_weights_and_what_adapters_add():
    config = config_of(MODERN)
    config = replace(config, tune=replace(ALL, lora_alpha=6.0))
    params = first_params(config)
    params = params | {"lora": jax.tree.map(lambda x: x + 0.1, params["lora"])}
    whole = merged(params, config)
    assert "lora" not in whole
    for name, (part, _, _) in {"key": ("attention", 0, 0), "out": ("attention", 0, 0)}.items():
        one = {key: np.asarray(leaf[1]) for key, leaf in params["lora"][name].items()}
        added = np.tensordot(one["down"], one["up"], 1) * 2.0
        expected = np.asarray(params["blocks"][part][name][1]) + added
        np.testing.assert_allclose(whole["blocks"][part][name][1], expected, rtol=1e-5, atol=1e-6)
    tokens = np.arange(8, dtype=np.int32)[None]
    logits = [logits_of(params, tokens, config=MODERN) for params in (whole, params)]
    assert not np.allclose(*logits, atol=1e-3)


def test_gradients_by_a_part_are_those_of_the_whole():
    batch = random_batch(config_of(), 1)
    whole = config_of()
    params, key = first_params(whole), jax.random.key(0)
    run = jax.jit(loss_and_grads, static_argnames="config")
    loss, grads = run(params, batch, config=whole, key=key)
    part = config_of(layers=1)
    other, mine = run(params, batch, config=part, key=key)
    assert loss == pytest.approx(float(other), rel=1e-6)
    expected = trained(grads, part)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    again = joined(params, trained(params, part), part)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))


def test_the_learning_rate_falls_from_the_head_to_the_embedding():
    config = config_of(layer_decay=0.5)
    start = first_params(config)
    found = rates(start, config)
    assert found["head"]["norm"]["scale"] == 1
    assert found["blocks"]["attention"]["query"].ravel().tolist() == [0.25, 0.5]
    assert found["embedding"]["tokens"] == 0.125
    _, plain = run_steps(config_of(), 1)
    _, slower = run_steps(config, 1)
    far, near = (
        np.asarray(state.params["blocks"]["ffn"]["up"] - start["blocks"]["ffn"]["up"])
        for state in (plain, slower)
    )
    np.testing.assert_allclose(near[0], 0.25 * far[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(near[1], 0.5 * far[1], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_every_mesh_trains_adapters_alike():
    config = replace(config_of(MODERN), tune=ALL)
    alone, _ = run_steps(config, 3)
    for mesh in (MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)):
        metrics, _ = run_steps(replace(config, mesh=mesh), 3, 8)
        for mine, theirs in zip(metrics, alone, strict=True):
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
            assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=2e-5)


def test_what_cannot_be_trained_is_refused():
    def told(**tune):
        return " ".join(violations(config_of(**tune)))

    assert "exclude each other" in told(layers=1, lora_rank=2)
    assert "Did you mean 'query'" in told(lora_rank=2, lora_targets=("querry",))
    assert "lora_targets is empty" in told(lora_rank=2, lora_targets=())
    assert "'gate'" in told(lora_rank=2, lora_targets=("gate",))
    assert "tune.layers = 9" in told(layers=9)
    assert "tune.lora_alpha = 4.0, but tune.lora_rank is None" in told(lora_alpha=4.0)
    assert "tune.lora_targets" in told(lora_targets=("out",))
    bare = config_of(replace(PLAIN, norm_place="after", tied_embedding=True), layers=0)
    assert "has nothing to train" in " ".join(violations(bare))
    labelled = replace(bare, model=replace(bare.model, head="label", num_labels=2))
    assert "has nothing to train" not in " ".join(violations(labelled))
