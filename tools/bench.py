"""Measure one training step of an experiment, alone or in turn with programs of others.

    python tools/bench.py experiments/tiny.py --batch-size 8
    python tools/bench.py --size tiny --peer transformers --peer nanogpt=FOLDER

The step is the one that `gptjax train` runs, on random tokens of the experiment's shapes. A peer is
the same architecture, batch and precision in PyTorch: loss, gradients, clipping, AdamW, and the
loss brought to the host. Each program has a process of its own, so that its peak memory is its own
and no two pools of threads mix. They take turns, one step at a time, so a machine that drifts slows
all of them alike: what counts is the ratio of a peer's seconds to gptjax's in the same round.

Prints one JSON line. Of each program: step_seconds, the median of the rounds; peak_bytes, resident
memory of the process, on an accelerator what the fullest device gave out. Of gptjax:
compile_seconds, to trace, lower and compile the step; first_step_seconds, from the start of the
process to the first loss; mfu, as in metrics.jsonl, null for a chip whose peak is not known.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.cli import parse
from gptjax.config import GPT2, Config, ConfigError, GPTConfig, check, load_experiment, refuse
from gptjax.tokenizer import make_tokenizer

SIZES = {
    "tiny": Config(
        name="tiny",
        model=GPTConfig(vocab_size=50257, context_size=256, num_layers=6, width=384, num_heads=6),
        batch_size=8,
    ),
    "124m": Config(name="124m", model=replace(GPT2["small"], context_size=512), batch_size=2),
}

# What a peer cannot be told: it is as in GPT-2.
GPT2_FORM = (
    *("positions", "norm", "activation", "bias", "tied_embedding", "window"),
    *("num_kv_heads", "head_size", "ffn_size"),
)


class Program(NamedTuple):
    """A program that is ready to train: its first step is done."""

    step: Callable[[], None]  # returns once the loss is on the host
    report: Callable[[], dict[str, Any]]  # peak_bytes, of memory up to now, and other facts


# --- the programs, each made in its own process --------------------------------------------------


def make_gptjax(config: Config, started: float) -> Program:
    """The step of `gptjax train`.

    Args:
      started: when the process was, on the clock of `time.time`.
    Raises:
      ConfigError: for a config that does not fit the devices.
    """
    import jax

    from gptjax.data import Batch
    from gptjax.metrics import peak_flops
    from gptjax.model import resolve
    from gptjax.sharding import make_mesh, to_devices
    from gptjax.step import jit_init_state, jit_train_step

    jax.config.update("jax_enable_compilation_cache", False)
    check(config, jax.device_count())
    mesh = make_mesh(config.mesh)
    state = jit_init_state(config, mesh)(jax.random.key(config.seed))
    tokens_BT, targets_BT = random_tokens(config)
    one_BT, (_, place_BT) = np.ones_like(tokens_BT), np.indices(tokens_BT.shape, np.int32)
    rows = Batch(tokens_BT, targets_BT, one_BT.astype(np.float32), one_BT, place_BT)
    batch = to_devices(mesh, rows, config.batch_size)
    before = time.perf_counter()
    compiled = jit_train_step(config, mesh).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - before

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        metrics["train/loss"].item()  # a device hands out nothing before the whole step is done

    step()
    first_step_seconds = time.time() - started

    def report() -> dict[str, Any]:
        device = mesh.devices.flat[0]
        model, _ = resolve(config.model, device.platform)
        if device.platform == "cpu":
            peak_bytes = peak_resident_bytes()
        else:
            peak_bytes = max(d.memory_stats()["peak_bytes_in_use"] for d in mesh.local_devices)
        return {
            "version": f"jax {jax.__version__}",
            "num_devices": mesh.size,
            "device": device.device_kind,
            "compute_dtype": model.compute_dtype,
            "attention": model.attention,
            "peak_bytes": peak_bytes,
            "compile_seconds": compile_seconds,
            "first_step_seconds": first_step_seconds,
            "first_step_over_compile": first_step_seconds / compile_seconds,
            # The last, since on a CPU it is measured, and that takes memory.
            "peak_flops": peak_flops(device, model.compute_dtype),
        }

    return Program(step, report)


def make_peer(config: Config, started: float, *, make_model: Callable, compile: bool) -> Program:
    """A step as PyTorch's users write it, on the GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model, optimizer, loss_of = make_model(config, device)
    if compile:
        model.compile()
    dtype = config.model.compute_dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    precision = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    tokens_BT, targets_BT = (torch.from_numpy(x).long().to(device) for x in random_tokens(config))
    parts = [x_BT.chunk(config.accumulate) for x_BT in (tokens_BT, targets_BT)]

    def step() -> None:
        for tokens_BT, targets_BT in zip(*parts, strict=True):
            with precision:
                loss = loss_of(tokens_BT, targets_BT) / config.accumulate
            loss.backward()
        if config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()  # the loss is there before the update

    step()

    def report() -> dict[str, Any]:
        on_gpu = device == "cuda"
        return {
            "version": f"torch {torch.__version__}",
            "device": device,
            "compute_dtype": dtype,
            "compiled": compile,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        }

    return Program(step, report)


