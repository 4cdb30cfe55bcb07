"""Where every tensor lies: from letters to axes of the mesh, and why a dimension is whole."""

import math
from collections.abc import Iterator, Mapping

from gptjax.plan import Plan
from gptjax.plan.liveness import kept
from gptjax.plan.memory import TABLES, axes_of, leaves, share, sizes_of
from gptjax.sharding import IN_USE, STORED


def explain(found: Plan) -> Iterator[tuple[str, ...]]:
    """A row for each parameter, as it is stored and as it is used, and for each activation that is
    kept: what it is, letters, where they lie, bytes of a device, and what is whole.
    """
    config, axes = found.config, found.axes
    sizes = sizes_of(config, axes)
    itemsize = 4 if config.model.compute_dtype == "float32" else 2
    yield ("tensor", "letters", "lies on", "MB of a device", "whole because")
    for leaf in leaves(config.model, config.tune):
        stored = 4 * share(leaf.letters, sizes, axes, STORED)
        yield (
            f"{leaf.path}, stored",
            leaf.letters,
            lies(leaf.letters, axes, STORED),
            f"{stored / 1e6:,.3f}",
            whole(leaf.letters, axes, STORED),
        )
        inner = leaf.letters.removeprefix("L") if leaf.path.startswith("blocks") else leaf.letters
        used = itemsize * share(inner, sizes, axes, IN_USE)
        yield (
            f"{leaf.path}, in use",
            inner,
            lies(inner, axes, IN_USE),
            f"{used / 1e6:,.3f}",
            whole(inner, axes, IN_USE),
        )
    for tensor in kept(config.model).saved:
        table = TABLES[tensor.place]
        each = tensor.factor * tensor.itemsize * share(tensor.letters, sizes, axes, table)
        yield (
            f"kept in a turn of the loop: {tensor.name}",
            tensor.letters,
            lies(tensor.letters, axes, table),
            f"{each / 1e6:,.3f}",
            whole(tensor.letters, axes, table),
        )


def lies(letters: str, axes: Mapping[str, int], table: dict) -> str:
    """Each letter that is split, with its axes and their sizes."""
    found = []
    for letter in letters:
        on = axes_of(letter, table)
        if math.prod(axes[axis] for axis in on) > 1:
            found.append(f"{letter} " + "+".join(f"{axis} {axes[axis]}" for axis in on))
    return ", ".join(found) or "every device"


def whole(letters: str, axes: Mapping[str, int], table: dict) -> str:
    """Of each letter that is not split, why."""
    reasons: dict[str, list[str]] = {}
    for letter in letters:
        on = axes_of(letter, table)
        if not on:
            reasons.setdefault("no axis splits it", []).append(letter)
        elif math.prod(axes[axis] for axis in on) == 1:
            reasons.setdefault(f"{' and '.join(on)} is 1", []).append(letter)
    return "; ".join(f"{''.join(letters)}: {reason}" for reason, letters in reasons.items())
