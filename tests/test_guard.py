"""Faults in the numbers: every one is skipped on all devices alike, nothing else is, and a run that
cannot go on stops, or goes back.
"""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODERN, PLAIN, random_batch, run_steps

import gptjax.step
import gptjax.train
from gptjax.checkpoint import Checkpoints
from gptjax.cli import explain
from gptjax.config import (
    Config,
    DataConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    violations,
)
from gptjax.data import Rows, batch_at
from gptjax.exclusions import pass_over, read_rollbacks
from gptjax.faults import arm
from gptjax.guard import judge, no_recent
from gptjax.metrics import read_metrics
from gptjax.model import abstract_params
from gptjax.replicas import differences, fold, make_comparer
from gptjax.rows import load_rows
from gptjax.sharding import make_mesh, to_devices
from gptjax.step import abstract_state, batch_hash, jit_train_step, loss_and_grads
from gptjax.tokenizer import make_tokenizer
from gptjax.train import DivergenceError, ReplicaError, fit

MESHES = {
    "one device": MeshConfig(),
    "data=8": MeshConfig(data=8),
    "fsdp=4 tensor=2": MeshConfig(fsdp=4, tensor=2),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
}
on_every_mesh = pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, id=name, marks=pytest.mark.slow if mesh.tensor > 1 else ())
        for name, mesh in MESHES.items()
    ],
)
# What one place of the gradient of one leaf, all gradients and the loss are multiplied by.
FAULTS = {
    "none": (1, 1, 1),
    "NaN loss": (1, 1, np.nan),
    "Inf loss": (1, 1, np.inf),
    "NaN in one place of one leaf": (np.nan, 1, 1),
    "Inf in one place of one leaf": (np.inf, 1, 1),
    "NaN gradient": (1, np.nan, 1),
    "loss spike": (1, 1, 10),
    "gradient spike": (1, 1e4, 1),
}
SPIKES = ("loss spike", "gradient spike")
NOT_FINITE = [name for name in FAULTS if name not in ("none", *SPIKES)]
WARMUP, WINDOW = 4, 16


def config_on(mesh):
    return Config(
        model=MODERN,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=WARMUP),
        guard=GuardConfig(spike_window=WINDOW, max_spikes=3),
        mesh=mesh,
        batch_size=8,
        steps=300,
    )


def with_fault(batch, name):
    """A batch that brings a fault; documents are only compared, so their numbers do not matter."""
    return batch._replace(segments_BT=batch.segments_BT + 10 * [*FAULTS].index(name))