def make_transformers(config: Config, device: str) -> tuple[Any, Any, Callable]:
    """GPT2LMHeadModel, and PyTorch's AdamW as it is by default."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], config.model.dropout)
    sizes = GPT2Config(n_positions=config.model.context_size, **peer_sizes(config), **drops)
    model = GPT2LMHeadModel(sizes).to(device)
    model.config.use_cache = False  # of keys and values, which training has no use for
    optimizer = torch.optim.AdamW(model.parameters(), **peer_rates(config))
    # The model shifts the labels itself, so they are the tokens.
    return model, optimizer, lambda tokens, _: model(input_ids=tokens, labels=tokens).loss


def make_nanogpt(config: Config, device: str, folder: str) -> tuple[Any, Any, Callable]:
    """The model and the optimizer of a folder with nanoGPT's model.py."""
    sys.path.insert(0, folder)
    import model as nanogpt

    block_size, dropout = config.model.context_size, config.model.dropout
    sizes = nanogpt.GPTConfig(block_size=block_size, dropout=dropout, **peer_sizes(config))
    model = nanogpt.GPT(sizes).to(device)
    rates = peer_rates(config)
    optimizer = model.configure_optimizers(
        rates["weight_decay"], rates["lr"], rates["betas"], device
    )
    return model, optimizer, lambda tokens, targets: model(tokens, targets)[1]


def peer_sizes(config: Config) -> dict[str, int]:
    """The sizes that both peers call by the names of GPT-2's code."""
    names = {"vocab_size": "vocab_size", "n_layer": "num_layers", "n_head": "num_heads"}
    names |= {"n_embd": "width"}
    return {theirs: getattr(config.model, ours) for theirs, ours in names.items()}


def peer_rates(config: Config) -> dict[str, Any]:
    """The constants of AdamW as PyTorch calls them."""
    ours = config.optimizer
    betas = (ours.beta1, ours.beta2)
    return {"lr": ours.learning_rate, "betas": betas, "weight_decay": ours.weight_decay}


