"""A stack that is run as a pipeline gives the numbers of one that is not."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from launch import figures, finish, in_processes, make_folder, start
from small import MODERN, PLAIN, fresh, random_batch, run_steps

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, OptimizerConfig, TuneConfig
from gptjax.decoding import generate
from gptjax.evaluate import jit_eval_step
from gptjax.labelled import jit_label_step
from gptjax.model import abstract_params
from gptjax.pipeline import Schedule, _to_groups, describe_pipeline
from gptjax.plan.hlo import Program
from gptjax.plan.network import mesh_axes
from gptjax.sampling import Sampling
from gptjax.sharding import make_mesh, to_devices
from gptjax.step import abstract_state, loss_and_grads, trace_train_step

PLAIN, MODERN = replace(PLAIN, num_layers=8), replace(MODERN, num_layers=8)
DROPPING = replace(PLAIN, dropout=0.3)
LABEL = replace(PLAIN, head="label", num_labels=61)
ONE = MeshConfig()
INTERLEAVED = MeshConfig(pipe=4, rounds=2, microbatches=4)
SCHEDULES = [
    Schedule(stages, rounds, microbatches)
    for stages in (2, 3, 4)
    for rounds in (1, 2, 3)
    for microbatches in (1, 2, 4, 7)
]


def mesh_of(config):
    axes = (config.data or 1, config.fsdp, config.tensor, config.context, config.pipe)
    return make_mesh(replace(config, data=axes[0]), jax.devices()[: math.prod(axes)])


def run_of(model, **fields):
    # At 1e-2 rounding grows to more than the tolerance, on some processors.
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    return Config(model=model, optimizer=optimizer, batch_size=8, steps=20, **fields)


# --- the schedule --------------------------------------------------------------------------------


def work_of(plan):
    """(group, microbatch) that a stage has at a tick, by (tick, stage)."""
    work = {}
    for stage in range(plan.stages):
        rounds, microbatches, there = plan.at(np.arange(plan.ticks) - stage)
        for tick in np.flatnonzero(there).tolist():
            group = int(rounds[tick]) * plan.stages + stage
            work[tick, stage] = (group, int(microbatches[tick]))
    return work


@pytest.mark.parametrize("plan", SCHEDULES, ids=str)
def test_every_group_meets_every_microbatch_once_and_in_order(plan):
    work = work_of(plan)
    ticks = {met: tick for (tick, _), met in work.items()}
    groups = range(plan.stages * plan.rounds)
    assert sorted(work.values()) == [
        (group, one) for group in groups for one in range(plan.microbatches)
    ]
    for (group, microbatch), tick in ticks.items():
        before = ticks.get((group - 1, microbatch), -1)
        # What comes to the first stage is kept there until its turn, but nowhere else.
        assert tick > before if group % plan.stages == 0 else tick == before + 1


@pytest.mark.parametrize("plan", SCHEDULES, ids=str)
def test_the_bubble_is_the_share_of_ticks_without_work(plan):
    places, busy = plan.ticks * plan.stages, len(work_of(plan))
    assert plan.bubble == pytest.approx((places - busy) / places)
    if plan.microbatches >= plan.stages:
        idle = plan.stages - 1
        assert plan.bubble == pytest.approx(idle / (plan.rounds * plan.microbatches + idle))


@pytest.mark.parametrize("stages, rounds", [(2, 2), (4, 2), (2, 3), (4, 4), (4, 6), (6, 4)])
def test_a_stage_has_every_so_many_th_group(stages, rounds):
    plan, per_group = Schedule(stages, rounds, 1), 2
    mesh = mesh_of(MeshConfig(pipe=stages))
    groups = jax.jit(
        jax.shard_map(
            lambda layers: _to_groups({"layer": layers}, plan)["layer"][None],
            mesh=mesh,
            in_specs=PartitionSpec("pipe"),
            out_specs=PartitionSpec("pipe"),
        )
    )(jnp.arange(stages * rounds * per_group))
    expected = np.arange(stages * rounds * per_group).reshape(rounds, stages, per_group)
    np.testing.assert_array_equal(groups, expected.swapaxes(0, 1))


def test_what_is_said_of_it():
    config = replace(run_of(PLAIN, mesh=INTERLEAVED), batch_size=32)
    assert describe_pipeline(config, 2) == (
        "4 stages x 2 rounds of 1 layer, 4 microbatches of 4 rows, bubble 27%"
    )
    config = replace(config, mesh=MeshConfig(pipe=4), batch_size=6)
    assert describe_pipeline(config, 1) == (
        "4 stages x 1 round of 2 layers, 6 microbatches of 1 row, bubble 33%; 6 rows do not divide "
        "by 4 stages, so each computes the whole head"
    )


# --- training ------------------------------------------------------------------------------------


@functools.cache
def steps_of(config):
    """Metrics of twenty steps, and the state after them."""
    metrics, state = run_steps(config, 20, mesh_of(config.mesh).size)
    return metrics, state


@pytest.mark.parametrize(
    "model, change, mesh",
    [
        (DROPPING, {}, {"pipe": 4, "rounds": 2, "microbatches": 4}),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (MODERN, {}, {"data": 2, "fsdp": 2, "pipe": 2, "rounds": 2, "microbatches": 2}),
                (DROPPING, {"remat": "full"}, {"data": 2, "pipe": 4, "rounds": 2}),
                (MODERN, {"remat": "none"}, {"pipe": 2, "rounds": 2, "microbatches": 1}),
                (LABEL, {}, {"fsdp": 2, "pipe": 4, "microbatches": 2}),
                (
                    DROPPING,
                    {"context_attention": "ring"},
                    {"tensor": 2, "context": 2, "pipe": 2, "rounds": 2, "microbatches": 2},
                ),
                (
                    MODERN,
                    {"context_attention": "ring", "split_residual": True, "remat": "full"},
                    {"tensor": 2, "context": 2, "pipe": 2, "microbatches": 4},
                ),
                (
                    MODERN,
                    {"context_attention": "all_gather"},
                    {"context": 2, "pipe": 2, "rounds": 2, "microbatches": 2},
                ),
            )
        ],
    ],
    ids=lambda value: (
        " ".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_twenty_steps_of_a_pipeline_are_those_of_one_device(model, change, mesh):
    one, _ = steps_of(run_of(model))
    many, _ = steps_of(run_of(replace(model, **change), mesh=MeshConfig(**mesh)))
    losses = [[step["train/loss"] for step in steps] for steps in (many, one)]
    np.testing.assert_allclose(*losses, rtol=0, atol=5e-5)
    assert [step["data/batch_hash"] for step in many] == [step["data/batch_hash"] for step in one]


def test_stages_send_rows_to_each_other_and_the_devices_of_a_stage_do_not():
    fields = {"data": 2, "fsdp": 2, "pipe": 2, "microbatches": 2}
    config = replace(run_of(PLAIN, mesh=MeshConfig(**fields)), batch_size=16)
    compiled = trace_train_step(config, mesh_of(config.mesh)).lower().compile()
    sent = Program(compiled.as_text()).collectives(mesh_axes(config.mesh, 8))
    kinds = {one.kind for one in sent if one.line.startswith("pipeline.py")}
    assert kinds == {"collective-permute", "all-reduce"}  # of the gradient of what all are given


def gradients(config):
    """The loss and the gradients of a batch on the config's mesh."""
    mesh, key = mesh_of(config.mesh), jax.random.key(0)
    params, batch = fresh(config.model, key), random_batch(config)
    with jax.set_mesh(mesh):
        return jax.device_get(
            jax.jit(lambda batch: loss_and_grads(params, batch, config, key))(
                to_devices(mesh, batch, config.batch_size)
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, fields",
    [
        (MODERN, {"mesh": MeshConfig(fsdp=2, pipe=2, rounds=2), "accumulate": 2}),
        (LABEL, {"mesh": INTERLEAVED, "tune": TuneConfig(layers=4)}),
    ],
)
def test_every_gradient_is_that_of_one_device(model, fields):
    config = run_of(model, **fields)
    many, one = gradients(config), gradients(replace(config, mesh=ONE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), many, one)


# --- whatever else has the parameters ------------------------------------------------------------


def test_an_evaluation_of_a_pipeline_is_that_of_one_device():
    interleaved = MeshConfig(pipe=2, rounds=2, microbatches=2)

    def sums(config):
        mesh, batch = mesh_of(config.mesh), random_batch(config)
        step = jit_eval_step(config, mesh, np.arange(config.model.vocab_size))
        if config.model.head == "label":
            step = jit_label_step(config, mesh)
        params = jax.device_put(
            fresh(config.model, jax.random.key(0)),
            jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params),
        )
        return jax.device_get(step(params, to_devices(mesh, batch, config.batch_size)))

    for config in (run_of(MODERN), run_of(LABEL)):
        one, many = sums(config), sums(replace(config, mesh=interleaved))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), many, one)


