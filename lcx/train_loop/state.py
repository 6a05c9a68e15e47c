"""The state of a training run: made on the devices where it lives, placed by the parameters' logical dimensions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.dims import Sizes
from lcx.experiment import Experiment
from lcx.model import Model
from lcx.sharding import parameter_info, parameter_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
      params: nested dict of fp32 parameters.
      optimizer: optax state.
      step: int32, optimizer steps taken, skipped ones included.
      skipped: int32, steps skipped for a non-finite loss or gradient.
      bad_in_row: int32, skipped steps since the last good one.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    bad_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """The model without its parameters.

    Attributes:
      graph: of the NNX model; `nnx.merge(graph, params)` gives the model.
      infos: `ParameterInfo` of every parameter.
      shapes: ShapeDtypeStruct of every parameter.
      sizes: of the model.
    """

    graph: nnx.GraphDef
    infos: Any
    shapes: Any
    sizes: Sizes

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(shape.size for shape in jax.tree.leaves(self.shapes))


def create_model(experiment: Experiment, sizes: Sizes, key: jax.Array) -> Model:
    """The model with its parameters drawn from `key`."""
    return Model(experiment.model, sizes, experiment.pattern, experiment.block, rngs=nnx.Rngs(params=key))


def plan_model(experiment: Experiment, sizes: Sizes) -> ModelPlan:
    """The model's structure, shapes and logical dimensions; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: create_model(experiment, sizes, jax.random.key(0))))
    return ModelPlan(graph, parameter_info(state), nnx.to_pure_dict(state), sizes)


def init_params(experiment: Experiment, plan: ModelPlan, mesh: Mesh) -> Any:
    """Parameters drawn from `config.seed`, each device making its own part; the same numbers on every mesh."""

    def make():
        return nnx.to_pure_dict(nnx.state(create_model(experiment, plan.sizes, jax.random.key(experiment.run.seed))))

    return jax.jit(make, out_shardings=parameter_shardings(plan.infos, mesh))()


def state_shardings(optimizer: optax.GradientTransformation, plan: ModelPlan, mesh: Mesh) -> TrainState:
    """Where every leaf of the state lives: moments of a parameter's shape beside it, everything else replicated."""
    params, whole = parameter_shardings(plan.infos, mesh), NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree_util.tree_leaves_with_path(plan.shapes)
    homes = {path: (shape.shape, home) for (path, shape), home in zip(shapes, jax.tree.leaves(params), strict=True)}

    def place(path, leaf):
        # The path of a moment holds that of its parameter: behind it in (0, mu, *parameter) as adamw keeps them, before it in
        # (0, *parameter, 0, v) where each parameter has a state of its own. optax.tree.map_params sees only the former.
        parts = (path[i:j] for i in range(len(path)) for j in range(i + 1, len(path) + 1))
        return next((home for shape, home in (homes[p] for p in parts if p in homes) if shape == leaf.shape), whole)

    placed = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, plan.shapes))
    return TrainState(params=params, optimizer=placed, step=whole, skipped=whole, bad_in_row=whole)


def abstract_state(optimizer: optax.GradientTransformation, plan: ModelPlan, mesh: Mesh) -> TrainState:
    """Shapes and places of a state that does not exist, to compile for."""
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(plan.shapes, jax.eval_shape(optimizer.init, plan.shapes), counter, counter, counter)
    place = lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)
    return jax.tree.map(place, shapes, state_shardings(optimizer, plan, mesh))


def init_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state before step 0."""
    make = lambda params: TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0), jnp.int32(0))
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)
