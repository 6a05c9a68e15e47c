"""Parameters from a published checkpoint of the Llama family: a directory of safetensors with its config.json.

Every device reads only its own slices, through one map of names.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from lcx.dims import Sizes
from lcx.experiment import Experiment
from lcx.ffn.gated import Gated
from lcx.mixers.attention import Attention
from lcx.model import LayerKind
from lcx.ops.types import Mask
from lcx.posenc.rope import Rope
from lcx.registry import UserError, unknown
from lcx.sharding import parameter_shardings
from lcx.train_loop.state import ModelPlan


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
      name: of the tensor, with {layer}.
      dims: its dimensions as groups of the parameter's letters: "HK D" is a matrix of H*K rows and D columns.
    """

    name: str
    dims: str


LLAMA = {
    "embedding_VD": Source("model.embed_tokens.weight", "V D"),
    "norm_D": Source("model.norm.weight", "D"),
    "head_DV": Source("lm_head.weight", "V D"),
    "mixer_norm_D": Source("model.layers.{layer}.input_layernorm.weight", "D"),
    "ffn_norm_D": Source("model.layers.{layer}.post_attention_layernorm.weight", "D"),
    "query_DHK": Source("model.layers.{layer}.self_attn.q_proj.weight", "HK D"),
    "key_DGK": Source("model.layers.{layer}.self_attn.k_proj.weight", "GK D"),
    "value_DGK": Source("model.layers.{layer}.self_attn.v_proj.weight", "GK D"),
    "out_HKD": Source("model.layers.{layer}.self_attn.o_proj.weight", "D HK"),
    "query_norm_K": Source("model.layers.{layer}.self_attn.q_norm.weight", "K"),
    "key_norm_K": Source("model.layers.{layer}.self_attn.k_norm.weight", "K"),
    "gate_DF": Source("model.layers.{layer}.mlp.gate_proj.weight", "F D"),
    "up_DF": Source("model.layers.{layer}.mlp.up_proj.weight", "F D"),
    "down_FD": Source("model.layers.{layer}.mlp.down_proj.weight", "D F"),
}

# Letter of a dimension -> the field that sets its size.
FIELDS = {
    "D": "model.dim",
    "H": "model.heads",
    "G": "model.kv_heads",
    "K": "model.head_dim",
    "F": "ffns.gated.width",
    "V": "model.vocab",
    "L": "model.layers",
}
# config.json field -> the letter of the size it must equal. Only the last two may be left out: the tensors' shapes imply them.
SIZE_FIELDS = {
    "hidden_size": "D",
    "num_hidden_layers": "L",
    "num_attention_heads": "H",
    "vocab_size": "V",
    "num_key_value_heads": "G",
    "head_dim": "K",
}
IMPLIED = ("num_key_value_heads", "head_dim")
# model_type -> whether queries and keys are normed. In all else that we compute the three are one model.
ARCHITECTURES = {"llama": False, "mistral": False, "qwen3": True}
ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu2": "relu_squared"}
LLAMA3_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
LFS_POINTER = b"version https://git-lfs"
DTYPES = ("F64", "F32", "F16", "BF16")


