"""Attention over rows that are split on the mesh axis context: keys and values travel in a ring.

Of n devices, device d has two halves of 1 / 2n of the row each: the d-th from the beginning and the
d-th from the end. So under a causal mask all have the same work, whichever keys are with them. Each
visit of a device's keys and values to another one gives an output and the logarithm of its sum of
exponentials, which are put together as they come (Liu et al. 2023, "Ring Attention with Blockwise
Transformers"); in the backward pass their gradients travel along. Which half sees which, and which
visits nothing comes of, is known before the program runs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from gptjax.attention.blocks import attend_blocks, blocks_gradients, delta_of
from gptjax.attention.mask import Mask
from gptjax.sharding import by_hand, parts

AXIS = "context"


# --- the order of positions ----------------------------------------------------------------------


def to_ring(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] in the order of positions -> in that of the ring, both split on the axis
    context.
    """
    return _reorder(x_BT, back=False)


def from_ring(x_BT: jax.Array) -> jax.Array:
    """The inverse of `to_ring`."""
    return _reorder(x_BT, back=True)


def _reorder(x_BT: jax.Array, *, back: bool) -> jax.Array:
    """In order, device d has the chunks 2d and 2d + 1 of 2n; in the ring, d and 2n - 1 - d, of
    which one is even too. Evens and odds are exchanged, each device sending one of each.
    """
    n = parts("T", x_BT.shape[1])

    def exchange(x_BT: jax.Array) -> jax.Array:
        first, second = jnp.split(x_BT, 2, axis=1)
        turned = jax.lax.axis_index(AXIS) % 2 == 1  # the odd chunk is the first one of the ring's
        if back:
            first, second = _swapped(turned, first, second)
        received = []
        for chunk, half in ((0, first), (1, second)):
            ways = [(d, _owner(2 * d + chunk, n)) for d in range(n)]
            ways = [(there, here) for here, there in ways] if back else ways
            received.append(jax.lax.ppermute(half, AXIS, ways))
        if not back:
            received = _swapped(turned, *received)
        return jnp.concatenate(received, axis=1)

    rows = PartitionSpec(None, AXIS)
    return jax.shard_map(
        exchange, in_specs=rows, out_specs=rows, axis_names={AXIS}, check_vma=False
    )(x_BT)


def _owner(chunk: int, n: int) -> int:
    return min(chunk, 2 * n - 1 - chunk)


def _swapped(turned: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, ...]:
    return jnp.where(turned, second, first), jnp.where(turned, first, second)


# --- who meets whom ------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What of a mask is known before the program runs."""

    window: int | None
    causal: bool


class Meetings(NamedTuple):
    """What is computed on each visit of a leg of the journey: some pairs of halves, on all devices
    together.
    """

    # [visits, devices, pairs, 3]: half of the queries, half of the keys, and how many chunks the
    # former is after the latter; where a device has no work in a pair, so many that nothing is seen
    table: np.ndarray
    whole: tuple[bool, ...]  # of each pair, whether the rule hides nothing on any visit and device


class Leg(NamedTuple):
    """A part of the journey that keys and values make from where they are at home."""

    hop: int  # how many devices on they go before each visit: 1 or -1
    meetings: Meetings


def journey(n: int, size: int, rule: Rule) -> tuple[Meetings, list[Leg]]:
    """What is computed at home, beside each half with itself; and the legs of the journey.

    Args:
      n: devices in the ring.
      size: positions of a chunk, of which each device has two.
      rule: visits of which no device has any work are not made.
    """
    pairs = [[_pairs(d, (d - shift) % n, n, size, rule) for d in range(n)] for shift in range(n)]
    pairs[0] = [[one for one in at_home if one[0] != one[1]] for at_home in pairs[0]]
    busy = [any(at_shift) for at_shift in pairs]
    ahead = next((shift for shift in range(1, n) if not busy[shift]), n)
    behind = [shift for shift in range(n - 1, ahead, -1) if busy[shift]]
    shifts = {1: range(1, ahead), -1: behind}
    return _meetings(pairs[:1], n, size, rule), [
        Leg(hop, _meetings([pairs[shift] for shift in leg], n, size, rule))
        for hop, leg in shifts.items()
        if leg
    ]


def _chunk(device: int, half: int, n: int) -> int:
    return 2 * n - 1 - device if half else device


def _pairs(d: int, keys_of: int, n: int, size: int, rule: Rule) -> list[tuple[int, int, int]]:
    """Halves of device d's queries and of another one's keys of which one sees something of the
    other.
    """
    found = []
    for ours, theirs in ((1, 0), (0, 0), (1, 1), (0, 1)):
        apart = _chunk(d, ours, n) - _chunk(keys_of, theirs, n)
        nearest = max(abs(apart) * size - (size - 1), 0)
        seen = apart >= 0 or not rule.causal
        if seen and (rule.window is None or nearest < rule.window):
            found.append((ours, theirs, apart))
    return found


