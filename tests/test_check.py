"""A mesh is compared with one device by a small copy of its experiment, and mistakes are found."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jax
import pytest
from launch import MAIN
from small import MODERN, PLAIN

import gptjax.model
import gptjax.proof
import gptjax.sharding
import gptjax.step
from gptjax.config import (
    GPT3,
    Config,
    MeshConfig,
    TaskConfig,
    TuneConfig,
    load_experiment,
    violations,
)
from gptjax.errors import explain
from gptjax.proof import DifferenceError, compare, misplaced
from gptjax.sharding import make_mesh
from gptjax.shrink import MOST_DEVICES, changes, num_devices, shrink, with_any_data

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
LARGE = replace(GPT3["13b"], split_residual=True, num_kv_heads=8, num_heads=40, dropout=0.1)
MESHES = [
    MeshConfig(),
    MeshConfig(fsdp=3, tensor=4),
    MeshConfig(data=16, fsdp=8, tensor=8, context=8),
    MeshConfig(tensor=2, context=4, pipe=4, rounds=5, microbatches=32),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("longest", [2, 4])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": LARGE},
        {"task": TaskConfig(kind="classify", several=True), "tune": TuneConfig(layers=20)},
        {"model": replace(LARGE, head_size=256, ffn_size=1000), "accumulate": 8},
        {"model": replace(GPT3["13b"], positions="rope", activation="swiglu", loss_piece=64)},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_small_copy_can_run_and_has_the_options_of_the_experiment(change, mesh, longest):
    config = Config(**{"model": GPT3["13b"], "mesh": mesh} | change)
    small = shrink(config, longest)
    assert violations(small, num_devices(small.mesh)) == []
    assert num_devices(small.mesh) <= MOST_DEVICES
    sizes = {"vocab_size", "vocab_multiple", "context_size", "num_layers", "width", "num_heads"}
    sizes |= {"num_kv_heads", "head_size", "ffn_size", "window", "loss_piece", "num_labels"}
    for one in {one.name for one in fields(config.model)} - sizes - {"compute_dtype", "head"}:
        assert getattr(small.model, one) == getattr(config.model, one), one
    for name in ("num_kv_heads", "window", "head_size", "loss_piece", "ffn_size"):
        if getattr(config.model, name) is None and name != "ffn_size":
            assert getattr(small.model, name) is None
    assert len(small.model.windows) == len(config.model.windows)


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS.glob("*.py")), ids=lambda one: one.stem)
def test_every_experiment_has_a_small_copy(experiment):
    config = with_any_data(load_experiment(str(experiment)))
    small = shrink(config)
    assert violations(config) == [] and violations(small, num_devices(small.mesh)) == []
    assert any("context_size" in line for line in changes(config, small))


def test_an_odd_part_of_a_row_stays_odd():
    model = replace(GPT3["small"], context_size=8 * 125)
    config = Config(model=model, mesh=MeshConfig(data=1, context=8))
    small = shrink(config)
    assert small.model.context_size % 16 and small.model.context_size % 8 == 0


# --- one device beside many ----------------------------------------------------------------------

FINE = replace(MODERN, dropout=0.2, split_residual=True)


def small_copy(model=PLAIN, **changes):
    return shrink(Config(model=model, **{"mesh": MeshConfig(data=2)} | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        small_copy(FINE, mesh=MeshConfig(fsdp=2, tensor=2, context=2, data=1), accumulate=2),
        small_copy(
            replace(PLAIN, bidirectional=True),
            mesh=MeshConfig(data=1, fsdp=2, pipe=2),
            task=TaskConfig(kind="questions"),
            tune=TuneConfig(lora_rank=4),
        ),
    ],
    ids=["many options", "a task, a pipeline, adapters"],
)
def test_a_mesh_gives_the_numbers_of_one_device(config, capsys):
    compare(config)
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["layout", *gptjax.proof.BOUNDS]


whole = gptjax.step.loss_and_grads


def own_gradients(params, batch, config, key):
    """The loss of all rows, and on each device the gradients of its own."""

    def of_part(params, batch):
        loss, grads = whole(params, batch, config, key)
        share = batch.weights_BT.sum() / jax.lax.psum(batch.weights_BT.sum(), "data")
        return jax.lax.psum(loss * share, "data"), jax.tree.map(lambda x: x * share, grads)

    return over_data(of_part)(params, batch)


def mean_of_means(params, batch, config, key):
    """The mean over devices of the mean of each."""

    def of_part(params, batch):
        return jax.lax.pmean(whole(params, batch, config, key), "data")

    return over_data(of_part)(params, batch)


def over_data(of_part):
    return jax.shard_map(
        of_part,
        in_specs=(jax.P(), jax.P("data")),
        out_specs=jax.P(),
        axis_names={"data"},
        check_vma=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake, found",
    [(own_gradients, "gradients: blocks/"), (mean_of_means, "loss: loss ")],
    ids=["a sum over devices is left out", "a mean of means"],
)
def test_what_is_wrong_with_gradients_is_found(monkeypatch, mistake, found):
    for file in (gptjax.step, gptjax.proof):
        monkeypatch.setattr(file, "loss_and_grads", mistake)
    with pytest.raises(DifferenceError, match=found) as caught:
        compare(small_copy())
    assert explain(caught.value)[0] == 8


@pytest.mark.slow
def test_keys_of_each_part_of_the_rows_are_found(monkeypatch):
    row_keys = gptjax.model.row_keys

    def of_part(key, layer, rows_B):
        here = len(rows_B) // gptjax.sharding.parts("B", len(rows_B))
        return row_keys(key, layer, rows_B % here)

    monkeypatch.setattr(gptjax.model, "row_keys", of_part)
    with pytest.raises(DifferenceError, match=r"^dropout: losses BT by .* device 1 "):
        compare(small_copy())


@pytest.mark.slow
def test_a_wrong_rule_is_found(monkeypatch):
    monkeypatch.setitem(gptjax.sharding.STORED, "F", ())
    found = (
        "^layout: moments/1/mu/blocks/ffn/down LFD stored: device 0 .* has 0:128 of F, but split "
    )
    with pytest.raises(DifferenceError, match=found):
        compare(small_copy(mesh=MeshConfig(data=1, tensor=2)))


@pytest.mark.parametrize(
    "table, letter, axes, found",
    [
        (
            "FED",
            "B",
            ("fsdp", "data"),
            "BT in a batch: device 2 (data 0, fsdp 1, tensor 0) has 4:6",
        ),
        ("IN_USE", "K", (), "DKH in use: device 0 (data 0, fsdp 0, tensor 0) has 0:4 of K"),
        ("BETWEEN", "T", "context", "BTD between blocks: device 0 (data 0, fsdp 0, tensor 0) has"),
    ],
)
def test_each_table_is_looked_at(monkeypatch, table, letter, axes, found):
    config = small_copy(
        replace(PLAIN, split_residual=True), mesh=MeshConfig(data=2, fsdp=2, tensor=2)
    )
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    assert not any(misplaced(config, mesh))
    monkeypatch.setitem(getattr(gptjax.sharding, table), letter, axes)
    problems = [words for words in misplaced(config, mesh) if words]
    assert problems[0].startswith(found)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_by_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "check", EXPERIMENTS / "tiny.py", "--processes", "2"],
        cwd=tmp_path,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "result     the numbers of one device"
    assert sum(line.startswith("gradients ") for line in lines) == 2
    assert [*tmp_path.iterdir()] == []