class Tensors:
    """The tensors of a directory of safetensors files, read by slice."""

    def __init__(self, directory: pathlib.Path):
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"init_from={str(directory)!r} holds no .safetensors file")
        self._directory = directory
        self._files = [self._open(file) for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  not a dict

    @staticmethod
    def _open(file: pathlib.Path) -> Any:
        try:
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as error:
            hint = "; it is a git-lfs pointer: run `git lfs pull` there" if is_lfs_pointer(file) else ""
            raise UserError(f"init_from: {str(file)!r} is no readable safetensors file ({error}){hint}") from error

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            held = next(iter(self._where), "nothing")
            raise UserError(f"init_from={str(self._directory)!r} has no tensor {name!r}; it holds e.g. {held!r}")
        return self._where[name].get_slice(name)

    def check(self, name: str, source: Source, size: dict[str, int]) -> None:
        """Compares a whole tensor with what the model makes of it.

        Raises:
          UserError: another shape, or numbers that are not floating.
        """
        found, where = self._slice(name), f"init_from={str(self._directory)!r}: tensor {name!r}"
        groups = source.dims.split()
        shape, wanted = tuple(found.get_shape()), tuple(math.prod(size[dim] for dim in group) for group in groups)
        if shape != wanted:
            differ = [g for g, has, want in zip(groups, shape, wanted, strict=False) if has != want]
            fields = dict.fromkeys(FIELDS[dim] for dim in "".join(differ))
            change = f"; change {' or '.join(fields)}" if len(shape) == len(wanted) else ""
            raise UserError(f"{where} has shape {shape} and the model needs {wanted}{change}")
        if found.get_dtype() not in DTYPES:
            raise UserError(f"{where} holds {found.get_dtype()} (valid: {', '.join(DTYPES)})")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, fp32."""
        return np.asarray(self._slice(name)[index]).astype(np.float32)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return set(self._where)


def read_parameter(tensors: Tensors, source: Source, layer: int, dims: str, shape: tuple[int, ...], index: tuple[slice, ...]):
    """One device's slice of one layer's parameter.

    Args:
      dims: the parameter's letters within a layer.
      shape: its shape within a layer.
      index: the slice that is wanted.
    """
    size = dict(zip(dims, shape, strict=True))
    part = {dim: range(*s.indices(size[dim])) for dim, s in zip(dims, index, strict=True)}
    rows = []
    for group in source.dims.split():
        first, *inner = group
        # Only the leading letter of a group is ever sharded, so that a slice is one contiguous range.
        stride = int(np.prod([size[dim] for dim in inner], initial=1))
        rows.append(slice(part[first].start * stride, part[first].stop * stride))
    raw = tensors.read(source.name.format(layer=layer), tuple(rows))
    letters = source.dims.replace(" ", "")
    whole = raw.reshape([len(part[dim]) for dim in letters])
    return whole.transpose([letters.index(dim) for dim in dims])


def is_lfs_pointer(file: pathlib.Path) -> bool:
    """Whether git-lfs left the address of a file in its place."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
      UserError: it is missing or no JSON object.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"init_from={str(directory)!r} holds no config.json")
    try:
        published = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"init_from: {str(file)!r} is no JSON ({error})") from error
    if not isinstance(published, dict):
        raise UserError(f"init_from: {str(file)!r} is no JSON object but {type(published).__name__}")
    return published


def check_config(directory: pathlib.Path, experiment: Experiment, plan: ModelPlan) -> None:
    """Compares the checkpoint's config.json with the model. A field that it leaves out has Hugging Face's default.

    Raises:
      UserError: another architecture, or the fields that differ, every one.
    """
    published, origin = read_config(directory), f"init_from={str(directory)!r}"
    if published.get("model_type") not in ARCHITECTURES:
        raise unknown(f"{origin}: config.json's model_type", published.get("model_type"), ARCHITECTURES)
    for kind in experiment.pattern:
        if not issubclass(kind.mixer, Attention) or kind.posenc is not Rope or kind.ffn is not Gated:
            raise UserError(
                f"{origin} needs attention with posenc='rope' and ffn='gated'; layer {kind.name!r} has something else"
            )
    pairs = [*_model_pairs(experiment, plan.sizes, published)]
    for kind in experiment.pattern:
        pairs += _layer_pairs(kind, plan.sizes, published)
    problems = [f"{field}={ours} but {name}={theirs}" for field, ours, name, theirs in pairs if ours != theirs]
    if problems:
        raise UserError(f"{origin} is another model: {'; '.join(dict.fromkeys(problems))}")


