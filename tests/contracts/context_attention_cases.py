"""Calls of attention over a mesh with every feature, run on whole arrays and on any mesh, and compared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lcx.ops.attention import attention
from lcx.ops.types import Mask
from lcx.parallel.attention import context_attention
from lcx.parallel.layouts import sequence_permutation
from lcx.sharding import activation_spec
from tests.tolerance import GRADIENTS, assert_close, rms_ratio

DIMS = dict(
    q="BSHK",
    k="BTGK",
    v="BTGK",
    sink="H",
    segments="BS",
    do="BSHK",
    dlse="BHS",
    dq="BSHK",
    dk="BTGK",
    dv="BTGK",
    o="BSHK",
    lse="BHS",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call on S = 64 tokens or so. `breaks` names the input whose change must turn the comparison red."""

    mask: Mask = Mask()
    length: int = 64
    heads: tuple[int, int] = (4, 4)
    packed: bool = False
    sink_logits: bool = False
    softcap: float | None = None
    alibi: bool = False
    return_lse: bool = False
    rows: int = 2
    breaks: str = "k"

    @property
    def slopes_H(self):
        return jnp.linspace(0.5, 0.1, self.heads[0]) if self.alibi else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs and cotangents by name, tokens in order."""
        draw = functools.partial(np.random.default_rng(0).normal, size=None)
        (H, G), B, S, K = self.heads, self.rows, self.length, 8
        shapes = dict(q=(B, S, H, K), k=(B, S, G, K), v=(B, S, G, K), do=(B, S, H, K))
        arrays = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
        if self.sink_logits:
            arrays["sink"] = np.linspace(-1, 1, H, dtype=np.float32)
        if self.return_lse:
            arrays["dlse"] = draw(size=(B, H, S)).astype(np.float32)
        if self.packed:  # the last quarter of the first row and all of the last are padding
            arrays["segments"] = np.zeros((B, S), np.int32)
            for row in range(B - 1):
                cuts = np.array([0.3 + 0.1 * row, 0.34, 0.72]) * S
                arrays["segments"][row] = np.searchsorted(cuts, np.arange(S), side="right") + 1
                arrays["segments"][row][int(0.72 * S) :] = 0
        return arrays

    def run(self, attend, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Outputs and gradients by name; `attend(q, k, v, segments, **options)`."""
        options = dict(mask=self.mask, softcap=self.softcap, alibi_slopes_H=self.slopes_H, return_lse=self.return_lse)
        names = [name for name in ("q", "k", "v", "sink") if name in inputs]

        def call(*differentiated):
            given = dict(zip(names, differentiated, strict=True))
            segments = inputs["segments"] if self.packed else None
            sink_H = given["sink"] if self.sink_logits else None
            out = attend(given["q"], given["k"], given["v"], segments, sink_logits_H=sink_H, **options)
            return dict(o=out[0], lse=out[1]) if self.return_lse else dict(o=out)

        out, pull = jax.vjp(call, *(inputs[name] for name in names))
        cotangents = dict(o=inputs["do"], lse=inputs["dlse"]) if self.return_lse else dict(o=inputs["do"])
        return out | {f"d{name}": grad for name, grad in zip(names, pull(cotangents), strict=True)}


CASES = {
    "causal": Case(),
    "full": Case(Mask(causal=False), breaks="v"),
    "packed_padded": Case(packed=True, rows=3, breaks="segments"),
    "window": Case(Mask(window=(9, 0))),
    "two_sided_window": Case(Mask(causal=False, window=(5, 9))),
    "sink_tokens": Case(Mask(window=(9, 0), sink_tokens=3), breaks="v"),
    "sink_tokens_packed": Case(Mask(window=(5, 0), sink_tokens=10), packed=True, breaks="segments"),
    "sink_logits_gqa": Case(sink_logits=True, heads=(8, 4), return_lse=True, breaks="sink"),
    "mqa_lse": Case(heads=(4, 1), return_lse=True, breaks="dlse"),
    "odd_length": Case(length=53, heads=(4, 2)),
    "softcap_alibi": Case(softcap=1.5, alibi=True, breaks="q"),
    "everything": Case(
        Mask(window=(9, 0), sink_tokens=2),
        length=61,
        heads=(4, 2),
        packed=True,
        sink_logits=True,
        softcap=2.0,
        alibi=True,
        return_lse=True,
        breaks="segments",
    ),
}


