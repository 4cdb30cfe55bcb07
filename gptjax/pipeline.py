"""A stand-in for the stack that runs it as a pipeline over the axis `pipe` of the mesh.

The L layers are cut into stages x rounds groups of neighbours. Stage p, which is the devices at
place p of the axis, runs groups p, p + stages, p + 2 stages, ... (Narayanan et al. 2021, "Efficient
Large-Scale Language Model Training on GPU Clusters", section 2.2), and the rows of a batch follow
each other through the stages as microbatches, once around for each round. Every tick, each stage
runs one group for one microbatch and hands the result to the next stage, the last to the first:
rounds x microbatches ticks in which a stage has work, and stages - 1 in which it has none. So more
rounds make the bubble smaller, at the price of more traffic between stages. Differentiation turns
the loop around: all microbatches go forward, then all go back.

Parameters are stored as always, stacked on L in the order of the layers, of which stage p keeps the
p-th part: checkpoints know of no pipeline. With one round that is what the stage needs. With more,
groups move to where they run at the start of each pass, and their gradients back at its end, in as
many permutations as there are rounds: once a pass and not once a microbatch, while another order
of the stack in memory would have to be known to whatever reads a parameter.

Embedding, head and loss are outside. The embedding is a look-up, which each stage makes for all
rows rather than to receive them. Of head and loss, which in a small model cost as much as many
layers, each stage does a part: when the rows have come around to the first stage for the last time,
they are scattered over the stages, as a further split of the rows of each device of `data` and
`fsdp`. Both lie on the other axes as the tables say.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from gptjax.config import Config, GPTConfig, MeshConfig
from gptjax.layers import between
from gptjax.model import Block, Params, Places, remat, scan_blocks
from gptjax.sharding import row_shards

# Primitives that parameters pass on their way from the stack into a product.
CHEAP = (
    "convert_element_type",
    "dynamic_slice",
    "gather",
    "sharding_constraint",
    "slice",
    "squeeze",
)


class Schedule(NamedTuple):
    """Which group and microbatch each stage has at each tick."""

    stages: int
    rounds: int
    microbatches: int

    @property
    def turn(self) -> int:
        """Ticks between two rounds: a microbatch must have come around, and the others begun."""
        return max(self.stages, self.microbatches)

    @property
    def ticks(self) -> int:
        """From the first group of the first microbatch to the last of the last one."""
        return (self.rounds - 1) * self.turn + self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time for which a stage has no work."""
        return 1 - self.rounds * self.microbatches / self.ticks

    def at(self, number: jax.Array | int) -> tuple[Any, Any, Any]:
        """The round and the microbatch of a stage at its `number`-th tick, counted from 0 when the
        first microbatch reaches it; and whether there is one. Both are in range in any case.
        """
        round_, microbatch = number // self.turn, number % self.turn
        there = (number >= 0) & (round_ < self.rounds) & (microbatch < self.microbatches)
        return (
            jnp.clip(round_, 0, self.rounds - 1),
            jnp.minimum(microbatch, self.microbatches - 1),
            there,
        )


def describe_pipeline(config: Config, data: int) -> str:
    """The schedule of a training step in a line.

    Args:
      data: devices along that axis, which a config may leave open.
    """
    mesh, num_layers = config.mesh, config.model.num_layers
    rows = config.batch_size // (data * mesh.fsdp * config.accumulate)
    plan = Schedule(mesh.pipe, mesh.rounds, mesh.microbatches or rows)
    per_group = num_layers // (plan.stages * plan.rounds)
    whole = (
        ""
        if rows % plan.stages == 0
        else (
            f"; {rows} rows do not divide by {plan.stages} stages, so each computes the whole head"
        )
    )
    return (
        f"{_count(plan.stages, 'stage')} x {_count(plan.rounds, 'round')} of "
        f"{_count(per_group, 'layer')}, {_count(plan.microbatches, 'microbatch')} of "
        f"{_count(rows // plan.microbatches, 'row')}, bubble {plan.bubble:.0%}{whole}"
    )


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural if number > 1 else ''}"


