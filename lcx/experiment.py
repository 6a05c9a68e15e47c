"""One experiment: the config resolved into typed blocks, checked as a whole, at full scale or in rehearsal."""

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
from flax import nnx

from lcx import block, config, mesh, model, registry, remat
from lcx.data import load_source
from lcx.data.config import DataConfig
from lcx.dims import Sizes
from lcx.ffn import FFNS
from lcx.mixers import MIXERS
from lcx.parallel import cyclic, layouts
from lcx.posenc import POSENCS
from lcx.posenc.rope import Rope
from lcx.ranges import RANGES
from lcx.registry import UserError
from lcx.train_loop import optimizer, settings
from pallas_kernels import KERNELS

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run needs to know, typed.

    Attributes:
      run, sequence, model, block, loss, data, optimizer, train, evaluate, checkpoint, track: the config's blocks.
      mesh_sizes: devices along each mesh axis, with -1 resolved.
      layout: of the token stream, resolved.
      pattern: the layer kinds.
      dataset: typed config of the chosen data source.
      require: op -> the implementation that must win.
      scale: full or rehearsal.
      full_length: sequence length at full scale.
      resolved: the whole config as plain data, for config.json.
    """

    run: config.RunConfig
    sequence: settings.SequenceConfig
    model: model.Config
    block: block.Config
    loss: model.LossConfig
    data: DataConfig
    optimizer: optimizer.Config
    train: settings.TrainConfig
    evaluate: settings.EvaluateConfig
    checkpoint: settings.CheckpointConfig
    track: settings.TrackConfig
    mesh_sizes: dict[str, int]
    layout: str
    pattern: tuple[model.LayerKind, ...]
    dataset: Any
    require: dict[str, str]
    scale: str
    full_length: int
    resolved: dict[str, Any]


def load(path: str, overrides: dict[str, str], devices: int | None = None) -> Experiment:
    """The experiment of a config file and of `a.b.c -> text` from the command line.

    Args:
      path: of the config file, with `:argument` where it takes one.
      overrides: a.b.c -> text.
      devices: how many it is planned for; None for those that are here.

    Raises:
      UserError: with every problem found, one line each.
    """
    conf = config.load_file(path)
    full_length = conf.sequence.length
    scale = overrides["scale"] if "scale" in overrides else conf.scale
    if scale not in config.SCALES:
        raise registry.unknown("config.scale", scale, config.SCALES)
    differences = conf.rehearsal.to_dict()
    if scale == "rehearsal" and not differences:
        raise UserError(f"config.scale='rehearsal': {path} states no rehearsal")
    if scale == "auto":
        scale = "rehearsal" if differences and jax.default_backend() == "cpu" else "full"
    with conf.unlocked():
        conf.rehearsal = ml_collections.ConfigDict()
    if scale == "rehearsal":
        for field, value in _leaves(differences):
            config.assign(conf, field, value, origin=f"{path}: rehearsal")
        if not any(field.startswith("mesh.") for field in overrides):
            conf.mesh.seq = _shrunk(dict(conf.mesh), jax.device_count() if devices is None else devices)
    for field, text in overrides.items():
        config.assign(conf, field, text, origin="command line")
    conf.scale = scale
    if "sequence.length" in overrides and scale == "full":
        full_length = conf.sequence.length
    experiment = resolve(conf, full_length, devices)
    for field in overrides:
        if (part := field.split(".")[:2])[0] in config.TABLES and not _in_use(experiment, *part):
            raise UserError(f"--config.{field}: this run has no {part[1]!r}, so nothing would read it")
    return experiment


def _in_use(experiment: Experiment, table: str, name: str) -> bool:
    """Whether some layer, or the data, has the part that a table calls `name`."""
    part = config.part_class(config.TABLES[table], name)
    kinds = experiment.pattern
    used = {
        "mixers": [kind.mixer for kind in kinds],
        "posencs": [kind.posenc for kind in kinds],
        "ffns": [kind.ffn for kind in kinds],
        "datasets": [load_source(experiment.data.source)[0]],
    }
    return part in used[table]


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def resolve(conf: ml_collections.ConfigDict, full_length: int, devices: int | None = None) -> Experiment:
    """The typed, checked experiment of a complete config, for `devices` devices; None for those that are here."""
    config.check_blocks(conf)
    top = [field.name for field in dataclasses.fields(config.RunConfig)]
    for name, table in {**config.TABLES, "require": KERNELS}.items():
        config.check_fields(conf[name], table, name)
    blocks = {name: config.typed(kind, conf[name], name) for name, kind in config.BLOCKS.items()}
    axes = dataclasses.asdict(blocks.pop("mesh"))
    run = config.typed(config.RunConfig, {name: conf[name] for name in top}, "config")
    if not run.pattern:
        raise UserError(f"config.pattern=() must name a layer kind (valid: {', '.join([*conf.layers, *MIXERS])})")
    for name in run.pattern:
        if not isinstance(name, str):
            raise registry.unknown("config.pattern entry", name, [*conf.layers, *MIXERS])
    available = jax.device_count() if devices is None else devices
    if devices is None or run.scale == "rehearsal":
        available = _used(axes, available, anywhere=run.scale == "rehearsal")
    mesh_sizes = mesh.resolve_sizes(axes, available)
    pattern = tuple(layer_kind(conf, run, name) for name in run.pattern)
    for name in conf.layers:  # those that the pattern leaves out too: a sweep over patterns must not meet their mistakes late
        layer_kind(conf, run, name)
    shards, data = mesh_sizes["seq"], blocks["data"]
    row = dict(
        packed=data.packing in ("concat", "best_fit") and not load_source(data.source)[0].generated,
        tokens=blocks["sequence"].length // shards,
        shards=shards,
    )
    balanced = [kind.mixer.balanced_layout(kind.mixer_config, **row) for kind in pattern]
    layout = stream_layout(blocks["sequence"].layout, balanced, mesh_sizes["seq"])
    if blocks["sequence"].layout == "auto" and mesh_sizes["seq"] > 1:
        pattern = tuple(dataclasses.replace(kind, layout=own) for kind, own in zip(pattern, balanced, strict=True))
    experiment = Experiment(
        run=run,
        **blocks,
        mesh_sizes=mesh_sizes,
        layout=layout,
        pattern=pattern,
        dataset=dataset_config(conf, blocks["data"].source),
        require={op: name for op, name in conf.require.items() if name},
        scale=run.scale,
        full_length=full_length,
        resolved=_plain(json.loads(conf.to_json_best_effort(sort_keys=True))),
    )
    problems = check(experiment)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems in the config\n" + "\n".join(f"  {problem}" for problem in problems))
    return experiment


def _plain(value: Any) -> Any:
    """The value in JSON's types, with an infinity as the text that the command line takes for it."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shrunk(axes: dict[str, int], available: int) -> int:
    """How many devices a rehearsal's mesh has on `seq`: as many as there are, where it states more."""
    others = math.prod(size for axis, size in axes.items() if axis != "seq")
    if -1 in axes.values() or others * axes["seq"] <= available or others > available:
        return axes["seq"]
    return available // others


