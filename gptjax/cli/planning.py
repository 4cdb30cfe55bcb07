"""The verb of hardware that is not there: `gptjax plan`."""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.config import Config, Count, Positive, refuse


@dataclass(frozen=True)
class Plan:
    """Estimate memory, speed and cost of FILE.py on hardware that need not be there."""

    # CHIP:SHAPE, such as v5p:8x8x8, v5e:256, h100:64 (GPUs), h100:8x8 (hosts x GPUs) or cpu:8
    topology: str | None = None
    slices: Count = 1  # so many of them, joined by the slower network between slices
    compile: bool = True  # with the compiler of that hardware; else all by formula, at once
    price: Positive | None = None  # of a chip for an hour: the money of the whole run is shown
    explain: bool = False  # say where each parameter and activation lies, and what is not split
    json: str | None = None  # a file for all figures
    html: str | None = None  # a file for the plan as a page
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def plan(experiment: str, given: Plan) -> None:
    """Print the plan; nothing of this machine but its processor is used."""
    refuse([*_problems(given)])
    _alone()
    from gptjax.plan import plan as make_plan
    from gptjax.plan.explain import explain
    from gptjax.plan.page import write_page
    from gptjax.plan.report import as_json, columns, summary
    from gptjax.plan.topologies import parse_topology
    from gptjax.rows import with_vocabulary
    from gptjax.tokenizer import make_tokenizer

    topology = parse_topology(given.topology, given.slices)
    _cpu_devices(topology.num_devices if topology.chip.platform == "cpu" else 1)
    config = given.config
    if config.model.vocab_size is None:
        model = with_vocabulary(config.model, make_tokenizer(config.data))
        config = dataclasses.replace(config, model=model)
    found = make_plan(config, topology, compiling=given.compile, price=given.price)
    print(summary(found))
    if given.explain:
        print("\n" + "\n".join(columns([*explain(found)], numbers=0)))
    if given.json:
        Path(given.json).write_text(json.dumps(as_json(found), indent=2) + "\n")
    if given.html:
        write_page(found, Path(given.html))


def _problems(given: Plan) -> Iterator[str]:
    if given.topology is None:
        yield "--topology is missing: give CHIP:SHAPE, such as --topology v5p:8x8x8"


def _alone() -> None:
    """The compilers of TPUs and GPUs are to look for none, and to bear another beside them."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        CUDA_VISIBLE_DEVICES="-1",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    )
    import jax

    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(number: int) -> None:
    """Virtual devices, unless the environment says how many there are."""
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", number)
