"""Layouts of a run on given hardware: all by formula, the promising ones by the compiler."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptjax.config import GPT3, Config, ConfigError, GPTConfig, MeshConfig, violations
from gptjax.model import resolve
from gptjax.plan import Plan, find_peak, plan
from gptjax.plan.memory import Memory, memory
from gptjax.plan.network import arrange, mesh_axes
from gptjax.plan.roofline import Time, step_time
from gptjax.plan.topologies import Topology

# The formula may be that much below the compiler's peak, so a layout is compiled only if it fits
# with it.
RESERVE = 1.1
MOST_TENSOR = 32
MOST_ACCUMULATED = 64


@dataclass(frozen=True)
class Layout:
    """A way to lay out a run, by formula."""

    config: Config
    memory: Memory
    time: Time

    @property
    def seconds(self) -> float:
        """By which layouts are compared: the mean of both bounds."""
        return (self.time.least + self.time.most) / 2


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    tried: int  # layouts, by formula
    front: Sequence[Layout]  # no other is both faster and smaller; the fastest first
    plans: Sequence[Plan]  # of those that were compiled, in that order
    best: Plan | None  # None: nothing fits


def seconds_of(found: Plan) -> float:
    return (found.time.least + found.time.most) / 2


def search(
    config: Config,
    topology: Topology,
    *,
    compiling: bool = True,
    price: float | None = None,
    most_compiled: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """The fastest layout that fits.

    Args:
      config: mesh, accumulate, remat and attention of it are tried anew, and nothing else.
      topology: the hardware.
      compiling: whether the promising ones are compiled, the fastest first, until none that is
        left could be faster than the best.
      price: of a chip for an hour.
      most_compiled: so many at most.
      say: is told how it goes.
    """
    layouts = [*try_all(config, topology)]
    fitting = sorted(
        (one for one in layouts if one.memory.total <= topology.chip.memory),
        key=lambda one: (one.seconds, one.memory.total),
    )
    say(f"{len(layouts):,} layouts by formula, of which {len(fitting):,} fit")
    front = pareto(fitting)
    if not compiling:
        first = [plan(front[0].config, topology, compiling=False, price=price)] if front else []
        return Found(len(layouts), front, (), first[0] if first else None)
    plans: list[Plan] = []
    safe = [one for one in fitting if one.memory.total * RESERVE <= topology.chip.memory]
    for layout in (safe or fitting)[: 16 * most_compiled]:
        best = min((seconds_of(one) for one in plans if one.margin >= 0), default=math.inf)
        if layout.seconds > best or len(plans) >= most_compiled:
            break
        if plans and _alike(layout, plans[-1]):
            continue
        plans.append(plan(layout.config, topology, price=price))
        say(f"compiled in {plans[-1].compiled.seconds:,.0f} s: {describe(layout.config)}")
    fit = [one for one in plans if one.margin >= 0]
    return Found(len(layouts), front, plans, min(fit, key=seconds_of, default=None))


def _alike(layout: Layout, last: Plan) -> bool:
    """Whether a layout differs from the one before in nothing but its parts, to no gain."""
    same = replace(layout.config, accumulate=last.config.accumulate) == last.config
    return same and layout.config.accumulate > last.config.accumulate


def try_all(config: Config, topology: Topology) -> Iterator[Layout]:
    """Every layout that the config's checks allow, by formula."""
    peak = find_peak(topology, config)
    if topology.slices > 1 and config.mesh.slices is None:
        config = replace(config, mesh=replace(config.mesh, slices=topology.slices))
    for mesh in meshes(config, topology.num_devices):
        laid = replace(config, mesh=mesh, accumulate=1)
        if violations(laid, topology.num_devices):
            continue
        try:
            grid = arrange(topology, mesh)
        except (ConfigError, ValueError, NotImplementedError):  # the torus has no such shape
            continue
        axes = mesh_axes(mesh, topology.num_devices)
        rows = config.batch_size // (axes["data"] * axes["fsdp"])
        parts = [n for n in range(1, min(rows, MOST_ACCUMULATED) + 1) if rows % n == 0]
        split = (
            axes["tensor"] > 1
            and config.model.context_size % (axes["tensor"] * axes["context"]) == 0
        )
        for model, number in itertools.product(_models(config.model, topology, split), parts):
            one = replace(laid, model=model, accumulate=number)
            if violations(one, topology.num_devices):
                continue
            time = step_time(one, axes, grid, topology, peak)
            yield Layout(one, memory(one, axes), time)


