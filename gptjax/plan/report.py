"""A plan as text, and as JSON."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.pipeline import describe_pipeline
from gptjax.plan import Plan
from gptjax.plan.hlo import Collective
from gptjax.plan.memory import leaves
from gptjax.plan.roofline import ASSUMPTIONS, formula_flops, model_flops

MOST_LISTED = 12  # exchanges in the table; JSON has all


def summary(found: Plan) -> str:
    """The plan as a table for a terminal."""
    sections = [
        head(found),
        [*columns(memory_rows(found), numbers=2), verdict(found)],
        columns(_work_rows(found), numbers=1),
        _exchanges(found),
        columns(time_rows(found), numbers=1),
        columns(bounds(found), numbers=2),
        ["assumed:", *(f"- {one}" for one in ASSUMPTIONS)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def as_json(found: Plan) -> dict[str, Any]:
    """All figures of a plan, in bytes, FLOPs and seconds."""
    compiled, time = found.compiled, found.time
    limit = found.topology.chip.memory
    return {
        "estimate": "nothing was measured",
        "experiment": found.config.name,
        "topology": str(found.topology),
        "devices": found.topology.num_devices,
        "mesh": dict(found.axes),
        "layout": options(found),
        "attention": found.config.model.attention,
        "memory": {
            "kinds": found.memory.kinds(),
            "parts": [part._asdict() for part in found.memory.parts],
            "highest": found.memory.moment,
            "sum": found.memory.total,
            "compiler_peak": compiled and compiled.peak,
            "compiler_arguments": compiled and compiled.arguments,
            "compiler_padding": compiled and compiled.padding,
            "device": None if math.isinf(limit) else limit,
            "fits": found.margin >= 0,
        },
        "flops": {
            "model": model_flops(found.config),
            "formula": formula_flops(found.config, found.axes),
            "jaxpr": compiled and compiled.flops,
        },
        "bytes_moved": compiled and compiled.moved,
        "collectives": [one._asdict() for one in compiled.collectives] if compiled else [],
        "seconds": {
            "compute": time.compute,
            "memory": time.memory,
            "network": dict(time.network),
            "least": time.least,
            "most": time.most,
            "source": time.source,
            "compile": compiled and compiled.seconds,
        },
        "bounds": {
            name: {
                "mfu": found.mfu(seconds),
                "tokens_per_second": found.step_tokens / seconds,
                "days": found.days(seconds),
                "kilowatt_hours": found.energy(seconds),
                "money": found.money(seconds),
            }
            for name, seconds in (("best", time.least), ("worst", time.most))
        },
        "assumptions": [*ASSUMPTIONS],
    }


def options(found: Plan) -> dict[str, Any]:
    """The options of `train` that make the layout."""
    config, mesh = found.config, found.config.mesh
    chosen = {f"mesh.{axis}": size for axis, size in found.axes.items() if axis != "data"}
    if mesh.data is not None:
        chosen["mesh.data"] = mesh.data
    chosen |= {"accumulate": config.accumulate, "model.remat": config.model.remat}
    chosen["model.attention"] = config.model.attention
    if config.model.split_residual:
        chosen["model.split_residual"] = True
    return {name: value for name, value in chosen.items() if value != 1}


def head(found: Plan) -> list[str]:
    """What is planned, in a few lines."""
    config, topology = found.config, found.topology
    model = config.model
    number = sum(math.prod(leaf.shape) for leaf in leaves(model, config.tune))
    rows = found.axes["data"] * found.axes["fsdp"] * config.accumulate
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.axes.items() if size > 1)
    each = config.batch_size / rows
    pipe = []
    if found.axes["pipe"] > 1:
        pipe = [f"pipeline   {describe_pipeline(config, found.axes['data'])}"]
    return [
        f"{config.name} on {topology}: an estimate, nothing was measured",
        f"model      {number:,} parameters, {model.compute_dtype} compute, remat {model.remat}, "
        f"attention {model.attention} ({found.reason})",
        f"mesh       {mesh or 'one device'}: {topology.num_devices:,} devices",
        f"batch      {config.batch_size:,} rows of {model.context_size:,} tokens{parts}: "
        f"{each:g} rows at once for each of {found.axes['data'] * found.axes['fsdp']:,} groups",
        *pipe,
    ]


def memory_rows(found: Plan) -> list[tuple[str, ...]]:
    """Kind, its largest parts, bytes, and share."""
    total = found.memory.total
    unit, size = unit_of(total)
    rows = [("memory of a device", found.memory.moment, unit, "share")]
    for kind, num_bytes in found.memory.kinds().items():
        cells = f"{num_bytes / size:,.2f}", f"{num_bytes / total:.1%}"
        rows.append((kind, _largest(found, kind), *cells))
    rows.append(("sum, by formula", "", f"{total / size:,.2f}", ""))
    if found.compiled:
        peak = found.compiled.peak
        rows.append(("compiler's peak", "", f"{peak / size:,.2f}", f"sum {total / peak - 1:+.1%}"))
    return rows


def verdict(found: Plan) -> str:
    """Whether it fits, and by how much."""
    limit, left = found.topology.chip.memory, found.margin
    if math.isinf(limit):
        unit, size = unit_of(found.needed)
        return f"{found.needed / size:,.2f} {unit} of the machine's"
    of = f"{limit / 2**30:,.2f} GiB"
    if left < 0:
        return f"DOES NOT FIT: {-left / 2**30:,.2f} GiB more than the {of} there are"
    return f"fits: {left / 2**30:,.2f} GiB of {of} are left"


def _largest(found: Plan, kind: str) -> str:
    """The largest parts of a kind, by name."""
    named: dict[str, int] = {}
    for part in found.memory.parts:
        if part.kind == kind:
            name = f"{part.name} [{part.letters}]" if part.letters else part.name
            named[name] = named.get(name, 0) + part.num_bytes
    first = sorted(named, key=named.get, reverse=True)[:2]
    return ", ".join(first) if len(named) > 1 else ""


def _work_rows(found: Plan) -> list[tuple[str, str]]:
    compiled = found.compiled
    rows = [
        ("work of a step", "FLOPs"),
        ("of the model, as MFU counts them", f"{model_flops(found.config):.4g}"),
        ("done, by formula", f"{formula_flops(found.config, found.axes):.4g}"),
    ]
    if compiled:
        rows.append(
            ("done, counted in the traced step, kernels without skipping", f"{compiled.flops:.4g}")
        )
    if compiled and compiled.moved:
        rows.append(("bytes read and written by a device", f"{compiled.moved:.4g}"))
    return rows


def exchange_rows(found: Plan) -> list[tuple[str, ...]]:
    """The collectives that the compiler made, the largest first; those that are alike together."""
    if not found.compiled or not found.compiled.collectives:
        return []
    times: Counter[Collective] = Counter()
    for one in found.compiled.collectives:
        times[one._replace(count=1, group=(), op="")] += one.count
    rows = [("collective", "axes", "of", "from", "MB", "times", "")]
    for one, count in sorted(times.items(), key=lambda item: -item[0].num_bytes * item[1]):
        shape = f"{one.dtype}[{one.shape}]"
        mark = f"unexpected: {why}" if (why := unexpected(one, found)) else ""
        size = f"{one.num_bytes / 1e6:,.2f}"
        rows.append((one.kind, one.axis, shape, one.line, size, f"{count:,}", mark))
    return rows


def _exchanges(found: Plan) -> list[str]:
    rows = exchange_rows(found)
    lines = columns(rows[: MOST_LISTED + 1], numbers=0) if rows else []
    if len(rows) > MOST_LISTED + 1:
        lines.append(f"and {len(rows) - MOST_LISTED - 1:,} more, smaller: --html and --json")
    return lines


def unexpected(one: Collective, found: Plan) -> str:
    """What no layout asks for: why a collective should not be there, or nothing."""
    if one.num_bytes < 2**20:
        return ""
    if (
        one.kind == "all-gather"
        and one.dtype == "f32"
        and found.config.model.compute_dtype != "float32"
    ):
        return "parameters or activations are gathered in float32"
    # Along fsdp go what is looked up in tables and the terms of the unembedding's gradient.
    if one.kind == "all-to-all" and one.axis != "fsdp":
        return "a tensor changes the dimension that it is split on"
    return ""


def time_rows(found: Plan) -> list[tuple[str, str]]:
    """What a step spends its time on."""
    time = found.time
    source = "by the compiled step" if time.source == "compiler" else "by formula"
    rows = [("time of a step", "seconds"), ("compute", f"{time.compute:,.4g}")]
    if time.memory is not None:
        rows.append((f"memory, {source}", f"{time.memory:,.4g}"))
    for axis, seconds in sorted(time.network.items(), key=lambda item: -item[1]):
        rows.append((f"network along {axis}, {source}", f"{seconds:,.4g}"))
    return rows


def bounds(found: Plan) -> list[tuple[str, str, str]]:
    """What follows from it for the whole run, at best and if nothing overlaps."""
    limits = (found.time.least, found.time.most)
    run = f"days, {found.config.steps * found.step_tokens:.3g} tokens"
    rows = [
        ("bounds", "all overlaps", "nothing overlaps"),
        ("seconds of a step", *(f"{one:,.4g}" for one in limits)),
        ("MFU, all keys counted", *(f"{found.mfu(one):.1%}" for one in limits)),
        ("tokens a second", *(f"{found.step_tokens / one:,.0f}" for one in limits)),
        (run, *(f"{found.days(one):,.2f}" for one in limits)),
    ]
    if found.topology.chip.watts:
        rows.append(("megawatt-hours", *(f"{found.energy(one) / 1000:,.4g}" for one in limits)))
    if found.price:
        name = f"money, {found.price:g} a chip and hour"
        rows.append((name, *(f"{found.money(one):,.0f}" for one in limits)))
    return rows


def unit_of(num_bytes: float) -> tuple[str, int]:
    """The unit in which to say bytes of about that size."""
    return ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)


def columns(rows: Sequence[tuple[str, ...]], numbers: int) -> list[str]:
    """Cells under each other, of which so many at the right are of numbers."""
    return list(_columns(rows, numbers))


def _columns(rows: Sequence[tuple[str, ...]], numbers: int) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(widths) - numbers
    for row in rows:
        cells = [
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
