"""The verb of hardware that is not there: `gptjax plan`."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.config import Config, Count, Positive, load_experiment, refuse

if TYPE_CHECKING:
    from gptjax.plan import Plan as Estimate
    from gptjax.plan.topologies import Topology


WRITTEN = "By gptjax plan"  # is in each file of a layout


@dataclass(frozen=True)
class Plan:
    """Estimate memory, speed and cost of FILE.py on hardware that need not be there."""

    # CHIP:SHAPE, such as v5p:8x8x8, v5e:256, h100:64 (GPUs), h100:8x8 (hosts x GPUs) or cpu:8
    topology: str | None = None
    slices: Count = 1  # so many of them, joined by the slower network between slices
    compile: bool = True  # with the compiler of that hardware; else all by formula, at once
    # try every mesh, remat, accumulate and attention by formula, and compile the promising ones
    search: bool = False
    # of --search: the layout as an experiment, which `train` takes; it replaces an earlier layout,
    # but no other file
    out: str = "layout.py"
    price: Positive | None = None  # of a chip for an hour: the money of the whole run is shown
    # 50000 (money, with --price), 30days or 200MWh: for how many tokens that is enough; with
    # --search also of which of GPT-3's sizes it trains the largest
    budget: str | None = None
    explain: bool = False  # say where each parameter and activation lies, and what is not split
    json: str | None = None  # a file for all figures
    html: str | None = None  # a file for the plan as a page
    # a file for the compiled step, which `gptjax train --executable FILE` takes on such hardware
    save: str | None = None
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def plan(experiment: str, given: Plan) -> None:
    """Print the plan; nothing of this machine but its processor is used."""
    refuse([*_problems(given), *_file_problems(given)])
    _alone()
    from gptjax.plan import plan as make_plan
    from gptjax.plan.explain import explain
    from gptjax.plan.page import write_page
    from gptjax.plan.report import as_json, columns, summary
    from gptjax.plan.search import parse_budget, remedies
    from gptjax.plan.topologies import parse_topology

    topology = parse_topology(given.topology, given.slices)
    refuse([*_save_problems(given, topology)])
    _cpu_devices(topology)
    budget = given.budget and parse_budget(given.budget, given.price, topology)
    config = _with_vocabulary(given.config)
    if given.search:
        found = _search(experiment, config, topology, given)
    else:
        found = make_plan(config, topology, compiling=given.compile, price=given.price)
    print(summary(found))
    if found.margin < 0:
        print(_tried(found, remedies(found)))
    if budget:
        print(_within(found, budget, given))
    if given.explain:
        print("\n" + "\n".join(columns([*explain(found)], numbers=0)))
    if given.json:
        Path(given.json).write_text(json.dumps(as_json(found), indent=2) + "\n")
    if given.html:
        write_page(found, Path(given.html))
    if given.save:
        print(_saved(Path(given.save), found))


def _problems(given: Plan) -> Iterator[str]:
    if given.topology is None:
        yield "--topology is missing: give CHIP:SHAPE, such as --topology v5p:8x8x8"
    if given.config.task.kind is not None:
        yield (
            f"task.kind = {given.config.task.kind!r}: its labels are not known before its data is "
            "read: plan the same model with --task.kind None"
        )


def _file_problems(given: Plan) -> Iterator[str]:
    """What a plan of minutes would end with: files that cannot be written, or should not be."""
    files = {"json": given.json, "html": given.html, "save": given.save}
    if given.search:
        files["out"] = given.out
    for option, name in files.items():
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            yield f"--{option} {name} is a folder: give a file"
        elif not path.parent.is_dir():
            yield f"--{option} {name}: there is no folder {path.parent}: make it, or give another"
        elif option == "out" and path.exists() and WRITTEN not in path.read_text(errors="replace"):
            yield (
                f"--out {name} is there, and no earlier search wrote it: give another file, or "
                "move that one away"
            )


def _save_problems(given: Plan, topology: "Topology") -> Iterator[str]:
    if given.save is None:
        return
    if not given.compile:
        yield f"--save {given.save} and --no-compile exclude each other: give one of them"
    if topology.chip.platform == "gpu":
        yield (
            f"--save {given.save}: for a GPU the compiler chooses kernels by their time on it, and "
            f"{topology} is not there: run there once, and RUN/compiled/ keeps the step"
        )


def _saved(path: Path, found: "Estimate") -> str:
    """Save the step of a plan, if it fits."""
    from gptjax.compiled import save_executable
    from gptjax.plan.topologies import find_devices
    from gptjax.sharding import make_mesh

    if found.margin < 0:
        return f"not saved  {path}: it does not fit"
    mesh = make_mesh(found.config.mesh, find_devices(found.topology))
    save_executable(path, found.config, mesh)
    return f"saved      {path}, which `gptjax train --executable {path}` takes on such hardware"


def _alone() -> None:
    """The compilers of TPUs and GPUs are to look for none, and to bear another beside them."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
        TF_CPP_MIN_LOG_LEVEL="2",
        CUDA_VISIBLE_DEVICES="-1",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    )
    import jax

    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(topology: "Topology") -> None:
    """Virtual devices, unless the environment says how many there are."""
    import jax

    counted = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if topology.chip.platform == "cpu" and not counted:
        jax.config.update("jax_num_cpu_devices", topology.num_devices)