@pytest.fixture
def faulty(monkeypatch):
    """Losses and gradients with the fault that their batch brings."""

    def loss_and_grads_with_fault(params, batch, config, key):
        loss, grads = loss_and_grads(params, batch, config, key)
        one, every, of_loss = jnp.array([*FAULTS.values()])[batch.segments_BT.max() // 10]
        grads = jax.tree.map(lambda grad: grad * every, grads)
        leaf = grads["blocks"]["ffn"]["up"]
        grads["blocks"]["ffn"]["up"] = leaf.at[(0,) * leaf.ndim].multiply(one)
        return loss * of_loss, grads

    monkeypatch.setattr(gptjax.step, "loss_and_grads", loss_and_grads_with_fault)


@functools.cache
def compiled(config, num_devices):
    """The mesh and the step, which has faults if `faulty` was in force when it was first called."""
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    return mesh, jit_train_step(config, mesh)


class Walk:
    """Steps of a config, each with a fault or none, and what must hold after each."""

    def __init__(self, config):
        num_devices = 1 if config.mesh == MeshConfig() else 8
        self.config, (self.mesh, self.step_fn) = config, compiled(config, num_devices)
        _, self.state = run_steps(config, 0, num_devices)

    def step(self, fault="none", taken=None, batch=None):
        """One step; `taken`: whether its update must be, by default if there is no fault."""
        taken = fault == "none" if taken is None else taken
        before = jax.device_get(self.state)
        batch = batch or random_batch(self.config, int(before.step))
        batch = to_devices(self.mesh, with_fault(batch, fault), self.config.batch_size)
        self.state, metrics = self.step_fn(self.state, batch)
        after = jax.device_get(self.state)
        count = [one.opt_state[1].count for one in (before, after)]
        assert after.step == before.step + 1 and count[1] == count[0] + taken, fault
        assert metrics["train/skipped"] == after.skipped == (0 if taken else before.skipped + 1)
        rate = gptjax.step.learning_rate(self.config, before.step)
        np.testing.assert_allclose(metrics["train/learning_rate"], rate, rtol=1e-6)
        parts = [(one.params, one.opt_state) for one in (before, after)]
        same = jax.tree.map(np.array_equal, *parts)
        if taken:
            assert not any(jax.tree.leaves(same[0])), "every parameter learns"
            assert np.isfinite(metrics["train/loss"])
        else:
            assert all(jax.tree.leaves(same)), fault
            jax.tree.map(np.testing.assert_array_equal, after.recent[:3], before.recent[:3])
        assert np.isfinite(after.recent.losses).all() and np.isfinite(after.recent.grad_norms).all()
        return metrics

    def assert_copies_are_the_same(self):
        for leaf in jax.tree.leaves(self.state):
            copies = {}
            for shard in leaf.addressable_shards:
                copies.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
            assert all(len(ones) == 1 for ones in copies.values())


@on_every_mesh
def test_what_is_not_finite_is_skipped_at_any_time_and_nothing_else_is(faulty, mesh):
    walk = Walk(config_on(mesh))
    for fault in NOT_FINITE:  # before the first update, so that Adam has no moments yet
        walk.step(fault)
    for _ in range(2):  # in the warm-up, then after it
        for fault in NOT_FINITE:
            walk.step()
            walk.step(fault)
        walk.step()
        for fault in NOT_FINITE:  # in a row
            walk.step(fault)
    for _ in range(10):
        walk.step(NOT_FINITE[0])
    walk.step()
    walk.assert_copies_are_the_same()


@on_every_mesh
def test_what_is_not_finite_in_one_row_alone_is_skipped_on_every_device(faulty, mesh):
    walk = Walk(config_on(mesh))
    walk.step()
    for value in (np.nan, np.inf):
        batch = random_batch(walk.config, 1)
        batch.weights_BT[5] = value
        walk.step(batch=batch, taken=False)
    walk.step()
    walk.assert_copies_are_the_same()


@on_every_mesh
def test_a_spike_is_skipped_once_there_is_something_to_compare_with(faulty, mesh):
    walk = Walk(config_on(mesh))
    walk.step("loss spike", taken=True)  # who knows what is usual
    for _ in range(WINDOW):
        walk.step()
    for fault in (*SPIKES, "NaN loss"):
        assert walk.step(fault)["train/spikes"] == (fault in SPIKES)
        walk.step()
    for fault in ("loss spike", "NaN loss", "gradient spike", "loss spike"):
        walk.step(fault)
    walk.step("gradient spike", taken=True)  # the fourth in a row is the new normal,
    walk.step("loss spike", taken=True)  # and what is usual now is not known yet
    for _ in range(WINDOW):
        walk.step()


@pytest.mark.slow
def test_overflow_in_bfloat16_is_skipped(faulty):
    model = replace(PLAIN, compute_dtype="bfloat16")
    walk = Walk(replace(config_on(MeshConfig(data=8)), model=model))
    walk.step()
    good = walk.state.params["embedding"]["tokens"]
    for factor in (1e38, 3e38):
        walk.state.params["embedding"]["tokens"] = good * factor
        walk.step(taken=False)
    walk.state.params["embedding"]["tokens"] = good
    walk.step()


# --- what a spike is ------------------------------------------------------------------------------

judge_step = jax.jit(judge, static_argnames="config")


def skips(losses, norms=None, recent=None, **guard):
    """The steps whose updates are not taken."""
    config = Config(guard=GuardConfig(**{"spike_window": 32} | guard))
    recent, skipped = recent or no_recent(), []
    norms = np.ones(len(losses)) if norms is None else norms
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        values = [np.float32(value) for value in (loss, norm)]
        taken, recent = judge_step(recent, *values, step, config=config)
        if not taken:
            skipped.append(step)
    return skipped


def test_a_falling_loss_and_noise_are_no_spikes():
    rng, steps = np.random.default_rng(0), np.arange(400)
    falling = 8 * np.exp(-steps / 60) + 0.01
    noisy = falling * rng.lognormal(0, 0.2, 400)
    norms = rng.lognormal(0, 1.0, 400)  # its largest are 20 times its median
    for losses in (falling, noisy, noisy[::-1] * 0.5 + 2, np.full(400, 3.0)):
        assert skips(losses, norms) == []


def test_a_fall_of_any_size_is_no_spike():
    assert skips([5.0] * 50 + [1e-3] * 20) == []


@pytest.mark.parametrize("guard", [{"spike_window": 0}, {"spike_loss": None}])
def test_what_is_not_guarded_is_not_skipped(guard):
    assert skips([3.0] * 40 + [3e6], **guard) == []


def test_nothing_is_a_spike_in_the_warm_up():
    config = Config(optimizer=OptimizerConfig(warmup_steps=50), guard=GuardConfig(spike_window=16))
    recent = no_recent()
    for step in range(60):
        loss = np.float32(100.0 if step in (40, 55) else 3.0)
        taken, recent = judge_step(recent, loss, np.float32(1), step, config=config)
        assert taken == (step != 55)


def test_another_level_is_taken_as_normal_after_a_few_steps():
    losses = [1.0] * 50 + [4.0] * 100
    assert skips(losses, max_spikes=5) == [50, 51, 52, 53, 54]
    assert skips(losses, max_spikes=5, rollback_after=5) == [*range(50, 150)]


def test_a_guard_that_cannot_work_is_refused():
    few = Config(data=DataConfig(path=("x",)), guard=GuardConfig(spike_window=3))
    assert any("spike_window = 3: too few" in problem for problem in violations(few))
    late = replace(few, guard=GuardConfig(rollback_after=9))
    assert any("rollback_after = 9 is more than" in problem for problem in violations(late))


# --- copies ---------------------------------------------------------------------------------------


def flip_a_bit(leaf, device, place=0, bit=3):
    """The same array, but on one device a bit is another."""
    parts = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            flat = data.reshape(-1).view(np.uint32)
            flat[place % flat.size] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one device"])
def test_a_flipped_bit_in_any_copy_is_found_and_named(faulty, name):
    walk = Walk(config_on(MESHES[name]))
    for _ in range(3):
        walk.step()
    mesh, state = walk.mesh, walk.state
    comparer = make_comparer(abstract_state(walk.config, mesh), mesh)
    assert differences(comparer.compare(state), comparer) == []
    leaves, tree = jax.tree.flatten(state)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(state)
    ]
    for n, one in enumerate(comparer.names):
        i, device = paths.index(one), mesh.devices.flat[n * 3 % 8]
        bit = 31 - n % 32
        changed = tree.unflatten(
            [flip_a_bit(x, device, 7 * n, bit) if i == j else x for j, x in enumerate(leaves)]
        )
        (found,) = differences(comparer.compare(changed), comparer)
        where, _, devices = found.partition(" on ")
        assert where == one
        copies = np.prod([mesh.shape[axis] for axis in comparer.axes[n]])
        assert str(device) in devices and devices.count(",") == (0 if copies > 2 else 1)
    state = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    assert differences(comparer.compare(state), comparer) == []


