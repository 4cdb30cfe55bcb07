"""What a layer and the loss keep in memory, by letters: read off JAX's trace of a small model whose
sizes tell its letters apart, and true of any sizes.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AbstractMesh, AxisType

from gptjax.config import GPTConfig
from gptjax.data import Batch
from gptjax.model import init_params, weighted_loss
from gptjax.sharding import AXES

# Of the small model: no two letters have the same size. Q is a piece of T whose logits exist at
# once.
SIZES = {"B": 5, "T": 384, "D": 320, "N": 12, "K": 6, "G": 2, "H": 64, "F": 448, "V": 704, "C": 9}
PIECE = 192
TURNS = 4  # of the loop over layers

# What a compiler computes where it is read, so that the result itself is never in memory...
FUSED = set(
    """add sub mul div neg exp log tanh logistic erf rsqrt sqrt integer_pow pow max min select_n
    and or not eq ne lt le gt ge convert_element_type reduce_precision broadcast_in_dim reshape
    squeeze expand_dims transpose iota name copy stop_gradient sharding_constraint square
    clamp sign abs is_finite slice dynamic_slice exp2 log1p mul_any add_any pbroadcast""".split()
)
# ... and of these also where a matrix product reads it.
LAYOUT = set(
    """convert_element_type reduce_precision broadcast_in_dim reshape squeeze expand_dims transpose
    name copy stop_gradient sharding_constraint slice dynamic_slice""".split()
)
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map"}  # fmt: skip

# Bytes of a tensor on one device: its letters, each with the factor that its size has of the
# letter's, and the bytes of a number.
Measure = Callable[["Tensor"], float]


class Tensor(NamedTuple):
    """A tensor by its letters."""

    letters: str
    factor: float  # of the product of the letters' sizes: less than 1 for a part of a dimension
    itemsize: int
    name: str = ""
    place: str = "in use"  # or "stored", as a parameter is kept, or "between" blocks


@dataclass
class Trace:
    """Operations in their order, on tensors that are numbered."""

    tensors: list[Tensor] = field(default_factory=list)
    # name, numbers of what it reads, of what it makes, and what runs inside it
    operations: list[tuple[str, list[int], list[int], "Trace | None"]] = field(default_factory=list)
    given: set[int] = field(default_factory=set)  # in memory whatever happens here
    made: set[int] = field(default_factory=set)  # what it returns

    def most(self, measure: Measure) -> float:
        """Bytes that its tensors need at once, at most, besides those that it was given and that
        it returns.
        """
        last, virtual = self._uses
        ends: dict[int, list[int]] = {}
        for number, place in last.items():
            ends.setdefault(place, []).append(number)
        counted = {
            number
            for _, _, made, _ in self.operations
            for number in made
            if number not in virtual and number not in self.given and number not in self.made
        }
        now = most = 0.0
        for place, (_, _, made, inner) in enumerate(self.operations):
            now += sum(measure(self.tensors[one]) for one in made if one in counted)
            most = max(most, now + (inner.most(measure) if inner else 0))
            for number in ends.get(place, ()):
                if number in counted:
                    now -= measure(self.tensors[number])
        return most

    def moved(self, measure: Measure) -> float:
        """Bytes that are read and written: each tensor once where it is made, and once by each
        operation that is not fused with others, or by all that are.
        """
        _, virtual = self._uses
        readers: dict[int, set[Any]] = {}
        for place, (name, read, _, _) in enumerate(self.operations):
            for number in read:
                readers.setdefault(number, set()).add("fused" if name in FUSED else place)
        total = sum(
            measure(self.tensors[number]) * len(readers.get(number, ()))
            for number in range(len(self.tensors))
            if number not in virtual
        )
        total += sum(
            measure(self.tensors[number])
            for _, _, made, _ in self.operations
            for number in made
            if number not in virtual
        )
        return total + sum(inner.moved(measure) for *_, inner in self.operations if inner)

    @functools.cached_property
    def _uses(self) -> tuple[dict[int, int], set[int]]:
        """The last operation that reads each tensor, and the tensors that are never in memory."""
        readers: dict[int, list[str]] = {}
        makers: dict[int, tuple[str, list[int]]] = {}
        last: dict[int, int] = {}
        for place, (name, read, made, _) in enumerate(self.operations):
            for number in read:
                readers.setdefault(number, []).append(name)
                last[number] = place
            for number in made:
                makers[number] = (name, read)
                last.setdefault(number, place)
        virtual = {
            number
            for number, (name, _) in makers.items()
            if name in FUSED
            and number not in self.made
            and not (name == "sharding_constraint" and _is_weight(self.tensors[number]))
            and (
                name in LAYOUT
                or all(one in FUSED or one.startswith("reduce") for one in readers.get(number, ()))
            )
        }
        for _, read, made, _ in reversed(self.operations):
            for number in made:
                if number in virtual:  # what it is computed from is there as long as it is read
                    for source in read:
                        last[source] = max(last[source], last[number])
        return last, virtual


class Kept(NamedTuple):
    """What a model keeps while it trains, by letters."""

    saved: tuple[Tensor, ...]  # by each turn of the loop over layers, for the backward pass
    forward: Trace  # a turn of that loop
    backward: Trace
    loss: Trace  # a piece of it


def kept(model: GPTConfig) -> Kept:
    """What a model keeps for the backward pass, and what it needs besides.

    Args:
      model: with a compute dtype and an attention.
    """
    return _kept(_small(model), model.attention in ("cudnn", "splash"))


@functools.lru_cache(maxsize=64)
def _kept(small: GPTConfig, fused: bool) -> Kept:
    params = jax.eval_shape(functools.partial(init_params, small), jax.random.key(0))
    shape = (SIZES["B"], SIZES["T"])
    batch = Batch(
        *[
            jax.ShapeDtypeStruct(shape, np.float32 if name == "weights_BT" else np.int32)
            for name in Batch._fields
        ]
    )
    gradients = jax.value_and_grad(lambda params, batch: weighted_loss(params, batch, small))
    # One device: what moves a parameter to where it is used then stands in the trace.
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(gradients)(params, batch).jaxpr
    loops = [one for one in _inlined(jaxpr) if one.primitive.name == "scan"]
    forward = next(one for one in loops if one.params["length"] == TURNS)
    backward = next(one for one in loops if one.params["length"] == TURNS and one.params["reverse"])
    loss = [one for one in loops if one.params["length"] == SIZES["T"] // PIECE]
    sizes = _letters(small)
    return Kept(
        tuple(_saved(forward, sizes, fused, small)),
        _trace(forward.params["jaxpr"].jaxpr, sizes, fused),
        _trace(backward.params["jaxpr"].jaxpr, sizes, fused),
        _trace(loss[0].params["jaxpr"].jaxpr, sizes, fused) if loss else Trace(),
    )


def _small(model: GPTConfig) -> GPTConfig:
    """The same model with the sizes above. What a fused kernel keeps is what `blockwise` does."""
    grouped = model.num_kv_heads not in (None, model.num_heads)
    return replace(
        model,
        vocab_size=SIZES["V"] - 1,
        vocab_multiple=SIZES["V"],
        context_size=SIZES["T"],
        num_layers=TURNS * len(model.windows),
        width=SIZES["D"],
        num_heads=SIZES["N"] if grouped else SIZES["K"],
        num_kv_heads=SIZES["K"],
        head_size=SIZES["H"],
        ffn_size=SIZES["F"],
        num_labels=SIZES["C"] if model.head in ("label", "labels") else None,
        window=None if model.window is None else 96,
        attention="blockwise" if model.attention in ("cudnn", "splash") else model.attention,
        loss_piece=PIECE,
    )


def _letters(small: GPTConfig) -> dict[int, str]:
    sizes = {size: letter for letter, size in SIZES.items()}
    if small.num_heads == small.num_kv_heads:
        sizes[SIZES["K"]] = "N"
    return sizes | {PIECE: "Q", 1: ""}


def _saved(loop: Any, sizes: dict[int, str], fused: bool, model: GPTConfig) -> Iterator[Tensor]:
    """What the loop over layers stacks up, turn by turn."""
    remat, split = model.remat, model.split_residual
    body, carried = loop.params["jaxpr"].jaxpr, loop.params["num_carry"]
    makers = {made: one for one in body.eqns for made in one.outvars}
    for stacked, each in zip(loop.outvars[carried:], body.outvars[carried:], strict=True):
        maker = makers.get(each)
        if fused and remat == "dots" and _is_named(maker, makers):
            continue  # a fused kernel's results have no name by which they could be kept
        place = str(maker.source_info.name_stack).rpartition("/")[2] if maker else "input"
        tensor = _tensor(stacked.aval.shape[1:], stacked.aval.dtype.itemsize, sizes, place)
        between = tensor.letters == "BTD" and split
        yield tensor._replace(place="between") if between else tensor


def _is_named(maker: Any, makers: dict[Any, Any]) -> bool:
    """Whether a tensor is one that a policy finds by its name."""
    while maker is not None and maker.primitive.name == "reduce_precision":
        maker = makers.get(maker.invars[0])
    return maker is not None and maker.primitive.name == "name"


def _tensor(shape: tuple[int, ...], itemsize: int, sizes: dict[int, str], name: str = "") -> Tensor:
    letters, factor = "", 1.0
    for size in shape:
        if size in sizes:
            letters += sizes[size]
        elif size < SIZES["T"] and size >= 64:  # a block of positions
            letters, factor = letters + "T", factor * size / SIZES["T"]
        else:
            factor *= size
    return Tensor(letters, factor, itemsize, name)


def _inlined(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation, also of the functions that are called."""
    for one in jaxpr.eqns:
        if one.primitive.name in CALLS and (inner := _called(one)) is not None:
            yield from _inlined(inner)
        else:
            yield one


