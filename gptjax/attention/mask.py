"""Which positions a query sees."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

# A score that no real one comes near, and whose exponential is 0; minus infinity would give NaN for
# a row that sees nothing.
UNSEEN = -1e30

Across = Literal["ring", "all_gather"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as a rule; no [T, S] array exists unless an implementation makes
    one.

    Without positions, query t sees key s iff s <= t and both are of one segment; those that come
    after as well if it is not `causal`. With positions, which a cache gives, it sees the keys whose
    position is from 0 to its own. In all cases no further away than `window` positions, its own
    included.
    """

    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    # How rows are split over the mesh axis context: "ring" has their positions in its own order.
    # None: they are not.
    across: Across | None = dataclasses.field(default=None, metadata={"static": True})
    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None  # of the keys; None: those of the queries
    # How many places the first query is after the first key; None: they are one place.
    offset: jax.Array | None = None
    positions_BT: jax.Array | None = None  # of the queries
    positions_BS: jax.Array | None = None  # of the keys; -1 where there is none

    def visible(self, queries: slice, keys: slice) -> jax.Array | None:
        """The rule as an array [B or 1, T, S], true where seen, for a block of queries and one of
        keys; None if all is seen.
        """
        if self.positions_BT is not None:
            back = self.positions_BT[:, queries, None] - self.positions_BS[:, None, keys]
            seen = (back >= 0) & (self.positions_BS[:, None, keys] >= 0)
            return seen if self.window is None else seen & (back < self.window)
        rules = []
        if self.causal or self.window is not None:
            back = (
                jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)
            )[None]
            back = back if self.offset is None else back + self.offset
            if self.causal:
                rules.append(back >= 0)
            if self.window is not None:
                rules.append((back if self.causal else jnp.abs(back)) < self.window)
        if self.segments_BT is not None:
            segments_BS = self.segments_BT if self.segments_BS is None else self.segments_BS
            rules.append(self.segments_BT[:, queries, None] == segments_BS[:, None, keys])
        seen = rules[0] if rules else None
        for rule in rules[1:]:
            seen = seen & rule
        return seen