def _model_pairs(experiment: Experiment, sizes: Sizes, published: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(our field, ours, its field, its) that must be equal, of the model as a whole."""
    model = experiment.model
    for name, dim in SIZE_FIELDS.items():
        if published.get(name) is not None or name not in IMPLIED:
            yield FIELDS[dim], getattr(sizes, dim), name, published.get(name)
    yield "model.tied", model.tied, "tie_word_embeddings", published.get("tie_word_embeddings", False)
    yield "model.norm_eps", model.norm_eps, "rms_norm_eps", published.get("rms_norm_eps", 1e-6)
    yield "model.logit_softcap", model.logit_softcap, f"{published['model_type']} logit_softcap", None
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        yield f"implemented {name}", False, name, bool(published.get(name))


def _layer_pairs(kind: LayerKind, sizes: Sizes, published: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(our field, ours, its field, its) that must be equal, of one layer kind."""
    model_type, layer = published["model_type"], f"layer {kind.name!r}:"
    mixer, rope, ffn = kind.mixer_config, kind.posenc_config, kind.ffn_config
    yield FIELDS["F"], kind.ffn.inner_width(ffn, sizes.D), "intermediate_size", published.get("intermediate_size")
    activation = published.get("hidden_act", "silu")
    yield "ffns.gated.activation", ffn.activation, "hidden_act", ACTIVATIONS.get(activation, activation)

    yield f"{layer} qk_norm", mixer.qk_norm, f"{model_type} qk_norm", ARCHITECTURES[model_type]
    yield f"{layer} causal", mixer.causal, f"{model_type} causal", True
    yield f"{layer} softcap", mixer.softcap, f"{model_type} softcap", None
    # Hugging Face's window W counts the token itself. Sink tokens are more to see only where a window hides some.
    width = published.get("sliding_window", 4096) if model_type == "mistral" else None
    left = Mask(window=mixer.window).left
    yield f"{layer} window's left", left, f"sliding_window={width}, left", None if width is None else width - 1
    if left is not None:
        yield f"{layer} sink_tokens", mixer.sink_tokens, f"{model_type} sink_tokens", 0

    scaling = published.get("rope_parameters") or published.get("rope_scaling") or {}
    both, rope_type = published | scaling, scaling.get("rope_type", scaling.get("type", "default"))
    yield "posencs.rope.theta", rope.theta, "rope_theta", both.get("rope_theta", 1e4)
    yield "posencs.rope.fraction", rope.fraction, "partial_rotary_factor", both.get("partial_rotary_factor", 1.0)
    yield "posencs.rope.interleaved", rope.interleaved, f"{model_type} interleaved", False
    yield "posencs.rope.scaling", rope.scaling, "rope_type", {"default": "none"}.get(rope_type, rope_type)
    if rope_type == rope.scaling == "llama3":
        for name, field in LLAMA3_SCALING.items():
            yield f"posencs.rope.{field}", getattr(rope, field), name, scaling.get(name)


class Pretrained:
    """A published checkpoint that is the model of an experiment. Making one reads headers only; `params` reads the tensors.

    Raises:
      UserError: the directory is missing or is another model, or holds tensors that the model has no place for.
    """

    def __init__(self, directory: str, experiment: Experiment, plan: ModelPlan):
        path = pathlib.Path(directory)
        if not path.is_dir():
            raise UserError(f"init_from={directory!r} is no directory")
        check_config(path, experiment, plan)
        self._tensors, self._plan, self._period = Tensors(path), plan, len(experiment.pattern)
        ignored = {name for name in self._tensors.names if "rotary_emb" not in name}
        if experiment.model.tied:
            ignored.discard("lm_head.weight")
        for (key_path, info), shape in zip(
            jax.tree_util.tree_leaves_with_path(plan.infos), jax.tree.leaves(plan.shapes), strict=True
        ):
            source, layers = self._source(key_path)
            size = dict(zip(info.layer_dims, shape.shape[-len(info.layer_dims) :], strict=True))
            for name in (source.name.format(layer=layer) for layer in layers):
                self._tensors.check(name, source, size)
                ignored.discard(name)
        if ignored:
            raise UserError(
                f"init_from={directory!r}: the model has no place for {sorted(ignored)[0]!r} and {len(ignored) - 1} more"
            )

    def _source(self, key_path: tuple[Any, ...]) -> tuple[Source, range]:
        """Where a parameter comes from, and from which layers."""
        names = [key.key for key in key_path]
        if names[-1] not in LLAMA:
            raise UserError(f"init_from: parameter {names[-1]!r} has no counterpart in a Llama checkpoint")
        layers = range(names[1], self._plan.sizes.L, self._period) if names[0] == "stacks" else range(1)
        return LLAMA[names[-1]], layers

    def params(self, mesh: Mesh) -> Any:
        """The parameters of the plan, each device reading its own slices."""

        def load(key_path, info, shape, sharding):
            source, layers = self._source(key_path)
            if not info.dims.startswith("L"):
                read = lambda index: read_parameter(self._tensors, source, 0, info.dims, shape.shape, index)
            else:
                per_layer = info.layer_dims, shape.shape[1:]
                one = lambda layer, index: read_parameter(self._tensors, source, layer, *per_layer, index)
                read = lambda index: np.stack([one(layer, index[1:]) for layer in layers[index[0]]])
            return jax.make_array_from_callback(shape.shape, sharding, read)

        shardings = parameter_shardings(self._plan.infos, mesh)
        return jax.tree_util.tree_map_with_path(load, self._plan.infos, self._plan.shapes, shardings)