def _with_vocabulary(config: Config) -> Config:
    if config.model.vocab_size is not None:
        return config
    from gptjax.rows import with_vocabulary
    from gptjax.tokenizer import make_tokenizer

    model = with_vocabulary(config.model, make_tokenizer(config.data))
    return dataclasses.replace(config, model=model)


def _search(experiment: str, config: Config, topology: "Topology", given: Plan) -> "Estimate":
    """Print the layouts that are worth a thought, and write the best as an experiment."""
    from gptjax.plan.report import columns
    from gptjax.plan.search import (
        as_arguments,
        as_experiment,
        describe,
        layout_options,
        search,
        seconds_of,
    )

    result = search(
        config,
        topology,
        compiling=given.compile,
        price=given.price,
        say=lambda line: print(line, file=sys.stderr),
    )
    rows = [("layout", "GiB", "seconds", "nothing overlaps")]
    for one in result.front:
        rows.append(_row(describe(one.config), one.memory.total, one.time))
    print("faster or smaller than all others, by formula:")
    print("\n".join(columns(rows, numbers=3)))
    if result.plans:
        rows = [("compiled", "GiB", "seconds", "nothing overlaps")]
        for one in sorted(result.plans, key=seconds_of):
            rows.append(_row(describe(one.config), one.needed, one.time))
        print("\n" + "\n".join(columns(rows, numbers=3)))
    if result.best is None:
        refuse(
            [
                f"{config.name} fits {topology} in none of {result.tried:,} layouts: give more "
                "devices, or devices with more memory"
            ]
        )
    before = load_experiment(experiment)
    about = (
        f"{WRITTEN} {experiment} --topology {given.topology} --search, "
        f"{time.strftime('%Y-%m-%d')}: {result.best.needed / 2**30:.2f} GiB a device, "
        f"{result.best.time.least:.3g} to\n{result.best.time.most:.3g} seconds a step, estimated."
    )
    Path(given.out).write_text(as_experiment(experiment, before, result.best, about))
    options = as_arguments(layout_options(before, result.best.config))
    print(f"\nwritten    {given.out}, which `gptjax train {given.out}` takes; the same as")
    print(f"           gptjax train {experiment} {options}\n")
    return result.best


def _row(name: str, num_bytes: int, time: object) -> tuple[str, ...]:
    return name, f"{num_bytes / 2**30:,.2f}", f"{time.least:,.4g}", f"{time.most:,.4g}"


def _tried(found: "Estimate", fitting: "list[Estimate]") -> str:
    """Changes that would make a run fit."""
    from gptjax.plan.report import columns
    from gptjax.plan.search import as_arguments, layout_options

    if not fitting:
        return (
            "tried: other meshes, remat and more parts; with none of them does it fit: give more "
            "devices, or a smaller model"
        )
    rows = [("it would fit with", "GiB, by formula", "seconds", "nothing overlaps")]
    for one in fitting:
        change = as_arguments(layout_options(found.config, one.config))
        rows.append(_row(change, one.memory.total, one.time))
    return "\n" + "\n".join(columns(rows, numbers=3))


def _within(found: "Estimate", budget: object, given: Plan) -> str:
    """For how much a budget is enough."""
    from gptjax.plan.report import columns
    from gptjax.plan.search import largest, within

    slow, fast = within(found, budget)
    lines = [
        f"\nwithin {budget}: {slow:.4g} to {fast:.4g} tokens of {found.config.name}, "
        f"--steps {slow // found.step_tokens} to {fast // found.step_tokens}"
    ]
    if given.search:
        tokens = found.config.steps * found.step_tokens
        sizes = largest(found.config, found.topology, budget, given.price)
        rows = [("GPT-3's size", "tokens within it", f"of {tokens:.3g}")]
        rows += [(name, f"{most:.4g}", f"{most / tokens:.1%}") for name, _, most in sizes]
        lines += columns(rows, numbers=2)
        enough = next((name for name, _, most in sizes if most >= tokens), "none")
        lines.append(f"the largest that sees all of them: {enough}")
    return "\n".join(lines)
