"""The floating-point operations of a function, counted in what JAX traced of it."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr

from gptjax.config import GPTConfig


def count_flops(jaxpr: Jaxpr) -> Counter[str]:
    """FLOPs of matrix products on all devices together, by the name of the primitive; a loop
    counts as often as it turns.

    A kernel counts for every block that it has, also those that it passes over at run time, and
    NVIDIA's fused attention for half of the scores if it is causal.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total[name] += _product(equation)
        elif name.startswith("dot_product_attention"):
            total["attention"] += _fused_attention(equation)
        elif name == "cond":
            branches = [count_flops(branch.jaxpr) for branch in params["branches"]]
            total += max(branches, key=lambda one: sum(one.values()))
        else:
            times = _times(name, params)
            for inner in _inner(params):
                for kind, flops in count_flops(inner).items():
                    total["attention" if name == "pallas_call" else kind] += times * flops
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    """How often what is inside an equation runs, on all devices together."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _fused_attention(equation: Any) -> int:
    """Two products [T, H] x [H, S] forward, and five backward, of which one makes the scores
    again; over the keys of the window, or half of all if it is causal.
    """
    q, k = (variable.aval.shape for variable in equation.invars[:2])
    B, T, N, H = q
    products = 5 if "bwd" in equation.primitive.name else 2
    params, S = equation.params, k[1]
    window = params.get("sliding_window_length")
    keys = window or (S // 2 if "CAUSAL" in str(params.get("mask_type", "")) else S)
    return products * 2 * B * N * T * min(keys, S) * H


def executed_flops(model: GPTConfig, bubble: float = 0.0) -> float:
    """FLOPs of a token in training as they are done, by a formula: with what is computed again, and
    of attention only what its implementation does not pass over.

    Args:
      model: with nothing left to choose.
      bubble: the share of its time for which a stage of a pipeline computes what nobody needs.
    """
    size = model.sizes
    D, N, K, H, F, V, L, T = (size[letter] for letter in "DNKHFVLP")
    V = V if model.head == "lm" else size["C"]
    ffn = (3 if model.activation == "swiglu" else 2) * D * F
    block = 2 * D * (N + K) * H + ffn
    # The output of a block's last product is in no gradient, so it is not computed again.
    again = 2 * (block - D * F) if model.remat == "full" else 0
    keys = sum(_keys(model, window or T) for window in model.windows) / len(model.windows)
    layer = 6 * block + again + _products(model) * 2 * N * H * keys
    return L * layer / (1 - bubble) + 6 * V * D


def _keys(model: GPTConfig, window: int) -> float:
    """Keys that are multiplied with a query, on average."""
    T = model.context_size
    if model.attention == "xla":
        return T
    if model.attention == "cudnn":
        return T / 2 if window >= T and not model.bidirectional else min(window, T)
    block = max(128, -(-T // 16)) if model.attention == "blockwise" else math.gcd(T, 512)
    block = min(block, T)
    both = 2 if model.bidirectional else 1
    whole = T if model.bidirectional else (T + block) / 2
    return min(both * min(window, T) + block, whole)


def _products(model: GPTConfig) -> int:
    """Products of queries and keys, or of their like, forward and backward."""
    forward, backward = 2, 4 if model.attention == "xla" else 5
    if model.remat == "none":
        return forward + backward
    if model.remat == "dots" and model.attention in ("xla", "blockwise"):
        return forward + backward + (1 if model.attention == "xla" else 0)
    return 2 * forward + backward