def test_one_device_has_nothing_to_compare():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert make_comparer(abstract_state(config_on(MeshConfig()), mesh), mesh) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_bit_counts_in_a_fold(dtype):
    values = jnp.arange(40).reshape(5, 8).astype(dtype)
    plain = np.asarray(fold(values))
    for place in range(40):
        other = values.at[place // 8, place % 8].set(~values[0, 0] if dtype == "bool" else 77)
        if not np.array_equal(other, values):
            assert not np.array_equal(plain, fold(other))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size)) for size in rng.integers(1, 8, 50)]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 4000)))
    return folder


@pytest.fixture
def faults():
    yield arm
    arm("")


def small_run(text, steps=14, skip=(), guard=None, **changes):
    values = {
        "model": replace(PLAIN, vocab_size=None, num_layers=1),
        "data": DataConfig(
            path=(str(text / "text.txt"),),
            store_dir=str(text / "stores"),
            holdout=0.0 if changes.get("eval_every") is None else 0.1,
            skip=skip,
            prefetch=0,
        ),
        "sample": SampleConfig(max_tokens=0),
        "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="constant", decay_steps=0),
        "guard": guard or GuardConfig(),
        "steps": steps,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": None,
        "save_every": 5,
        "tensorboard": False,
    }
    return Config(**values | changes)