def _meetings(pairs: list[list[list[tuple]]], n: int, size: int, rule: Rule) -> Meetings:
    most = max(len(on_device) for at_shift in pairs for on_device in at_shift)
    nothing = (0, 0, -2 * n)
    table = np.array(
        [
            [on_device + [nothing] * (most - len(on_device)) for on_device in at_shift]
            for at_shift in pairs
        ],
        np.int32,
    ).reshape(len(pairs), n, most, 3)
    apart = table[..., 2]
    furthest = (np.abs(apart) + 1) * size - 1
    hides = (apart <= 0) if rule.causal else np.zeros(apart.shape, bool)
    if rule.window is not None:
        hides = hides | (furthest >= rule.window)
    return Meetings(table, tuple(not hidden for hidden in hides.any(axis=(0, 1))))


# --- the journey ---------------------------------------------------------------------------------


def ring(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Mask) -> jax.Array:
    """Attention over rows in the order of the ring. Nothing is ever as long as the row, but for
    what is split.

    Each pair of halves is computed by the XLA blocks of `blocks.py`, on every platform. A kernel
    in their place has to return the logarithms of its sums, and its backward pass to take those of
    the whole row: the public functions of JAX's cuDNN and splash attention do the former at most.
    """
    return _ring(q_BTNH, k_BTKH, v_BTKH, mask.segments_BT, Rule(mask.window, mask.causal))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BTNH, k_BTKH, v_BTKH, segments_BT, rule: Rule) -> jax.Array:
    return _ring_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, rule)[0]


def _ring_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, rule: Rule):
    run = functools.partial(_forward, rule=rule, n=parts("T", k_BTKH.shape[1]))
    run = by_hand(run, k_BTKH.shape, "BTNH BTKH BTKH BT", "BTNH BTN")
    out_BTNH, log_sums_BTN = (
        checkpoint_name(x, "attention") for x in run(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    )
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, log_sums_BTN)


def _ring_backward(rule: Rule, kept, dout_BTNH: jax.Array):
    _, k_BTKH, *_ = kept
    run = functools.partial(_backward, rule=rule, n=parts("T", k_BTKH.shape[1]))
    run = by_hand(run, k_BTKH.shape, "BTNH BTKH BTKH BT BTNH BTN BTNH", "BTNH BTKH BTKH")
    return *run(*kept, dout_BTNH), None


_ring.defvjp(_ring_forward, _ring_backward)


class _Halves(NamedTuple):
    """Keys and values of a device, and the segments they are of: what travels."""

    k: jax.Array  # [2, B, K, S, H]
    v: jax.Array
    segments: jax.Array | None  # [2, B, S]


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, rule: Rule, n: int):
    K, H = k_BTKH.shape[2:]
    q = _queries(q_BTNH * H**-0.5, K)
    home = _Halves(_keys(k_BTKH), _keys(v_BTKH), _rows(segments_BT))
    at_home, legs = journey(n, q.shape[4], rule)
    travelling = [_sent(home, leg.hop, n) for leg in legs]  # while the device is at work for itself

    def visit(total, guests: _Halves, pairs: jax.Array, whole: tuple[bool, ...]):
        out, log_sums = total
        for (ours, theirs, apart), is_whole in zip(pairs, whole, strict=True):
            mask = _mask(rule, is_whole, home, guests, ours, theirs, apart)
            new = attend_blocks(
                _half(q, ours), _half(guests.k, theirs), _half(guests.v, theirs), mask
            )
            both, both_sums = _together(_half(out, ours), _half(log_sums, ours), *new)
            out, log_sums = _with_half(out, ours, both), _with_half(log_sums, ours, both_sums)
        return out, log_sums

    itself = Mask(rule.window, rule.causal, segments_BT=_folded(home.segments))
    total = tuple(
        x.reshape(2, -1, *x.shape[1:])
        for x in attend_blocks(_folded(q), _folded(home.k), _folded(home.v), itself)
    )
    total = visit(total, home, _ours(at_home)[0], at_home.whole)
    for (hop, meetings), guests in zip(legs, travelling, strict=True):
        pairs, whole = _ours(meetings), meetings.whole

        def turn(carry, pairs, hop=hop, whole=whole):
            total, guests = carry
            following = _sent(guests, hop, n)  # while these are worked with
            return (visit(total, guests, pairs, whole), following), None

        (total, guests), _ = jax.lax.scan(turn, (total, guests), pairs[:-1])
        total = visit(total, guests, pairs[-1], whole)
    out, log_sums = total
    return _joined(out).astype(q_BTNH.dtype), _joined(log_sums)[..., 0]