def _models(model: GPTConfig, topology: Topology, split: bool) -> Iterator[GPTConfig]:
    """What is kept for the backward pass, kernels, and the residual stream if it can be `split`."""
    platform = topology.chip.platform
    resolved = [resolve(replace(model, attention=one), platform)[0] for one in ("auto", "xla")]
    attentions = dict.fromkeys(one.attention for one in resolved)
    splits = (False, True) if split else (False,)
    for attention, remat, between in itertools.product(
        attentions, ("none", "dots", "full"), splits
    ):
        yield replace(resolved[0], attention=attention, remat=remat, split_residual=between)


def meshes(config: Config, num_devices: int) -> Iterator[MeshConfig]:
    """Every way to lay devices along data, fsdp and tensor that divides the model."""
    model = config.model
    sizes = model.sizes
    num_devices //= config.mesh.context * config.mesh.pipe
    shared = math.gcd(sizes["N"], sizes["K"], sizes["F"], model.vocab_multiple)
    for tensor in _divisors(math.gcd(shared, num_devices)):
        if tensor > MOST_TENSOR:
            continue
        for fsdp in _divisors(math.gcd(sizes["D"], num_devices // tensor)):
            data = num_devices // tensor // fsdp
            if config.batch_size % (data * fsdp) == 0:
                yield replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def pareto(layouts: Sequence[Layout]) -> list[Layout]:
    """Of layouts by time those that need less memory than all that are faster."""
    front, least = [], np.inf
    for one in layouts:
        if one.memory.total < least:
            front.append(one)
            least = one.memory.total
    return front


# --- what does not fit --------------------------------------------------------------------------


def remedies(found: Plan, number: int = 3) -> list[Plan]:
    """Changes that make a run fit, the fastest first, tried by formula.

    The formula is corrected by what the compiler said of the run as it is.
    """
    topology, factor = found.topology, found.needed / found.memory.total
    peak, fitting = found.peak_flops, []
    for config in changes(found.config, topology):
        axes = mesh_axes(config.mesh, topology.num_devices)
        need = memory(config, axes)
        if need.total * factor > topology.chip.memory:
            continue
        time = step_time(config, axes, arrange(topology, config.mesh), topology, peak)
        fitting.append(Layout(config, need, time))
    fitting.sort(key=lambda one: (len(differences(found.config, one.config)), one.seconds))
    return [
        plan(one.config, topology, compiling=False, price=found.price) for one in fitting[:number]
    ]


def changes(config: Config, topology: Topology) -> Iterator[Config]:
    """Configs that train the same model with less memory, by one change or by several."""
    remats = {"none": ("none", "dots", "full"), "dots": ("dots", "full"), "full": ("full",)}
    given = mesh_axes(config.mesh, topology.num_devices)
    for mesh, remat, times, split in itertools.product(
        meshes(config, topology.num_devices),
        remats[config.model.remat],
        (1, 2, 4, 8, 16),
        {config.model.split_residual, True},
    ):
        axes = mesh_axes(mesh, topology.num_devices)
        if axes["tensor"] not in (given["tensor"], 2 * given["tensor"], 4 * given["tensor"]):
            continue
        if split and axes["tensor"] == 1:
            continue
        one = replace(
            config,
            mesh=config.mesh if axes == given else mesh,
            model=replace(config.model, remat=remat, split_residual=split),
            accumulate=config.accumulate * times,
        )
        if one != config and not violations(one, topology.num_devices):
            yield one


def differences(before: Config, after: Config, prefix: str = "") -> dict[str, Any]:
    """The options of `train` by which one config becomes another."""
    found = {}
    for one in dataclasses.fields(before):
        old, new = getattr(before, one.name), getattr(after, one.name)
        if dataclasses.is_dataclass(old):
            found |= differences(old, new, f"{prefix}{one.name}.")
        elif old != new:
            found[prefix + one.name] = new
    return found


def describe(config: Config) -> str:
    """A layout in a line."""
    mesh, model = config.mesh, config.model
    axes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor", "context", "pipe")}
    said = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size and size > 1)
    parts = f"{config.accumulate} part{'s' if config.accumulate > 1 else ''}"
    split = ", split residual" if model.split_residual else ""
    return f"{said or 'one device'}, {parts}, remat {model.remat}, {model.attention}{split}"


# --- what comes of it ---------------------------------------------------------------------------

SETTLED = ("data.path", "model.vocab_size", "model.compute_dtype")  # which a plan fills in


def layout_options(before: Config, after: Config) -> dict[str, Any]:
    """The options of `train` by which an experiment has a layout."""
    found = differences(before, after)
    return {name: value for name, value in found.items() if name not in SETTLED}


def as_arguments(options: dict[str, Any]) -> str:
    """Options as they are typed."""
    return " ".join(_typed(name.replace("_", "-"), value) for name, value in options.items())


def _typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        section, _, option = name.rpartition(".")
        return f"--{section}.{'' if value else 'no-'}{option}"
    return f"--{name} {value}"


def as_experiment(selector: str, before: Config, found: Plan, about: str) -> str:
    """The layout as an experiment's file, which `train` takes: the same run, laid out so.

    Args:
      selector: of the experiment.
      before: what it returns.
      about: how the layout was found.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in layout_options(before, found.config).items():
        section, _, option = name.rpartition(".")
        sections.setdefault(section, {})[option] = value
    lines = [f"        {name}={value!r}," for name, value in sections.pop("", {}).items()]
    for section, values in sections.items():
        inner = ", ".join(f"{name}={value!r}" for name, value in values.items())
        lines.append(f"        {section}=replace(config.{section}, {inner}),")
    return "\n".join(
        [
            f'"""{found.config.name} laid out for {found.topology}.',
            "",
            about,
            '"""',
            "",
            "from dataclasses import replace",
            "",
            "from gptjax import Config, load_experiment",
            "",
            "",
            "def config() -> Config:",
            f"    config = load_experiment({selector!r})",
            "    return replace(",
            "        config,",
            *lines,
            "    )",
            "",
        ]
    )