def test_a_mesh_of_stages_generates_the_tokens_of_one_device():
    greedy, key = Sampling(max_tokens=8, temperature=0), jax.random.key(1)
    model, prompts = replace(PLAIN, num_layers=2), [[1, 2, 3, 4] * 4, [5, 6]]
    params, mesh = fresh(model, jax.random.key(0)), mesh_of(MeshConfig(pipe=2))
    there = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract_params(model, mesh)
    )
    one, many = (generate(each, prompts, model, greedy, key, end=None) for each in (params, there))
    assert many == one


def test_a_checkpoint_of_a_pipeline_is_one_of_one_device_and_the_other_way(tmp_path):
    configs = [run_of(DROPPING, mesh=mesh) for mesh in (INTERLEAVED, ONE)]
    for here, there in (configs, configs[::-1]):
        _, state = steps_of(here)
        with Checkpoints(tmp_path / str(here.mesh.pipe)) as checkpoints:
            checkpoints.save(20, state)
            checkpoints.wait()
            like = abstract_state(there, mesh_of(there.mesh))
            restored = checkpoints.restore(like)
        same = lambda leaf, wanted: leaf.sharding == wanted.sharding  # noqa: E731
        assert jax.tree.all(jax.tree.map(same, restored, like))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


@pytest.mark.slow
def test_processes_that_each_have_two_stages(tmp_path):
    folder = make_folder(tmp_path)
    layers = ("--model.num-layers", "8")
    finish(start(folder, "whole", *layers))
    options = ("--mesh.pipe", "4", "--mesh.rounds", "2", "--mesh.microbatches", "2")
    said, _ = in_processes(folder, "stages", 2, *layers, *options, devices=2)
    assert "pipeline   4 stages x 2 rounds of 1 layer, 2 microbatches of 4 rows" in said
    whole, stages = figures(folder, "whole"), figures(folder, "stages")
    assert whole.keys() == stages.keys()
    for step, figure in whole.items():
        assert stages[step]["data/batch_hash"] == figure["data/batch_hash"]
        assert stages[step]["train/loss"] == pytest.approx(figure["train/loss"], rel=5e-5)
        if figure["eval/loss"]:
            assert stages[step]["eval/loss"] == pytest.approx(figure["eval/loss"], rel=5e-5)
