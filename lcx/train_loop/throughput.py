"""Tokens per second, model FLOPs and hardware FLOPs of the steps between two log lines."""

import dataclasses
import time

import jax
from jax.sharding import Mesh

from lcx.experiment import Experiment
from lcx.planning.targets import peak_flops
from lcx.train_loop.optimizer import label
from lcx.train_loop.state import ModelPlan


def matmul_parameters(plan: ModelPlan, tied: bool) -> tuple[int, int]:
    """(parameters of the layers, parameters of the head) that multiply every token; an embedding table is only looked up."""
    layers = head = 0
    for info, shape in zip(jax.tree.leaves(plan.infos), jax.tree.leaves(plan.shapes), strict=True):
        if label(info) == "matrix":
            layers += shape.size
        elif info.dims == "DV" or (info.dims == "VD" and tied):
            head += shape.size
    return layers, head


@dataclasses.dataclass
class Throughput:
    """Counts tokens and score FLOPs, and divides by the time since the last line.

    MFU counts what the model needs: 6 FLOPs per parameter and token, and three times the forward scores of the mask area.
    HFU also counts what this program computes again: the scores once more inside the attention backward, the layers' forward
    under rematerialisation (and its scores unless the attention output was kept).
    """

    experiment: Experiment
    plan: ModelPlan
    mesh: Mesh

    def __post_init__(self):
        self._layers, self._head = matmul_parameters(self.plan, self.experiment.model.tied)
        peak = peak_flops(self.mesh.devices.flat[0])
        self._peak = peak and peak * self.mesh.size
        self.start()

    def start(self) -> None:
        """Starts the clock; whatever came before (compilation, evaluation) does not count."""
        self._since, self._steps, self._tokens, self._score_flops = time.perf_counter(), 0, 0.0, 0.0

    def add(self, tokens: float, score_flops: float) -> None:
        """One finished step: its tokens, padding not counted, and the forward FLOPs of its attention scores."""
        self._steps += 1
        self._tokens += tokens
        self._score_flops += score_flops

    def line(self) -> dict[str, float]:
        """tokens_per_second, step_seconds and, on known devices, mfu and hfu since `start`; then starts again."""
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._since
        tokens = self._tokens
        found = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / self._steps}
        if self._peak:
            remat = self.experiment.block.remat
            model = 6 * (self._layers + self._head) * tokens + 3 * self._score_flops
            again = 0.5 * self._score_flops
            if remat != "none":
                again += 2 * self._layers * tokens
            if remat == "minimal":
                again += self._score_flops
            found |= {"mfu": model / seconds / self._peak, "hfu": (model + again) / seconds / self._peak}
        self.start()
        return found