def _used(axes: dict[str, int], available: int, anywhere: bool) -> int:
    """How many devices: all on accelerators; on a CPU host, whose devices are virtual, and in a rehearsal what the axes ask.

    Of several processes each must have devices in the mesh, so there it is all of them.
    """
    if -1 in axes.values() or jax.process_count() > 1 or not (anywhere or jax.default_backend() == "cpu"):
        return available
    return min(math.prod(axes.values()), available)


def layer_kind(conf: ml_collections.ConfigDict, run: config.RunConfig, name: str) -> model.LayerKind:
    """The parts of one entry of the pattern: `layers.<name>` if the config defines it, else the mixer of that name."""
    if name in conf.layers:
        stated = conf.layers[name]
        if not isinstance(stated, ml_collections.ConfigDict):
            raise UserError(f"layers.{name}={stated!r} must be a dict such as dict(mixer='ring', window=4096)")
        stated = stated.to_dict()
    elif name in MIXERS:
        stated = {}
    else:
        raise registry.unknown("config.pattern entry", name, [*conf.layers, *MIXERS])
    field = f"layers.{name}"
    origin = {part: f"{field}.{part}" if part in stated else f"config.{part}" for part in ("posenc", "ffn")}
    chosen = {part: stated.pop(part, default) for part, default in (("mixer", name), ("posenc", run.posenc), ("ffn", run.ffn))}
    mixer = registry.load(MIXERS, chosen["mixer"], field=f"{field}.mixer")
    if not mixer.caps.positions:
        if origin["posenc"].startswith(field) and chosen["posenc"] != "none":
            wanted = f"mixer {chosen['mixer']!r} takes no position encoding; leave it out"
            raise UserError(f"{field}.posenc={chosen['posenc']!r}: {wanted}")
        chosen["posenc"] = "none"
    posenc = registry.load(POSENCS, chosen["posenc"], field=origin["posenc"])
    ffn = registry.load(FFNS, chosen["ffn"], field=origin["ffn"])
    values = dict(conf.mixers[chosen["mixer"]])
    for key, value in stated.items():
        if key not in values:
            raise registry.unknown(f"{field} field", key, ["mixer", "posenc", "ffn", *values])
        # An int window is the sliding window W of other frameworks: the token itself and W - 1 before it.
        if key == "window" and config.fits(value, int):
            if value < 1:
                raise UserError(f"{field}.window={value} must be at least 1: the token itself")
            value = (value - 1, 0)
        values[key] = value
    return model.LayerKind(
        name=name,
        mixer=mixer,
        mixer_config=config.typed(mixer.Config, values, field if stated else f"mixers.{chosen['mixer']}"),
        posenc=posenc,
        posenc_config=config.typed(posenc.Config, conf.posencs[chosen["posenc"]], f"posencs.{chosen['posenc']}"),
        ffn=ffn,
        ffn_config=config.typed(ffn.Config, conf.ffns[chosen["ffn"]], f"ffns.{chosen['ffn']}"),
    )