@dataclass(frozen=True)
class Budget:
    """What a run may take."""

    amount: float
    unit: str  # "days", "MWh" or "money"

    def steps(self, found: Plan, seconds: float) -> int:
        """How many steps of so many seconds it is enough for."""
        one = replace(found, config=replace(found.config, steps=1))
        each = {
            "days": one.days(seconds),
            "MWh": (one.energy(seconds) or 0) / 1000,
            "money": one.money(seconds),
        }[self.unit]
        return int(self.amount / each) if each else 0

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.unit}" if self.unit != "money" else f"{self.amount:,g}"


def parse_budget(text: str, price: float | None, topology: Topology) -> Budget:
    """A budget by its amount and unit: 30days, 200MWh, or an amount of money, as in 50000.

    Raises:
      ConfigError: if it is none, or what it is counted in is not known.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*(days|MWh)?", text)
    if not match or not float(match[1]):
        raise ConfigError(
            f"budget {text!r}: give an amount of money, or days or megawatt-hours, as in 50000, "
            "30days or 200MWh"
        )
    if not match[2] and price is None:
        raise ConfigError(f"budget {text!r} is money: give --price of a chip for an hour too")
    if match[2] == "MWh" and topology.chip.watts is None:
        raise ConfigError(
            f"budget {text!r}: how much a {topology.chip.name} draws is not published: give money "
            "or days"
        )
    return Budget(float(match[1]), match[2] or "money")


def within(found: Plan, budget: Budget) -> tuple[int, int]:
    """Tokens for which a budget is enough: if nothing overlaps, and if everything does."""
    slow, fast = (
        budget.steps(found, seconds) * found.step_tokens
        for seconds in (found.time.most, found.time.least)
    )
    return slow, fast


def largest(
    config: Config, topology: Topology, budget: Budget, price: float | None
) -> list[tuple[str, Plan, int]]:
    """The sizes of GPT-3 for as many tokens as the experiment sees, the largest first: name, plan
    of the fastest layout by formula, and for how many tokens the budget is enough (the mean of both
    bounds).
    """
    found = []
    for name, size in reversed(GPT3.items()):
        shape = {field: getattr(size, field) for field in ("num_layers", "width", "num_heads")}
        model = replace(config.model, num_kv_heads=None, head_size=None, ffn_size=None, **shape)
        best = search(replace(config, model=model), topology, compiling=False, price=price).best
        if best is not None:
            found.append((name, best, sum(within(best, budget)) // 2))
    return found
