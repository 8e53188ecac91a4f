"""The state of a run. The only file that knows how a model (flax.nnx) becomes state and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laser_jax.features import FeatureConfig
from laser_jax.layers.embedding import Table, init_table
from laser_jax.optim import OptimConfig, dense_optimizer
from laser_jax.row_placement import padded_rows
from laser_jax.sharding import MeshConfig, dense_spec, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `step` batches were taken, which is also the position in the data."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    tables: dict[str, Table]


class StateFactory:
    """Makes states of one architecture, concrete or abstract, and the model that reads them.

    Args:
      make_model: builds the model from its random numbers.
      features: says which tables there are.
      split_from: dense parameters of at least so many elements are split over the mesh's `model` axis.
      steps: of the run; for who takes steps with optim.decay=TO_THE_END.

    Attributes:
      optimizer: of the dense parameters; row_optimizer: of table rows. abstract_model: the model with shapes in place
        of arrays. bags: see FeatureConfig.bags. specs: where each array of a state lies on the mesh.
    """

    def __init__(
        self,
        make_model: Callable[[nnx.Rngs], nnx.Module],
        features: FeatureConfig,
        optim: OptimConfig,
        mesh: Mesh,
        split_from: int = MeshConfig.split_from,
        steps: int | None = None,
    ):
        self._make_model, self._tables, self.optim, self.mesh = make_model, features.tables(), optim, mesh
        self.bags = features.bags()
        self.optimizer, self.row_optimizer = dense_optimizer(optim, steps), optim.row_optimizer()
        self.abstract_model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        self._graphdef = nnx.split(self.abstract_model, nnx.Param)[0]
        self._shapes = jax.eval_shape(self._create, jax.random.key(0))
        dense = jax.tree.map(lambda x: dense_spec(x.shape, mesh, split_from), self._shapes)
        self.specs = dataclasses.replace(dense, tables=jax.tree.map(lambda _: spec("rows"), self._shapes.tables))

    def model(self, params: Any) -> nnx.Module:
        """The model with these parameters."""
        return nnx.merge(self._graphdef, params)

    def _create(self, key: jax.Array) -> TrainState:
        model_key, table_key = jax.random.split(key)
        _, params = nnx.split(self._make_model(nnx.Rngs(model_key)), nnx.Param)
        keys = jax.random.split(table_key, len(self._tables))
        optim = self.optim
        tables = {
            name: init_table(k, padded_rows(rows), width, optim.table_std, self.row_optimizer, optim.table_dtype)
            for k, (name, (rows, width)) in zip(keys, sorted(self._tables.items()), strict=True)
        }
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), tables)

    @property
    def shardings(self) -> TrainState:
        """A state of shardings."""
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), self.specs, is_leaf=is_spec)

    def create(self, seed: int) -> TrainState:
        """A fresh state, born with its shardings: never made in one place and moved to another."""
        return jax.jit(self._create, out_shardings=self.shardings)(jax.random.key(seed))

    def abstract(self) -> TrainState:
        """Shapes, types and shardings of a state, for restoring into."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._shapes, self.shardings
        )

    @property
    def largest_bytes(self) -> int:
        """Of the largest array of a state, as far as it lies on this process's devices."""
        return max(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._shapes)) // jax.process_count()

    def num_parameters(self) -> dict[str, int]:
        """Dense and table parameters apart; without the rows that only pad tables."""
        return {
            "dense": sum(x.size for x in jax.tree.leaves(self._shapes.params)),
            "tables": sum(rows * width for rows, width in self._tables.values()),
        }