def events_of(run_dir, *names):
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
    return [line for line in lines if line["event"] in names]


SAME = ("train/loss", "train/grad_norm", "train/learning_rate", "data/batch_hash")


def params_of(run_dir, config, step):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    like = abstract_params(replace(config.model, vocab_size=258), mesh)
    return jax.device_get(Checkpoints(run_dir).restore_params(like, step))


def test_faults_that_do_not_end_stop_the_run_and_the_last_checkpoint_is_from_before(
    text, tmp_path, faults
):
    config = small_run(text, save_every=1)
    faults("batch_read:nan@4,batch_read:nan@7-99")
    with pytest.raises(DivergenceError, match=r"up to step 11.*of step [1-6], is from") as end:
        fit(config, tmp_path)
    assert explain(end.value)[0] == 5
    last = Checkpoints(tmp_path).latest()
    assert 0 < last <= 6  # some are passed over while the one before is being saved
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params_of(tmp_path, config, last)))
    told = events_of(tmp_path, "skipped_update", "spike")
    assert [(one["event"], one["step"], one["batch"], one["in_a_row"]) for one in told] == [
        ("skipped_update", *numbers)
        for numbers in [(4, 4, 1), (7, 7, 1), (8, 8, 2), (9, 9, 3), (10, 10, 4), (11, 11, 5)]
    ]
    logged = {line["step"]: line["data/batch_hash"] for line in read_metrics(tmp_path)}
    assert all(one["batch_hash"] == logged.get(one["step"], one["batch_hash"]) for one in told)
    assert all(one["loss"] is None for one in told)


def test_a_save_that_fails_meanwhile_does_not_hide_what_went_wrong(
    monkeypatch, text, tmp_path, faults
):
    monkeypatch.setattr(Checkpoints, "poll", lambda self: None)  # it comes to light at the end
    monkeypatch.setattr(Checkpoints, "due_again", lambda self, step: False)
    config = small_run(text, save_every=6, guard=GuardConfig(save_retries=0))
    faults("batch_read:nan@7-99,written:enospc")
    with pytest.raises(DivergenceError, match=r"no checkpoint yet, and the save .* failed"):
        fit(config, tmp_path)


@pytest.mark.slow
def test_a_run_that_went_back_is_the_run_that_never_saw_those_batches(text, tmp_path, faults):
    guard = GuardConfig(rollback_after=3)
    config = small_run(text, guard=guard)
    faults("batch_read:nan@7-9")
    fit(config, tmp_path / "back")
    faults("")
    assert [line["step"] for line in read_metrics(tmp_path / "back")] == [*range(1, 15)]
    (one,) = read_rollbacks(tmp_path / "back")
    assert (one.first, one.last, one.step, one.to_step) == (7, 9, 9, 5)
    assert len(events_of(tmp_path / "back", "rollback")) == 1
    longer = fit(replace(config, steps=18), tmp_path / "back")  # which goes on from step 14
    expected = fit(small_run(text, steps=18, skip=((7, 9),)), tmp_path / "never")
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (longer, expected)))
    lines = [read_metrics(tmp_path / name) for name in ("back", "never")]
    for a, b in zip(*lines, strict=True):
        assert all(a[name] == b[name] for name in ("step", *SAME))
    # And what a step saw can be told.
    tokenizer = make_tokenizer(config.data)
    rows, _ = load_rows(config, tokenizer)
    rows = pass_over(rows, read_rollbacks(tmp_path / "back"))
    for line in lines[0]:
        batch = batch_at(line["step"] - 1, rows, which=slice(0, 8))
        assert int(batch_hash(batch)) == line["data/batch_hash"]