def place(name: str, x: np.ndarray, mesh, index) -> jax.Array:
    """An array in layout order, spread over the mesh where its sizes allow."""
    dims = DIMS[name]
    token_dim = next((i for i, d in enumerate(dims) if d in "ST"), None)
    x = x if token_dim is None else np.take(x, index, axis=token_dim)
    if token_dim is not None and x.shape[token_dim] % mesh.shape["seq"]:
        return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(mesh, activation_spec(dims)))


@functools.cache
def expected_of(case: Case) -> dict[str, np.ndarray]:
    def attend(q, k, v, segments, **options):
        return attention(q, k, v, segments_q_BS=segments, segments_k_BT=segments, implementation="reference", **options)

    inputs = {name: jnp.asarray(x) for name, x in case.arrays().items()}
    run = jax.jit(functools.partial(case.run, attend))
    return {name: np.asarray(x) for name, x in run(inputs).items()}


class Sharded:
    """One compiled call; `__call__` takes and gives arrays with tokens in order."""

    def __init__(self, case: Case, mesh, strategy: str, layout: str, **options):
        self.case, self.mesh = case, mesh
        self.index = sequence_permutation(layout, case.length, mesh.shape["seq"])

        def attend(q, k, v, segments, **others):
            return context_attention(
                q, k, v, mesh=mesh, strategy=strategy, layout=layout, segments_BS=segments, **others, **options
            )

        self.run = jax.jit(functools.partial(case.run, attend))

    def _placed(self, arrays):
        return {name: place(name, x, self.mesh, self.index) for name, x in arrays.items()}

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs, order = {}, np.argsort(self.index)
        for name, x in self.run(self._placed(arrays)).items():
            dims = DIMS[name] if name in DIMS else DIMS[name[1:]]
            token_dim = next((i for i, d in enumerate(dims) if d in "ST"), None)
            outputs[name] = np.asarray(x) if token_dim is None else np.take(np.asarray(x), order, axis=token_dim)
        return outputs


def with_one_change(case: Case, shards: int) -> dict[str, np.ndarray]:
    """The inputs with one change: the tokens of one shard doubled, or one document leaking into the next."""
    arrays = case.arrays()
    x = arrays[case.breaks].copy()
    if case.breaks == "segments":
        x[0][x[0] == 2] = 1
    elif case.breaks == "sink":
        x[0] += 0.1
    else:
        token_dim = DIMS[case.breaks].index("T" if case.breaks in "kv" else "S")
        one_shard = [slice(None)] * x.ndim
        one_shard[token_dim] = slice(0, case.length // shards)
        x[tuple(one_shard)] *= 1.1
    return arrays | {case.breaks: x}


def assert_equal_to_whole(case: Case, sharded: Sharded) -> None:
    """Every value and gradient equal; and not, with one input changed."""
    expected, actual = expected_of(case), sharded(case.arrays())
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if name == "lse":  # a row without keys has -inf on both sides
            assert (np.isneginf(actual[name]) == np.isneginf(x)).all()
            actual[name], x = (np.where(np.isneginf(a), 0, a) for a in (actual[name], x))
        assert_close(actual[name], x, name=name, gradient=name.startswith("d"))
    if case.packed:
        empty = case.arrays()["segments"] == 0
        assert empty.any()
        for name in ("o", "dq", "dk", "dv"):
            assert (actual[name][empty] == 0).all(), f"{name} of padding"
    broken = sharded(with_one_change(case, sharded.mesh.shape["seq"]))
    worst = max(rms_ratio(broken[name], expected[name]) for name in ("dq", "dk", "dv"))
    assert worst > 100 * GRADIENTS["float32"], f"a change of {case.breaks} goes unnoticed"


def options_of(strategy: str) -> dict:
    """Groups of two where a strategy has groups, so that there is a ring between them."""
    return dict(ulysses_degree=2) if strategy == "ulysses_ring" else {}