def stack_of(mesh: MeshConfig) -> Callable:
    """What runs the stack on a mesh, as `run` of `forward` and its like."""
    if mesh.pipe == 1:
        return scan_blocks
    return functools.partial(pipeline_blocks, rounds=mesh.rounds, microbatches=mesh.microbatches)


def pipeline_blocks(
    block: Block,
    blocks_L: Params,
    x_BTD: jax.Array,
    places: Places,
    config: GPTConfig,
    *,
    rounds: int = 1,
    microbatches: int | None = None,
) -> jax.Array:
    """Run the stack as a pipeline on the mesh that is set; as `scan_blocks` if it has one stage.

    Of what `config.remat` keeps for the backward pass, "full" keeps the inputs of groups instead of
    those of blocks.

    Args:
      block, blocks_L, x_BTD, places, config: as `scan_blocks` has them.
      rounds: groups of layers that each stage has.
      microbatches: parts of the rows of each device of `data` and `fsdp`; None: one row each.
    """
    shards, stages = row_shards(x_BTD.shape[0]), jax.sharding.get_abstract_mesh().shape["pipe"]
    if stages == 1:
        return scan_blocks(block, blocks_L, x_BTD, places, config)
    rows = x_BTD.shape[0] // shards
    plan = Schedule(stages, rounds, microbatches or rows)
    # Parts of them that the stages have in the end; where they do not divide, all have all.
    split = stages if rows % stages == 0 else 1

    def stage(blocks_L: Params, x_1BTD: jax.Array, places: Places) -> jax.Array:
        stream = _cut(x_1BTD[0], plan, shards)
        stream = _run_stage(block, _to_groups(blocks_L, plan), stream, places, config, plan)
        parts = stream.reshape(shards, split, rows // split, *x_BTD.shape[1:])
        if split == 1:
            first = jax.lax.axis_index("pipe") == 0
            return jax.lax.psum(jnp.where(first, parts, 0).astype(jnp.float32), "pipe")
        # The first stage sends each of the others a part. Not by an all-to-all, of which XLA makes
        # one of the rows of all devices, nor by a sum, which its CPU compiler lacks for bfloat16.
        mine = jnp.where(jax.lax.axis_index("pipe") == 0, parts[:, 0], 0)
        for other in range(1, stages):
            mine += jax.lax.ppermute(parts[:, other], "pipe", [(0, other)])  # elsewhere it is 0
        return mine[:, None]

    by_stage, whole = PartitionSpec("pipe"), PartitionSpec()
    # As one copy for each stage: their gradients are then added outside, in bfloat16 too.
    x_PBTD = jnp.broadcast_to(x_BTD, (stages, *x_BTD.shape))
    y = jax.shard_map(
        stage,
        in_specs=(by_stage, by_stage, whole),
        out_specs=PartitionSpec(None, "pipe") if split > 1 else whole,
        axis_names={"pipe"},
        check_vma=False,  # a ring over context is a shard_map of its own, and says nothing of pipe
    )(blocks_L, x_PBTD, places)
    return between(y.reshape(x_BTD.shape).astype(x_BTD.dtype), config)


def _run_stage(
    block: Block,
    groups: Params,
    stream: jax.Array,
    places: Places,
    config: GPTConfig,
    plan: Schedule,
) -> jax.Array:
    """All ticks of this stage.

    Args:
      groups: the parameters of this stage's groups, [rounds, layers of a group, ...].
      stream: all rows, [row shards, microbatches, rows of one, T, D]. In the first stage, a
        microbatch that comes around takes the place of what it was.
    """
    place = jax.lax.axis_index("pipe")
    around = [(i, (i + 1) % plan.stages) for i in range(plan.stages)]
    per_group = config.num_layers // (plan.stages * plan.rounds)
    run_group = _remat(functools.partial(_run_group, block, config), config.remat)

    def tick(carry: tuple[jax.Array, jax.Array], number: jax.Array):
        stream, came_BTD = carry
        round_, microbatch, _ = plan.at(number - place)
        x_BTD = jnp.where(place == 0, _rows_of(stream, microbatch), came_BTD)
        mine = jax.tree.map(
            lambda leaf: _rows_of(_cut(leaf, plan, stream.shape[0]), microbatch), places
        )
        layer = (round_ * plan.stages + place) * per_group
        y_BTD = run_group(groups, x_BTD, mine, round_, layer)
        came_BTD = jax.lax.ppermute(y_BTD, "pipe", around)
        _, microbatch, there = plan.at(number + 1 - plan.stages)
        kept = jnp.where((place == 0) & there, came_BTD, _rows_of(stream, microbatch))
        kept = kept.reshape(stream.shape[0], 1, *stream.shape[2:])
        return (jax.lax.dynamic_update_slice_in_dim(stream, kept, microbatch, 1), came_BTD), None

    came_BTD = jnp.zeros_like(_rows_of(stream, 0))
    return jax.lax.scan(tick, (stream, came_BTD), jnp.arange(plan.ticks))[0][0]


def _to_groups(blocks_L: Params, plan: Schedule) -> Params:
    """The groups of this stage, [rounds, layers of a group, ...], from its part of the stack.

    The part of stage p is groups p x rounds and those that follow. In turn k each stage sends the
    one of them that makes the stages that receive all different: with d = gcd(stages, rounds), the
    stages / d stages of one block send to those of one residue modulo d, and block b the residue
    that is b further on.
    """
    groups = jax.tree.map(lambda leaf: leaf.reshape(plan.rounds, -1, *leaf.shape[1:]), blocks_L)
    if plan.rounds == 1:
        return groups
    place = jax.lax.axis_index("pipe")
    block = plan.stages // math.gcd(plan.stages, plan.rounds)
    received, order = [], np.zeros((plan.stages, plan.rounds), np.int32)
    for turn in range(plan.rounds):
        sent = [(turn + stage // block) % plan.rounds for stage in range(plan.stages)]
        number = [stage * plan.rounds + one for stage, one in enumerate(sent)]
        pairs = [(stage, group % plan.stages) for stage, group in enumerate(number)]
        for (_, receiver), group in zip(pairs, number, strict=True):
            order[receiver, group // plan.stages] = turn
        which = jnp.asarray(sent)[place]
        received.append(
            jax.tree.map(
                lambda leaf, which=which, pairs=pairs: jax.lax.ppermute(leaf[which], "pipe", pairs),
                groups,
            )
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.asarray(order)[place]], *received)


def _run_group(
    block: Block,
    config: GPTConfig,
    groups: Params,
    x_BTD: jax.Array,
    places: Places,
    round_: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """The layers of one group, the first of which is `layer`."""
    blocks_L = jax.tree.map(lambda leaf: leaf[round_], groups)

    def named(params, x_BTD, places, index, window):
        return block(params, checkpoint_name(x_BTD, "block"), places, index, window)

    return scan_blocks(named, blocks_L, x_BTD, places, config, layer)


def _remat(function: Callable, policy: str) -> Callable:
    """As `model.remat` of each block, for a group, so that what a block keeps is kept, but none of
    its parameters: they would be kept for every microbatch.
    """
    if policy == "dots":
        return remat(function, policy)

    def keep(primitive: Any, *values: Any, **params: Any) -> bool:
        if policy == "full":
            return primitive.name == "name" and params["name"] == "block"
        return primitive.name not in CHEAP

    return jax.checkpoint(function, policy=keep, prevent_cse=False)


def _rows_of(stream: jax.Array, microbatch: jax.Array | int) -> jax.Array:
    """The rows of one microbatch: [row shards x rows of one, ...]."""
    rows = jax.lax.dynamic_index_in_dim(stream, microbatch, 1, keepdims=False)
    return rows.reshape(-1, *rows.shape[2:])


def _cut(x: jax.Array, plan: Schedule, shards: int) -> jax.Array:
    """Rows [B, ...] to [row shards, microbatches, rows of one, ...]: no row leaves its device."""
    return x.reshape(shards, plan.microbatches, -1, *x.shape[1:])