@pytest.mark.slow
def test_a_run_goes_back_before_its_first_checkpoint_and_only_so_often(text, tmp_path, faults):
    config = small_run(text, guard=GuardConfig(rollback_after=2, max_rollbacks=2))
    faults("batch_read:nan@3-4,batch_read:nan@13-99")
    with pytest.raises(DivergenceError, match="has gone back 2 times"):
        fit(config, tmp_path)
    first, second = read_rollbacks(tmp_path)
    assert (first.first, first.last, first.to_step) == (3, 4, 0)
    assert (second.first, second.last, second.to_step) == (10, 11, 5)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_spikes_are_told_and_a_run_goes_back_for_them_too(
    faulty, faults, monkeypatch, text, tmp_path
):
    real = Rows.batch_at

    def batch_with_spikes(rows, step, *, which):
        batch = real(rows, step, which=which)
        return with_fault(batch, "loss spike") if rows.batch_number(step) in (18, 21, 22) else batch

    monkeypatch.setattr(Rows, "batch_at", batch_with_spikes)
    model = replace(MODERN, vocab_size=None)
    guard = GuardConfig(spike_window=16, rollback_after=2)
    faults("step_end:sleep=1@17")  # the save of step 15 is done before that of 20 is due
    state = fit(small_run(text, steps=24, model=model, guard=guard), tmp_path)
    # Step 19 is seen once; 22 and 23, after the checkpoint of step 20, make the run go back.
    told = events_of(tmp_path, "skipped_update", "spike")
    assert [(one["event"], one["step"]) for one in told] == [("spike", n) for n in (19, 22, 23)]
    assert np.isfinite(told[0]["loss"])
    assert [(one.first, one.last, one.to_step) for one in read_rollbacks(tmp_path)] == [
        (22, 23, 20)
    ]
    assert int(state.opt_state[1].count) == 23


def test_a_flipped_bit_stops_the_run_and_is_never_saved(monkeypatch, text, tmp_path):
    real = gptjax.train.compile_step

    def compile_with_a_bad_device(config, mesh):
        compiled = real(config, mesh)

        def step(state, batch):
            state, metrics = compiled.step(state, batch)
            norm = state.params["head"]["norm"]
            with jax.transfer_guard("allow"):
                if int(state.step) == 9:
                    norm["scale"] = flip_a_bit(norm["scale"], jax.devices()[3])
            return state, metrics

        return compiled._replace(step=step)

    monkeypatch.setattr(gptjax.train, "compile_step", compile_with_a_bad_device)
    config = small_run(text, guard=GuardConfig(cross_check_every=4))
    with pytest.raises(
        ReplicaError, match=r"after step 10: params/head/norm/scale on cpu:3.*newest.* of step 5,"
    ) as end:
        fit(config, tmp_path)
    assert explain(end.value)[0] == 5
    assert Checkpoints(tmp_path).steps() == [5]


@pytest.mark.slow
def test_observers_change_no_number(text, tmp_path):
    plain = GuardConfig(cross_check_every=None)
    quiet = small_run(text, steps=6, log_every=100, eval_every=100, save_every=None, guard=plain)
    watched = replace(
        quiet,
        guard=GuardConfig(cross_check_every=1),
        log_every=1,
        eval_every=2,
        save_every=1,
        tensorboard=True,
    )
    states = [fit(one, tmp_path / str(i)) for i, one in enumerate((quiet, watched))]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))


def test_a_run_without_a_fault_skips_nothing(faulty):
    config = config_on(MeshConfig())
    rng = np.random.default_rng(0)
    mesh, step_fn = compiled(config, 1)
    _, state = run_steps(config, 0)
    B, T = config.batch_size, config.model.context_size
    losses = []
    for step in range(config.steps):
        batch = random_batch(config, step)
        words = rng.integers(0, 8, (B, T // 4 + 1))  # each is four tokens, so that some are easy
        tokens = (words[..., None] * 7 + np.arange(4)).reshape(B, -1).astype(np.int32)
        batch = batch._replace(tokens_BT=tokens[:, :T], targets_BT=tokens[:, 1 : T + 1])
        state, metrics = step_fn(state, to_devices(mesh, batch, B))
        losses.append(metrics["train/loss"].item())
    assert losses[-1] < losses[0] / 4
    assert int(state.opt_state[1].count) == config.steps
