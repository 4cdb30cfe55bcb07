"""Runs of the real command for tests: of one process, and of several on this machine."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from gptjax.checkpoint import Checkpoints
from gptjax.config import MeshConfig
from gptjax.model import abstract_params
from gptjax.rundir import read_run
from gptjax.sharding import make_mesh

EXPERIMENT = """
from gptjax import *

def config():
    return Config(
        model=GPTConfig(context_size=32, num_layers=2, width=32, num_heads=4),
        data=DataConfig(path=("text.txt",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        sample=SampleConfig(max_tokens=0),
        steps=12, batch_size=8, log_every=1, eval_every=6, save_every=4, tensorboard=False,
    )
"""
MAIN = "import sys; from gptjax.cli import main; sys.exit(main())"
SAME = ("train/loss", "train/grad_norm", "eval/loss", "data/batch_hash")


def make_folder(folder):
    """An experiment, and a text for it."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size)) for size in rng.integers(1, 8, 50)]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 4000)))
    (folder / "run.py").write_text(EXPERIMENT)
    return folder


def start(folder, run, *options, devices=1, fault=""):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "train", "run.py", "--run-dir", run, *options],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}", "GPTJAX_FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for_step(folder, run, step, process):
    """Until the run has logged the step."""
    path = folder / run / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def free_address():
    """HOST:PORT at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_program(folder, program, count, devices=1):
    """A program in so many processes, given the address of the first one and its own number."""
    address = free_address()
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(i)],
            cwd=folder,
            env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def start_processes(folder, run, count, *options, devices=1, faults=()):
    """The command in so many processes with so many devices each; `faults` of the first of them."""
    launch = ["--coordinator", free_address(), "--num-processes", str(count), "--process-id"]
    faults = [*faults, *[""] * (count - len(faults))]
    return [
        start(folder, run, *options, *launch, str(i), devices=devices, fault=fault)
        for i, fault in enumerate(faults)
    ]


def in_processes(folder, run, count, *options, devices=1, code=0):
    """The command in so many processes with so many devices each, to their end."""
    processes = start_processes(folder, run, count, *options, devices=devices)
    return [finish(process, code) for process in processes]


def figures(folder, run):
    """What must be the same in every run, by step; and that no step stands twice."""
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: {name: line.get(name) for name in SAME} for line in lines}


def params_of(folder, run):
    config, _ = read_run(folder / run)
    like = abstract_params(config.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.device_get(Checkpoints(folder / run).restore_params(like, config.steps))


def assert_same(folder, run, other):
    assert figures(folder, run) == figures(folder, other)
    jax.tree.map(np.testing.assert_array_equal, params_of(folder, run), params_of(folder, other))
