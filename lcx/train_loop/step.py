"""One optimizer step, and one evaluation step: pure functions of the state and a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from lcx.context import SequenceContext
from lcx.experiment import Experiment
from lcx.parallel import layouts
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop.state import ModelPlan, TrainState, state_shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def in_stream_layout(batch: Batch, experiment: Experiment, mesh: Mesh) -> Batch:
    """The loader's contiguous arrays in the order of the stream; the only place where a step reorders tokens."""
    return {name: layouts.convert(x, "contiguous", experiment.layout, mesh=mesh) for name, x in batch.items()}


def context(batch: Batch, experiment: Experiment, mesh: Mesh) -> SequenceContext:
    """The context of a batch that stands in the stream's layout.

    A row of `data.packing=stream` is one document, and what pads the last row comes last: where no layer looks ahead nobody needs
    document ids, and attention is spared their comparison and a window with sinks most of its hops.
    """
    looks_ahead = any(kind.mixer.caps.bidirectional and not kind.mixer_config.causal for kind in experiment.pattern)
    one_document = experiment.data.packing == "stream" and not looks_ahead
    return SequenceContext(batch["positions_BS"], None if one_document else batch["segments_BS"], experiment.layout, mesh)


def parts(batch: Batch, count: int, rows: int) -> Batch:
    """B S arrays as `count` parts (count, B / count, S); every device contributes rows to every part."""

    def cut(x):
        b, s = x.shape
        return x.reshape(rows, count, b // rows // count, s).swapaxes(0, 1).reshape(count, b // count, s)

    return jax.tree.map(cut, batch)


def make_train_step(
    experiment: Experiment, plan: ModelPlan, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics). Gradients are those of the mean loss over all valid tokens of the batch."""
    rate = optimizers.learning_rate(experiment.optimizer, experiment.train.steps)
    rows = experiment.mesh_sizes["data"] * experiment.mesh_sizes["fsdp"]
    count = experiment.train.accumulate

    def sum_loss(params, batch):
        batch = in_stream_layout(batch, experiment, mesh)
        model = nnx.merge(plan.graph, params)
        ctx = context(batch, experiment, mesh)
        total, weight = model.loss(batch["tokens_BS"], batch["labels_BS"], batch["weights_BS"], ctx, objective=experiment.loss)
        layers = [(kind, len(range(i, plan.sizes.L, len(experiment.pattern)))) for i, kind in enumerate(experiment.pattern)]
        seen = lambda kind: kind.mixer.score_flops(kind.mixer_config, plan.sizes, ctx.in_layout(kind.layout_in(ctx.layout)))
        flops = sum(count * seen(kind) for kind, count in layers)
        return total, (weight, flops, jnp.sum(batch["segments_BS"] > 0, dtype=jnp.float32))

    grad_of = jax.value_and_grad(sum_loss, has_aux=True)

    def gradients(params, batch):
        if count == 1:
            (total, (weight, flops, tokens)), grads = grad_of(params, batch)
            return total, weight, flops, tokens, grads

        def add(carry, part):
            (total, (weight, flops, tokens)), grads = grad_of(params, part)
            return jax.tree.map(jnp.add, carry, (total, weight, flops, tokens, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return lax.scan(add, zeros, parts(batch, count, rows))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total, weight, flops, tokens, grads = gradients(state.params, batch)
        scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        loss, norm = total * scale, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(
            optimizers.clip(grads, norm, experiment.optimizer.clip_norm), state.optimizer, state.params
        )
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        bad = (~good).astype(jnp.int32)
        new = TrainState(
            params=keep(optax.apply_updates(state.params, updates), state.params),
            optimizer=keep(moments, state.optimizer),
            step=state.step + 1,
            skipped=state.skipped + bad,
            bad_in_row=(state.bad_in_row + bad) * bad,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            # The optimizer's own count, which a skipped step does not move.
            "learning_rate": jnp.asarray(rate(state.step - state.skipped), jnp.float32),
            "weight": weight,
            "score_flops": flops,
            "tokens": tokens,
            "skipped": new.skipped,
            "bad_in_row": new.bad_in_row,
        }
        return new, metrics

    return step


def compile_train_step(
    experiment: Experiment, plan: ModelPlan, optimizer: optax.GradientTransformation, mesh: Mesh, state: TrainState, batch: Batch
) -> jax.stages.Compiled:
    """The compiled step, which takes over the memory of the state it is given. Call under `jax.set_mesh(mesh)`.

    Args:
      state, batch: arrays, or ShapeDtypeStructs with their shardings.
    """
    places = state_shardings(optimizer, plan, mesh)
    step = make_train_step(experiment, plan, optimizer, mesh)
    return jax.jit(step, out_shardings=(places, None), donate_argnums=0).lower(state, batch).compile()


def compile_eval_step(experiment: Experiment, plan: ModelPlan, mesh: Mesh, params: Any, batch: Batch) -> jax.stages.Compiled:
    """The compiled evaluation step; arguments as for `compile_train_step`."""
    return jax.jit(make_eval_step(experiment, plan, mesh)).lower(params, batch).compile()


def position_bands(length: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) of `count` bands of position, the last the second half of the length, each before it half as long."""
    edges = [0, *(max(length >> shift, 1) for shift in range(count - 1, -1, -1))]
    return [(start, stop) for start, stop in zip(edges, edges[1:], strict=False) if stop > start]


def make_eval_step(experiment: Experiment, plan: ModelPlan, mesh: Mesh) -> Callable[[Any, Batch], Metrics]:
    """(params, batch) -> sums over the batch: loss and weight, by band of position, and answers where the task has them."""
    bands = position_bands(experiment.sequence.length, experiment.evaluate.buckets)

    def evaluate(params, batch: Batch) -> Metrics:
        batch = in_stream_layout(batch, experiment, mesh)
        model = nnx.merge(plan.graph, params)
        ctx = context(batch, experiment, mesh)
        weights_BS, positions_BS = batch["weights_BS"], batch["positions_BS"]
        _, weight, nll_BS, correct_BS = model.loss(
            batch["tokens_BS"], batch["labels_BS"], weights_BS, ctx, objective=experiment.loss, per_token=True
        )
        inside = [((positions_BS >= start) & (positions_BS < stop)) * weights_BS for start, stop in bands]
        sums = {
            "loss": jnp.sum(nll_BS * weights_BS),
            "weight": weight,
            "band_loss": jnp.stack([jnp.sum(nll_BS * w) for w in inside]),
            "band_weight": jnp.stack([jnp.sum(w) for w in inside]),
        }
        if "answers_BS" in batch:
            answers_BS, right_BS = batch["answers_BS"], correct_BS.astype(bool)
            has_answer_B = jnp.any(answers_BS, axis=1)
            sums["answer_rows"] = jnp.sum(has_answer_B)
            sums["exact_rows"] = jnp.sum(has_answer_B & jnp.all(right_BS | ~answers_BS, axis=1))
            sums["answer_tokens"] = jnp.sum(answers_BS)
            sums["right_tokens"] = jnp.sum(right_BS & answers_BS)
        return sums

    return evaluate
