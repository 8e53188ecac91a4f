"""The state of a run. The only file that knows how a model (flax.nnx) becomes state and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from laser_jax.layers.embedding import Table, init_table
from laser_jax.optim import OptimConfig, dense_optimizer
from laser_jax.sharding import sharding


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
      tables: table name -> (rows, width).

    Attributes:
      optimizer: of the dense parameters. abstract_model: the model with shapes in place of arrays.
    """

    def __init__(
        self,
        make_model: Callable[[nnx.Rngs], nnx.Module],
        tables: dict[str, tuple[int, int]],
        optim: OptimConfig,
        mesh: Mesh,
    ):
        self._make_model, self._tables, self._optim, self._mesh = make_model, tables, optim, mesh
        self.optimizer = dense_optimizer(optim)
        self.abstract_model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        self._graphdef = nnx.split(self.abstract_model, nnx.Param)[0]

    def model(self, params: Any) -> nnx.Module:
        """The model with these parameters."""
        return nnx.merge(self._graphdef, params)

    def _create(self, key: jax.Array) -> TrainState:
        model_key, table_key = jax.random.split(key)
        _, params = nnx.split(self._make_model(nnx.Rngs(model_key)), nnx.Param)
        keys = jax.random.split(table_key, len(self._tables))
        tables = {
            name: init_table(k, rows, width, self._optim.table_std, self._optim.table_accumulator)
            for k, (name, (rows, width)) in zip(keys, sorted(self._tables.items()), strict=True)
        }
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), tables)

    def _shardings(self, abstract: TrainState) -> TrainState:
        dense, rows = sharding(self._mesh), sharding(self._mesh, "vocabulary")
        whole = jax.tree.map(lambda _: dense, abstract)
        return dataclasses.replace(whole, tables=jax.tree.map(lambda _: rows, abstract.tables))

    def create(self, seed: int) -> TrainState:
        """A fresh state, born with its shardings: never made in one place and moved to another."""
        key = jax.random.key(seed)
        shardings = self._shardings(jax.eval_shape(self._create, key))
        return jax.jit(self._create, out_shardings=shardings)(key)

    def abstract(self) -> TrainState:
        """Shapes, types and shardings of a state, for restoring into."""
        shapes = jax.eval_shape(self._create, jax.random.key(0))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._shardings(shapes)
        )


def num_parameters(state: TrainState) -> dict[str, int]:
    """Dense and table parameters apart."""
    return {
        "dense": sum(x.size for x in jax.tree.leaves(state.params)),
        "tables": sum(table.rows.size for table in state.tables.values()),
    }
