"""Parameters from a published checkpoint of the Llama family: a directory of safetensors with its config.json.

Every device reads only its own slices, through one map of names.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from lcx.experiment import Experiment
from lcx.registry import UserError
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

# config.json field -> the size it must equal.
SIZE_FIELDS = {
    "hidden_size": ("model.dim", lambda s: s.D),
    "num_hidden_layers": ("model.layers", lambda s: s.L),
    "num_attention_heads": ("model.heads", lambda s: s.H),
    "num_key_value_heads": ("model.kv_heads", lambda s: s.G),
    "head_dim": ("model.head_dim", lambda s: s.K),
    "vocab_size": ("model.vocab", lambda s: s.V),
}


class Tensors:
    """The tensors of a directory of safetensors files, read by slice."""

    def __init__(self, directory: pathlib.Path):
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"train.init_from={str(directory)!r} holds no .safetensors file")
        self._directory = directory
        self._files = [safe_open(file, framework="np") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  not a dict

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, fp32."""
        if name not in self._where:
            raise UserError(
                f"train.init_from={str(self._directory)!r} has no tensor {name!r}; it holds e.g. {next(iter(self._where))!r}"
            )
        return np.asarray(self._where[name].get_slice(name)[index]).astype(np.float32)

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


def check_config(directory: pathlib.Path, experiment: Experiment, plan: ModelPlan) -> None:
    """Compares the checkpoint's config.json with the model.

    Raises:
      UserError: naming every field that differs.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"train.init_from={str(directory)!r} holds no config.json")
    published, problems = json.loads(file.read_text()), []
    for name, (field, size) in SIZE_FIELDS.items():
        if published.get(name) is not None and published[name] != size(plan.sizes):
            problems.append(f"{field}={size(plan.sizes)} but {name}={published[name]}")
    if published.get("tie_word_embeddings", False) != experiment.model.tied:
        problems.append(
            f"model.tied={experiment.model.tied} but tie_word_embeddings={published.get('tie_word_embeddings', False)}"
        )
    if abs(published.get("rms_norm_eps", 1e-6) - experiment.model.norm_eps) > 1e-12:
        problems.append(f"model.norm_eps={experiment.model.norm_eps} but rms_norm_eps={published['rms_norm_eps']}")
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    theta = rope.get("rope_theta", published.get("rope_theta"))
    for kind in experiment.pattern:
        ours = getattr(kind.posenc_config, "theta", None)
        if theta is not None and ours is not None and float(theta) != ours:
            problems.append(f"posencs.rope.theta={ours} but rope_theta={theta}")
        scaling = rope.get("rope_type", "default")
        if getattr(kind.posenc_config, "scaling", "none") != {"default": "none"}.get(scaling, scaling):
            problems.append(f"posencs.rope.scaling={kind.posenc_config.scaling!r} but rope_type={scaling!r}")
    if problems:
        raise UserError(f"train.init_from={str(directory)!r} is another model: {'; '.join(dict.fromkeys(problems))}")


def load_params(directory: str, experiment: Experiment, plan: ModelPlan, mesh: Mesh) -> Any:
    """The parameters of `plan` from a published checkpoint, each device reading its own slices.

    Raises:
      UserError: the directory is missing or is another model, or holds tensors that the model has no place for.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"train.init_from={directory!r} is no directory")
    check_config(path, experiment, plan)
    tensors, period, used = Tensors(path), len(experiment.pattern), set()

    def load(key_path, info, shape, sharding):
        names = [key.key for key in key_path]
        source = LLAMA.get(names[-1])
        if source is None:
            raise UserError(f"train.init_from: parameter {names[-1]!r} has no counterpart in a Llama checkpoint")
        layers = range(names[1], plan.sizes.L, period) if names[0] == "stacks" else range(1)
        used.update(source.name.format(layer=layer) for layer in layers)
        if not info.dims.startswith("L"):
            read = lambda index: read_parameter(tensors, source, 0, info.dims, shape.shape, index)
        else:
            one = lambda layer, index: read_parameter(tensors, source, layer, info.layer_dims, shape.shape[1:], index)
            read = lambda index: np.stack([one(layer, index[1:]) for layer in layers[index[0]]])
        return jax.make_array_from_callback(shape.shape, sharding, read)

    params = jax.tree_util.tree_map_with_path(load, plan.infos, plan.shapes, parameter_shardings(plan.infos, mesh))
    ignored = {name for name in tensors.names - used if "rotary_emb" not in name}
    if experiment.model.tied:
        ignored.discard("lm_head.weight")
    if ignored:
        raise UserError(
            f"train.init_from={directory!r}: the model has no place for {sorted(ignored)[0]!r} and {len(ignored) - 1} more"
        )
    return params