def _called(equation: Any) -> Jaxpr | None:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return getattr(equation.params[name], "jaxpr", equation.params[name])
    return None


def _trace(jaxpr: Jaxpr, sizes: dict[int, str], fused: bool) -> Trace:
    trace, known = Trace(), {}

    def number_of(variable: Any) -> int | None:
        if isinstance(variable, Literal):
            return None
        if variable not in known:
            shape = getattr(variable.aval, "shape", ())
            itemsize = getattr(variable.aval.dtype, "itemsize", 4)
            tensor = _tensor(shape, itemsize, sizes)
            if fused and tensor.letters.count("T") > 1:  # the kernel's scores are never in memory
                tensor = tensor._replace(factor=0.0)
            known[variable] = len(trace.tensors)
            trace.tensors.append(tensor)
        return known[variable]

    def add(jaxpr: Jaxpr) -> None:
        for one in jaxpr.eqns:
            inner = _called(one) if one.primitive.name in CALLS else None
            if inner is not None:
                for outer, variable in zip(one.invars, inner.invars, strict=True):
                    known[variable] = number_of(outer)
                add(inner)
                for outer, variable in zip(one.outvars, inner.outvars, strict=True):
                    number = number_of(variable)
                    if number is not None:
                        known[outer] = number
                continue
            read = [number for one in one.invars if (number := number_of(one)) is not None]
            loop = one.primitive.name in ("scan", "while")
            body = (
                _trace(one.params["jaxpr"].jaxpr, sizes, fused)
                if loop and "jaxpr" in one.params
                else None
            )
            made = [number_of(variable) for variable in one.outvars]
            if one.primitive.name == "sharding_constraint":
                _lies(trace, one, made[0])
            trace.operations.append((one.primitive.name, read, made, body))

    for variable in (*jaxpr.invars, *jaxpr.constvars):
        trace.given.add(number_of(variable))
    add(jaxpr)
    trace.made = {number_of(variable) for variable in jaxpr.outvars} - {None}
    return trace


def _lies(trace: Trace, constraint: Any, number: int) -> None:
    """Note that a tensor is brought to where a parameter is kept, or to where it is between
    blocks.
    """
    tensor = trace.tensors[number]
    axes = [
        {one} if isinstance(one, str) else {*(one or ())}
        for one in constraint.params["sharding"].spec
    ]
    if not {*tensor.letters} & {*"BT"} and any("fsdp" in one for one in axes):
        trace.tensors[number] = tensor._replace(place="stored")
    elif any({"context", "tensor"} <= one for one in axes):
        trace.tensors[number] = tensor._replace(place="between")


def _is_weight(tensor: Tensor) -> bool:
    return not {*tensor.letters} & {*"BTQ"} and len(tensor.letters) > 1
