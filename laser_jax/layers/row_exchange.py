"""Rows of tables that lie over all devices: fetched from their owners, and their gradients brought back.

Inside `shard_map`: every device holds a part of each table, and buckets of the rows it wants of every other. What
crosses the network are those unique rows and nothing of the size of the batch: once as ids, once as rows, once as
gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from laser_jax.layers.embedding import Table, gather_rows, renew_rows, update_rows
from laser_jax.layers.row_optimizers import RowOptimizer


@dataclasses.dataclass(frozen=True)
class RowExchange:
    """Between the devices of these mesh axes, N of them.

    Attributes:
      axes: names of the mesh axes. num_devices: N, their product.
    """

    axes: tuple[str, ...]
    num_devices: int

    def _transpose(self, buckets: jax.Array) -> jax.Array:
        """[N, size, ...]: bucket i of device j becomes bucket j of device i."""
        if self.num_devices == 1:
            return buckets
        return jax.lax.all_to_all(buckets, self.axes, split_axis=0, concat_axis=0)

    def sum(self, x: jax.Array) -> jax.Array:
        """Over all devices."""
        return x if self.num_devices == 1 else jax.lax.psum(x, self.axes)

    def requested(self, wanted: Int[Array, "devices size"]) -> Int[Array, "devices size"]:
        """What the others want of this device: its own rows, a bucket for each of them."""
        return self._transpose(wanted)

    def renew(
        self,
        table: Table,
        requested: Int[Array, "devices size"],
        fresh: Bool[Array, "devices size"],
        optimizer: RowOptimizer,
        std: float,
        step: jax.Array,
    ) -> Table:
        """This device's part of the table, with the rows renewed that any device marked as `fresh` among its wishes."""
        marked = self._transpose(fresh).reshape(-1)
        first_row = 0 if self.num_devices == 1 else jax.lax.axis_index(self.axes) * table.rows.shape[0]
        return renew_rows(table, requested.reshape(-1), marked, optimizer, std, step, first_row)

    def fetch(self, table: Table, requested: Int[Array, "devices size"]) -> Float[Array, "unique width"]:
        """Rows of all buckets that this device filled with its wishes, in their order; zeros where padding."""
        if self.num_devices == 1:
            return gather_rows(table, requested[0])
        rows = jax.vmap(lambda bucket: gather_rows(table, bucket))(requested)
        return self._transpose(rows).reshape(-1, rows.shape[-1])

    def update(
        self,
        table: Table,
        requested: Int[Array, "devices size"],
        gradients: Float[Array, "unique width"],
        optimizer: RowOptimizer,
        step: jax.Array,
    ) -> Table:
        """This device's part of the table after a step.

        Args:
          gradients: of the summed loss, with respect to the rows that `fetch` gave this device.
        """
        if self.num_devices == 1:
            return update_rows(table, requested[0], gradients, optimizer, step)
        arrived = self._transpose(gradients.reshape(*requested.shape, -1))
        local = table.rows.shape[0]
        rows, summed = sum_by_row(requested.reshape(-1), arrived.reshape(-1, arrived.shape[-1]), local)
        return update_rows(table, rows, summed, optimizer, step, first_row=jax.lax.axis_index(self.axes) * local)


def sum_by_row(
    rows: Int[Array, "n"], gradients: Float[Array, "n width"], num_rows: int
) -> tuple[Int[Array, "n"], Float[Array, "n width"]]:
    """Gradients of equal rows summed, since several devices may have met one row.

    Args:
      rows: entries >= num_rows are padding.

    Returns:
      Ascending distinct rows, padded from num_rows upwards, and their gradients.
    """
    n = rows.shape[0]
    rows = jnp.minimum(rows, num_rows)  # all padding is one row
    order = jnp.argsort(rows)
    rows = rows[order]
    first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    group = jnp.cumsum(first) - 1
    summed = jax.ops.segment_sum(gradients[order], group, num_segments=n, indices_are_sorted=True)
    # Group g's row; groups that there are not lie beyond the table, each on a place of its own.
    distinct = (num_rows + 1 + jnp.arange(n, dtype=rows.dtype)).at[group].set(rows)
    return distinct, summed