def dataset_config(conf: ml_collections.ConfigDict, source: str) -> Any:
    """The typed config of the data source; `tfds:name` and `hf:name` look up the part before the colon."""
    part, name = load_source(source)[0], source.partition(":")[0]
    return config.typed(part.Config, conf.datasets[name], f"datasets.{name}")


def stream_layout(chosen: str, balanced: list[str | None], shards: int) -> str:
    """`sequence.layout` with auto resolved: contiguous on one shard, else what balances most entries of the pattern."""
    if chosen not in ("auto", *layouts.LAYOUTS):
        raise registry.unknown("sequence.layout", chosen, ["auto", *layouts.LAYOUTS])
    if chosen != "auto":
        return chosen
    if shards == 1:
        return "contiguous"
    liked = [layout or "contiguous" for layout in balanced]
    return max(("contiguous", *layouts.LAYOUTS), key=liked.count)


def check(experiment: Experiment) -> list[str]:
    """Every problem between fields, one line each that names the fields and values."""
    e = experiment
    rows, shards = e.mesh_sizes["data"] * e.mesh_sizes["fsdp"], e.mesh_sizes["seq"]
    owners = e.mesh_sizes["fsdp"] * shards
    problems = [str(registry.unknown(field, name, valid)) for field, name, valid in _names(e) if name not in valid]
    if not re.fullmatch(r"\w[\w.\-]*", e.run.name):
        problems.append(f"name={e.run.name!r} must be letters, digits, '_', '-' and '.': it names the run's folder")
    rope = next((kind.posenc_config for kind in e.pattern if kind.posenc is Rope), Rope.Config())
    for field, valid in RANGES.items():
        of_block, _, name = field.rpartition(".")
        value = getattr(rope if of_block == "posencs.rope" else getattr(e, of_block), name)
        if value is not None and (wanted := valid.refuses(value)):
            problems.append(f"{field.removeprefix('run.')}={value} must be {wanted}")
    if e.track.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        problems.append("track.tensorboard=True needs the extra: pip install 'lcx[tensorboard]'")
    if problems:
        return problems
    sizes = e.model.sizes(vocab=0)
    if e.train.batch % e.train.accumulate:
        problems.append(f"train.batch={e.train.batch} must be a multiple of train.accumulate={e.train.accumulate}")
    elif (e.train.batch // e.train.accumulate) % rows:
        problems.append(
            f"train.batch={e.train.batch} over train.accumulate={e.train.accumulate} must be a multiple of "
            f"mesh.data*mesh.fsdp={rows}"
        )
    needed = {kind.layout_in(e.layout) for kind in e.pattern} | {e.layout}
    multiples = {layout: layouts.shard_multiple(layout, shards) for layout in sorted(needed)}
    multiple = math.lcm(*multiples.values())
    if e.sequence.length % multiple:
        near = max(multiple, round(e.sequence.length / multiple) * multiple)
        problems.append(
            f"sequence.length={e.sequence.length} must be a multiple of {multiple} for mesh.seq={shards} in layout "
            f"{' and '.join(repr(layout) for layout in multiples)}; the nearest is {near}"
        )
    tokens = e.sequence.length // shards
    if "cyclic" in needed and shards > 1 and cyclic.blocks_of(max(tokens, 1), shards) == 1:
        problems.append(
            f"sequence.layout='cyclic' cannot cut the {tokens} tokens of a device in blocks that mesh.seq={shards} devices can "
            "exchange: their number must divide the devices, or the devices it; 'zigzag' takes any even number of tokens"
        )
    if sizes.D % owners:
        problems.append(
            f"model.dim={sizes.D} must be a multiple of mesh.fsdp*mesh.seq={owners}, over which parameters are spread"
        )
    if e.model.head_dim is None and sizes.D % sizes.H and any(kind.mixer.caps.positions for kind in e.pattern):
        problems.append(f"model.dim={sizes.D} is no multiple of model.heads={sizes.H}; set model.head_dim")
    kinds, tensor = list({kind.name: kind for kind in e.pattern}.values()), e.mesh_sizes["tensor"]
    for kind in kinds:
        found = kind.mixer.check(kind.mixer_config, sizes, e.sequence.length, e.mesh_sizes)
        problems += [f"layer {kind.name!r}: {problem}" for problem in found]
        width = kind.ffn.inner_width(kind.ffn_config, sizes.D)
        if width is not None and width < 1:
            problems.append(f"layer {kind.name!r}: feed-forward width {width} must be at least 1")
        if width is not None and width % tensor:
            problems.append(f"layer {kind.name!r}: feed-forward width {width} does not divide over mesh.tensor={tensor}")
        if e.block.fuse_attention and not kind.mixer.caps.fused:
            problems.append(f"block.fuse_attention=True: mixer of layer {kind.name!r} cannot be fused; 'blockwise' can")
    if len(e.pattern) > sizes.L:
        problems.append(f"config.pattern has {len(e.pattern)} entries and model.layers={sizes.L} has no room for them")
    return problems or [problem for kind in kinds for problem in _build_problems(kind, sizes)]


def _names(e: Experiment) -> list[tuple[str, str, Iterable[str]]]:
    """Every field that holds one of a fixed set of names: field, name, valid ones."""
    return [
        ("model.dtype", e.model.dtype, DTYPES),
        ("block.remat", e.block.remat, remat.NAMES),
        ("optimizer.name", e.optimizer.name, optimizer.OPTIMIZERS),
        ("optimizer.schedule", e.optimizer.schedule, optimizer.SCHEDULES),
        ("track.wandb", e.track.wandb, settings.WANDB_MODES),
        *((f"require.{op}", name, KERNELS[op]) for op, name in e.require.items()),
    ]


def _build_problems(kind: model.LayerKind, sizes: Sizes) -> list[str]:
    """What the parts of a layer find wrong with their configs when they are built; nothing is allocated."""

    def build():
        rngs = nnx.Rngs(params=jax.random.key(0))
        kind.mixer(kind.mixer_config, sizes, kind.posenc(kind.posenc_config, sizes.K), rngs=rngs)
        kind.ffn(kind.ffn_config, sizes, rngs=rngs)

    try:
        jax.eval_shape(build)
    except UserError as error:
        return [f"layer {kind.name!r}: {error}"]
    return []


def sizes_of(experiment: Experiment, vocab: int) -> Sizes:
    """The model's sizes once the tokenizer's vocabulary is known.

    Raises:
      UserError: the model's vocabulary is smaller than the tokenizer's, or does not divide over `tensor`.
    """
    sizes = experiment.model.sizes(vocab)
    if sizes.V < vocab:
        raise UserError(f"model.vocab={sizes.V} is smaller than the tokenizer's {vocab}; leave it out or raise it")
    tensor = experiment.mesh_sizes["tensor"]
    if sizes.V % tensor:
        raise UserError(f"model.vocab={sizes.V} does not divide over mesh.tensor={tensor}; {-(-sizes.V // tensor) * tensor} does")
    return sizes