def _backward(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, log_sums_BTN, dout_BTNH, *, rule: Rule, n: int
):
    K, H = k_BTKH.shape[2:]
    q, out, dout = (_queries(x, K) for x in (q_BTNH * H**-0.5, out_BTNH, dout_BTNH))
    log_sums, delta = _queries(log_sums_BTN[..., None], K), delta_of(out, dout)
    home = _Halves(_keys(k_BTKH), _keys(v_BTKH), _rows(segments_BT))
    at_home, legs = journey(n, q.shape[4], rule)
    travelling = [_sent(home, leg.hop, n) for leg in legs]

    def visit(gradients, guests: _Halves, pairs: jax.Array, whole: tuple[bool, ...]):
        dq, dk, dv = gradients
        for (ours, theirs, apart), is_whole in zip(pairs, whole, strict=True):
            mask = _mask(rule, is_whole, home, guests, ours, theirs, apart)
            new = blocks_gradients(
                _half(q, ours),
                _half(guests.k, theirs),
                _half(guests.v, theirs),
                mask,
                *(_half(x, ours) for x in (log_sums, delta, dout)),
            )
            dq, dk, dv = (
                _with_half(x, half, _half(x, half) + more)
                for x, half, more in zip((dq, dk, dv), (ours, theirs, theirs), new, strict=True)
            )
        return dq, dk, dv

    itself = Mask(rule.window, rule.causal, segments_BT=_folded(home.segments))
    gradients = blocks_gradients(
        *(_folded(x) for x in (q, home.k, home.v)),
        itself,
        *(_folded(x) for x in (log_sums, delta, dout)),
    )
    gradients = tuple(x.reshape(2, -1, *x.shape[1:]) for x in gradients)
    dq, *dkv = visit(gradients, home, _ours(at_home)[0], at_home.whole)
    # What comes of the work at home travels on the first leg.
    starts, returned = [tuple(dkv), _zeros(home)], []
    for (hop, meetings), guests, dkv in zip(legs, travelling, starts, strict=False):
        pairs, whole = _ours(meetings), meetings.whole

        def turn(carry, pairs, hop=hop, whole=whole):
            dq, guests, dkv = carry
            # Both are on their way while these are worked with: gradients come from the last visit.
            following, dkv = _sent(guests, hop, n), _sent(dkv, hop, n)
            dq, *dkv = visit((dq, *dkv), guests, pairs, whole)
            return (dq, following, tuple(dkv)), None

        (dq, guests, dkv), _ = jax.lax.scan(turn, (dq, guests, dkv), pairs[:-1])
        dq, *dkv = visit((dq, *_sent(dkv, hop, n)), guests, pairs[-1], whole)
        returned.append(_sent(dkv, -hop * len(pairs), n))
    dk, dv = jax.tree.map(lambda *each: sum(each), *(returned or starts[:1]))
    dq_BTNH = _joined(dq * H**-0.5).astype(q_BTNH.dtype)
    return dq_BTNH, *(_joined(x[:, :, :, None]).astype(k_BTKH.dtype) for x in (dk, dv))


def _mask(rule, is_whole, home, guests, ours, theirs, apart) -> Mask:
    segments = {}
    if home.segments is not None:
        segments = {
            "segments_BT": _half(home.segments, ours),
            "segments_BS": _half(guests.segments, theirs),
        }
    if is_whole:
        return Mask(causal=False, **segments)
    return Mask(rule.window, rule.causal, offset=apart * guests.k.shape[3], **segments)


def _together(out, log_sums, new, new_log_sums) -> tuple[jax.Array, jax.Array]:
    """The output over two sets of keys from that over each, and the logarithm of their sums."""
    both = jnp.logaddexp(log_sums, new_log_sums)
    return out * jnp.exp(log_sums - both) + new * jnp.exp(new_log_sums - both), both


def _ours(meetings: Meetings) -> jax.Array:
    """The table of this device, [visits, pairs, 3]."""
    return jnp.asarray(meetings.table)[:, jax.lax.axis_index(AXIS)]


def _half(x: jax.Array, which: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, which, keepdims=False)


def _with_half(x: jax.Array, which: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, which, axis=0)


def _sent(tree, hop: int, n: int):
    """To the device that is so many further, from that as many before."""
    ways = [(device, (device + hop) % n) for device in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ways), tree)


def _zeros(halves: _Halves) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values before the first is added."""
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in (halves.k, halves.v))


def _queries(x_BTNH: jax.Array, K: int) -> jax.Array:
    """[B, T, N, H] -> [2, B, K, G, T / 2, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, 2, T // 2, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_queries`."""
    _, B, K, G, C, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, 2 * C, K * G, H)


def _keys(x_BTKH: jax.Array) -> jax.Array:
    """[B, T, K, H] -> [2, B, K, T / 2, H]."""
    return _queries(x_BTKH, x_BTKH.shape[2])[:, :, :, 0]


def _rows(segments_BT: jax.Array | None) -> jax.Array | None:
    """[B, T] -> [2, B, T / 2]."""
    if segments_BT is None:
        return None
    B, T = segments_BT.shape
    return segments_BT.reshape(B, 2, T // 2).swapaxes(0, 1)


def _folded(x: jax.Array | None) -> jax.Array | None:
    """Halves as if they were rows."""
    return None if x is None else x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
