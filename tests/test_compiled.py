"""A step is compiled once: for a run that goes on, and for others that are given its file."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from launch import MAIN, assert_same, finish, make_folder, start
from small import PLAIN, first_state, random_batch

from gptjax.cli.planning import Plan, _save_problems
from gptjax.compiled import compile_step, kept_in, save_executable, seal, take_executable
from gptjax.config import Config, GuardConfig, MeshConfig
from gptjax.plan.topologies import parse_topology
from gptjax.sharding import make_mesh, to_devices

CONFIG = Config(model=PLAIN, batch_size=4, steps=20)


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch):
    """JAX keeps programs where it is told to, however fast they were compiled."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh):
    """An executable file of CONFIG's step."""
    path = tmp_path_factory.mktemp("saved") / "step.bin"
    save_executable(path, CONFIG, mesh)
    return path


def losses(step, mesh):
    state = jax.device_put(
        first_state(CONFIG.model, CONFIG.optimizer, CONFIG.tune), jax.devices()[0]
    )
    batch = to_devices(mesh, random_batch(CONFIG), CONFIG.batch_size)
    found = []
    for _ in range(3):
        state, metrics = step(state, batch)
        found.append(metrics["train/loss"].item())
    return found


def test_a_step_that_is_kept_is_found_unless_it_is_damaged(tmp_path, mesh):
    def compiled():
        with kept_in(tmp_path):
            return compile_step(CONFIG, mesh)

    first, second = compiled(), compiled()
    assert (first.found, second.found) == (False, True)
    assert losses(second.step, mesh) == losses(first.step, mesh)
    (entry,) = tmp_path.glob("jit_step-*-cache")
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    assert [compiled().found for _ in range(2)] == [False, True]


def test_an_entry_that_may_not_have_been_written_to_its_end_is_forgotten(tmp_path):
    whole, cut = (tmp_path / f"jit_step-{name}-cache" for name in "ab")
    whole.write_bytes(b"all of it")
    seal(tmp_path)
    cut.write_bytes(b"a part")  # and the process was killed
    with kept_in(tmp_path):
        assert whole.exists() and not cut.exists()


def test_a_folder_that_jax_was_told_of_is_left_to_it(tmp_path, mesh):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    with kept_in(tmp_path / "ours"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")


def test_a_saved_step_is_found_by_a_run_of_the_same_config(tmp_path, saved, mesh):
    with kept_in(tmp_path):
        # What a step is not compiled from may differ, and so may the way the mesh is written.
        other = replace(CONFIG, name="other", log_every=3, mesh=MeshConfig(data=1))
        assert take_executable(saved, other, mesh) == ""
        compiled = compile_step(other, mesh)
    assert compiled.found


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"batch_size": 8}, "for another run: batch_size was 4, and is 8"),
        ({"model": replace(PLAIN, width=64)}, "model.width was 32, and is 64"),
        ({"guard": GuardConfig(spike_window=0)}, "guard.spike_window was 128, and is 0"),
        ({"mesh": MeshConfig(fsdp=2)}, "devices was data 1 x fsdp 1 x tensor 1"),
    ],
)
def test_a_step_of_another_run_is_refused_with_the_difference(tmp_path, saved, fields, words):
    config = replace(CONFIG, **fields)
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.fsdp])
    with kept_in(tmp_path):
        assert words in take_executable(saved, config, mesh)
    assert not list(tmp_path.glob("jit_step-*"))


def changed_header(content, **fields):
    line, _, rest = content.partition(b"\n")
    return json.dumps(json.loads(line) | fields).encode() + b"\n" + rest


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content[:-1], "it is damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "it is damaged"),
        (lambda content: b"not one", "it is not an executable that gptjax saved"),
        (lambda content: b"[]", "it is not an executable that gptjax saved"),
        (lambda content: changed_header(content, format="gptjax executable 0"), "its format is"),
        (
            lambda content: changed_header(content, name="jit_step-/../../evil-cache"),
            "it is not an executable that gptjax saved",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, saved, mesh, change, words):
    path = tmp_path / "step.bin"
    path.write_bytes(change(saved.read_bytes()))
    with kept_in(tmp_path / "compiled"):
        assert words in take_executable(path, CONFIG, mesh)
    with kept_in(tmp_path / "compiled"):
        assert "No such file" in take_executable(tmp_path / "none.bin", CONFIG, mesh)
    assert not list(tmp_path.glob("**/*-cache"))


def test_a_plan_refuses_to_save_what_it_cannot():
    given = Plan(save="step.bin", compile=False)
    problems = list(_save_problems(given, parse_topology("h100:8")))
    assert [problem.partition(" step.bin")[2][:30] for problem in problems] == [
        " and --no-compile exclude each",
        ": for a GPU the compiler choos",
    ]
    assert not list(_save_problems(Plan(save="step.bin"), parse_topology("v5e:8")))


@pytest.mark.slow
def test_runs_of_the_command_compile_a_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")  # and whether they are found
    found = "Persistent compilation cache hit for 'jit_step'"
    folder = make_folder(tmp_path)
    process = start(folder, "run", fault="step_end:kill9@6")
    assert found not in finish(process, -9)
    assert found in finish(start(folder, "run"))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    subprocess.run(
        [sys.executable, "-c", MAIN, "plan", "run.py", "--topology", "cpu:1", "--save", "step.bin"],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
    )
    said = finish(start(folder, "given", "--executable", "step.bin"))
    assert "executable step.bin is taken\n" in said and found in said
    assert_same(folder, "run", "given")
    said = finish(start(folder, "other", "--executable", "step.bin", "--batch-size", "16"))
    assert "executable step.bin is not taken, and the step compiled: it was compiled for an" in said
    assert "batch_size was 8, and is 16\n" in said and found not in said