def random_tokens(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [B, T], int32, the same for every program."""
    shape = (config.batch_size, config.model.context_size + 1)
    tokens = np.random.default_rng(config.seed).integers(config.model.vocab_size, size=shape)
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def peak_resident_bytes() -> int:
    """The most memory that this process ever held; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- taking turns --------------------------------------------------------------------------------


def work(connection: Connection, make: Callable[..., Program], started: float) -> None:
    """The life of a program's process: what it answers, and at the end what it has to report."""
    sys.stdout = sys.stderr  # the line of results has the standard output to itself
    try:
        program = make(started=started)
    except ConfigError as error:
        connection.send(error)
        return
    connection.send(None)
    while connection.recv():
        before = time.perf_counter()
        program.step()
        connection.send(time.perf_counter() - before)
    connection.send(program.report())


def measure(programs: dict[str, Callable[..., Program]], num_rounds: int) -> dict[str, dict]:
    """The facts of each program, with "seconds", a list of one step's time in each round.

    Raises:
      ConfigError: as a program does.
      RuntimeError: if a program fails.
    """
    context, connections = multiprocessing.get_context("spawn"), {}

    def answer(name: str) -> Any:
        try:
            value = connections[name].recv()
        except EOFError:
            raise RuntimeError(f"{name} failed: its own words stand above") from None
        if isinstance(value, ConfigError):
            raise value
        return value

    def ask(name: str, another_step: bool) -> Any:
        connections[name].send(another_step)
        return answer(name)

    for name, make in programs.items():
        connections[name], there = context.Pipe()
        context.Process(target=work, args=(there, make, time.time()), daemon=True).start()
        there.close()
        answer(name)  # none is measured while another gets ready
    rounds = [{name: ask(name, True) for name in programs} for _ in range(1 + num_rounds)]
    seconds = {name: [times[name] for times in rounds[1:]] for name in programs}  # the first warms
    return {name: ask(name, False) | {"seconds": seconds[name]} for name in programs}


# --- the command line ----------------------------------------------------------------------------


def main() -> int:
    """Measure what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (EXPERIMENT | --size NAME) [--field value ...] [options]",
        description=__doc__,
        epilog="`gptjax train EXPERIMENT --help` lists the fields.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--size", choices=SIZES, help="a GPT-2 to measure on CPUs")
    peer = "transformers, or nanogpt=FOLDER with its model.py; may be given again"
    parser.add_argument("--peer", action="append", default=[], help=peer)
    parser.add_argument("--compile", action="store_true", help="peers through torch.compile")
    rounds = "steps of each that count (%(default)s)"
    parser.add_argument("--rounds", type=positive, default=7, help=rounds)
    parser.add_argument("--threads", type=positive, help="CPU cores that programs may use (all)")
    arguments = sys.argv[1:]
    experiment = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    given, fields = parser.parse_known_args(arguments)
    if (experiment is None) == (given.size is None):
        parser.error("give either an EXPERIMENT first, or --size")
    try:
        config = SIZES[given.size] if given.size else load_experiment(experiment)
        config, problems = parse(config, parser.prog, fields)
        refuse(problems)
        config = complete(config)
        check(config)
        programs = {"gptjax": functools.partial(make_gptjax, config)}
        for text in given.peer:
            name, make_model = peer_of(text, config)
            how = {"make_model": make_model, "compile": given.compile}
            programs[name] = functools.partial(make_peer, config, **how)
        if given.threads:  # all processes started from here on inherit it
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
        measured = measure(programs, given.rounds)
    except ConfigError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report(config, measured)))
    return 0


def positive(text: str) -> int:
    """A number of at least 1.

    Raises:
      ValueError: for another text.
    """
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def complete(config: Config) -> Config:
    """The config with its tokenizer's vocabulary, and no need of a text."""
    vocab_size = config.model.vocab_size or make_tokenizer(config.data).vocab_size
    model = replace(config.model, vocab_size=vocab_size)
    return replace(config, model=model, data=replace(config.data, path=("random tokens",)))


def peer_of(text: str, config: Config) -> tuple[str, Callable]:
    """The name of a peer, and what makes its model and optimizer.

    Args:
      text: transformers, or nanogpt=FOLDER.
    Raises:
      ConfigError: if there is no such peer, a package of it is missing, or it cannot be that model.
    """
    name, _, folder = text.partition("=")
    packages = {"transformers": ["torch", "transformers"], "nanogpt": ["torch"]}
    if name not in packages or (name == "nanogpt") != bool(folder):
        raise ConfigError(f"--peer {text}: give transformers, or nanogpt=FOLDER")
    problems = [
        f"--peer {text} needs the package {package!r}: pip install {package}"
        for package in packages[name]
        if importlib.util.find_spec(package) is None
    ]
    if folder and not Path(folder, "model.py").is_file():
        problems.append(f"--peer {text}: {folder} holds no model.py; give nanoGPT's folder")
    problems += [
        f"model.{field} = {getattr(config.model, field)!r}, but --peer {name} is GPT-2: "
        f"give {getattr(GPT2['small'], field)!r}"
        for field in GPT2_FORM
        if getattr(config.model, field) != getattr(GPT2["small"], field)
    ]
    refuse(problems)
    if name == "transformers":
        return name, make_transformers
    return name, functools.partial(make_nanogpt, folder=folder)


def report(config: Config, measured: dict[str, dict]) -> dict[str, Any]:
    """What is printed: when, what and where, and each program's figures."""
    from gptjax.metrics import mfu  # imports JAX, so not before the programs have run

    tokens, ours = config.batch_size * config.model.context_size, measured["gptjax"]["seconds"]
    for name, facts in measured.items():
        seconds = facts.pop("seconds")
        facts["step_seconds"], facts["step_seconds_min"] = statistics.median(seconds), min(seconds)
        facts["tokens_per_second"] = tokens / facts["step_seconds"]
        if name == "gptjax":
            peak, speed = facts["peak_flops"], facts["tokens_per_second"]
            facts["mfu"] = peak and mfu(speed, config.model, facts["num_devices"], peak)
        else:
            ratios = [theirs / our for theirs, our in zip(seconds, ours, strict=True)]
            facts["ratio_median"] = statistics.median(ratios)
            facts["ratio_min"], facts["ratio_max"] = min(ratios), max(ratios)
    shown = ("name", "batch_size", "accumulate", "mesh", "model")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "config": {name: value for name, value in asdict(config).items() if name in shown},
        "rounds": len(ours),
        "programs": measured,
    }


def commit() -> str | None:
    """The commit that is measured, with "-dirty" if files differ from it; None outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    return subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip() or None


def hardware() -> str:
    """The machine's processor, and how many of its cores the programs may use."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", about.read_text()) if about.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


if __name__ == "__main__":
    sys.exit(main())
