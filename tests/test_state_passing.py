"""Recurrences over a mesh against one device: values, every gradient, and what is sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.mesh import make_mesh
from lcx.ops.causal_conv import causal_conv
from lcx.ops.recurrence import Affine, apply, compose
from lcx.ops.selective_scan import selective_scan
from lcx.ops.ssd import ssd
from lcx.parallel import recurrences, state_passing
from lcx.planning.hlo import operations
from lcx.registry import UserError
from lcx.sharding import activation_spec, per_shard
from tests.tolerance import GRADIENTS, assert_close, rms_ratio

ROWS, LENGTH = 2, 96
# Documents start inside shards, at their edges, span several, and padding stands at the end of the first row.
STARTS = ((0, 3, 16, 41), (0, 33, 34))


def segments_of(length: int = LENGTH) -> np.ndarray:
    segments = np.stack([np.searchsorted(starts, np.arange(length), side="right") for starts in STARTS]).astype(np.int32)
    segments[0, -7:] = 0
    return segments


def draw(**shapes) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def scan_arrays(B=ROWS, S=LENGTH, E=8, N=4):
    arrays = draw(u=(B, S, E), dt=(B, S, E), A=(E, N), Bm=(B, S, N), C=(B, S, N), D=(E,), z=(B, S, E), bias=(E,), dy=(B, S, E))
    return arrays | {"A": -np.exp(arrays["A"]), "dt": arrays["dt"] - 1}


def ssd_arrays(B=ROWS, S=LENGTH, H=4, K=4, G=2, N=4):
    arrays = draw(u=(B, S, H, K), dt=(B, S, H), A=(H,), Bm=(B, S, G, N), C=(B, S, G, N), D=(H,), bias=(H,), dy=(B, S, H, K))
    return arrays | {"A": -np.exp(arrays["A"]), "dt": arrays["dt"] - 1}


def conv_arrays(B=ROWS, S=LENGTH, E=8):
    return draw(u=(B, S, E), w=(E, 4), bias=(E,), dy=(B, S, E))


def run_scan(x, segments, mesh, **implementation):
    given, options = [x[name] for name in ("u", "dt", "A", "Bm", "C", "D")], dict(z_BSE=x["z"], dt_bias_E=x["bias"])
    if mesh is None:
        return selective_scan(*given, **options, segments_BS=segments)[0]
    return recurrences.selective_scan(*given, **options, segments_BS=segments, mesh=mesh, **implementation)


def run_ssd(x, segments, mesh, **implementation):
    given, options = [x[name] for name in ("u", "dt", "A", "Bm", "C", "D")], dict(dt_bias_H=x["bias"], chunk=8)
    if mesh is None:
        return ssd(*given, **options, segments_BS=segments)[0]
    return recurrences.ssd(*given, **options, segments_BS=segments, mesh=mesh, **implementation)


def run_conv(x, segments, mesh):
    if mesh is None:
        return causal_conv(x["u"], x["w"], x["bias"], segments_BS=segments, activation="silu")[0]
    return recurrences.causal_conv(x["u"], x["w"], x["bias"], segments_BS=segments, activation="silu", mesh=mesh)


OPS = {"selective_scan": (run_scan, scan_arrays), "ssd": (run_ssd, ssd_arrays), "causal_conv": (run_conv, conv_arrays)}


def outputs_of(op: str, segments, mesh=None, **implementation) -> dict[str, jax.Array]:
    """The output and the gradient of every array."""
    run, make = OPS[op]
    arrays = {name: jnp.asarray(x) for name, x in make().items()}
    dy = arrays.pop("dy")

    @jax.jit
    def both(arrays, dy):
        y, pull = jax.vjp(lambda x: run(x, segments, mesh, **implementation), arrays)
        return {"y": y} | {f"d{name}": grad for name, grad in pull(dy)[0].items()}

    with jax.set_mesh(mesh or make_mesh()):
        return both(arrays, dy)


@functools.cache
def expected_of(op: str, packed: bool):
    return outputs_of(op, segments_of() if packed else None)


def compare(actual, expected):
    for name, x in expected.items():
        assert_close(actual[name], x, name=name, gradient=name != "y")


MESHES = [(dict(seq=4), True), (dict(seq=32), True), (dict(seq=8), False), (dict(data=2, seq=2, tensor=2), True)]


@pytest.mark.parametrize("sizes,packed", MESHES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_equals_one_device(mesh_of, op, sizes, packed):
    compare(outputs_of(op, segments_of() if packed else None, mesh_of(**sizes)), expected_of(op, packed))


@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_the_summaries_of_the_reference_serve_as_well(mesh_of, op):
    """Any backend, through the same five functions."""
    compare(outputs_of(op, segments_of(), mesh_of(seq=4), implementation="reference"), expected_of(op, True))


@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_log_steps_equal_the_gathered_prefix(mesh_of, monkeypatch, op):
    monkeypatch.setattr(state_passing, "GATHER_BYTES", 0)
    compare(outputs_of(op, segments_of(), mesh_of(seq=8)), expected_of(op, True))
    compare(outputs_of(op, None, mesh_of(seq=8)), expected_of(op, False))


@pytest.mark.parametrize("op", OPS)
def test_a_state_that_is_not_passed_on_is_noticed(mesh_of, monkeypatch, op):
    """The twin: every device starts from zero."""
    monkeypatch.setattr(state_passing, "exclusive_prefix", lambda stretch, rate, **_: jnp.zeros_like(stretch.state))
    monkeypatch.setattr(recurrences, "from_left", lambda x, tokens, **_: jnp.zeros_like(x[:, :tokens]))
    actual, expected = outputs_of(op, None, mesh_of(seq=8)), expected_of(op, False)
    assert rms_ratio(actual["du"], expected["du"]) > 100 * GRADIENTS["float32"]


def test_the_error_stays_flat_over_32_devices(mesh_of):
    """Of the output and of every gradient."""
    expected, found = expected_of("selective_scan", False), {}
    for P in (2, 8, 32):
        actual = outputs_of("selective_scan", None, mesh_of(seq=P))
        found[P] = max(rms_ratio(actual[name], x) for name, x in expected.items())
    assert max(found.values()) <= 2 * max(found[2], 1e-7), found


@pytest.mark.parametrize("steps", [False, True], ids=["gathered", "log steps"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("P", [2, 3, 5, 8])
def test_the_prefix_composes_what_stands_before(mesh_of, monkeypatch, P, reverse, steps):
    """Against a loop, with documents that end the history on some devices."""
    if steps:
        monkeypatch.setattr(state_passing, "GATHER_BYTES", 0)
    random = np.random.default_rng(P)
    elapsed_PE, state_PEN = random.uniform(0.1, 1, (P, 3)).astype(np.float32), random.normal(size=(P, 3, 2)).astype(np.float32)
    elapsed_PE[P // 2] = np.inf
    rate_1EN = -jnp.asarray(random.uniform(0.5, 2, (1, 3, 2)), jnp.float32)
    mesh = mesh_of(seq=P)
    spec = activation_spec("SEN")

    def local(elapsed, state):
        stretch = Affine(elapsed[..., None], state)
        return state_passing.exclusive_prefix(stretch, rate_1EN, shards=P, reverse=reverse)

    run = per_shard(local, mesh=mesh, in_specs=(activation_spec("SE"), spec), out_specs=spec)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(elapsed_PE, state_PEN)
    state, order = jnp.zeros((1, 3, 2)), range(P - 1, -1, -1) if reverse else range(P)
    for device in order:
        np.testing.assert_allclose(found[device], state[0], rtol=2e-6, atol=1e-6)
        state = apply(Affine(elapsed_PE[device, None, :, None], state_PEN[device, None]), state, rate_1EN)


def test_composition_is_associative():
    random = np.random.default_rng(0)
    one, two, three = (Affine(*(jnp.asarray(random.uniform(0.1, 1, (1, 3, 2)), jnp.float32) for _ in range(2))) for _ in range(3))
    rate = -jnp.ones((1, 3, 2))
    left, right = compose(compose(one, two, rate), three, rate), compose(one, compose(two, three, rate), rate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right)


def collectives(op: str, P: int, S: int) -> dict[str, list[int]]:
    """Bytes of the results of collectives of one device, forward and backward, by kind."""
    run, make = OPS[op]
    mesh = make_mesh(seq=P)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in make(1, S).items()}
    arrays.pop("dy")
    with jax.set_mesh(mesh):
        loss = lambda x: jnp.sum(run(x, None, mesh))
        text = jax.jit(jax.grad(loss, argnums=0)).lower(arrays).compile().as_text()
    kinds, found = ("all-gather", "collective-permute", "all-to-all", "reduce-scatter"), {}
    for operation in operations(text):
        if operation.kind.removesuffix("-start") in kinds:
            found.setdefault(operation.kind.removesuffix("-start"), []).extend([operation.bytes] * operation.times)
    return found


def test_one_message_forward_and_one_backward(monkeypatch):
    """A state of 8 x 4 and 8 sums of step sizes, gathered from 8 devices, whatever the length."""
    message = 4 * (8 * 4 + 8)
    for S in (64, 512):
        assert collectives("selective_scan", 8, S) == {"all-gather": [8 * message] * 2}
    monkeypatch.setattr(state_passing, "GATHER_BYTES", 0)
    # The message of the neighbour, then those of 1, 2 and 4 before it: 4 each way for 8 devices.
    assert collectives("selective_scan", 8, 64) == {"collective-permute": [message] * 8}


def test_the_convolution_sends_its_halo():
    """Three tokens of 8 channels to the right, and their gradient back."""
    assert collectives("causal_conv", 8, 64) == {"collective-permute": [3 * 8 * 4] * 2}


def test_a_shard_shorter_than_the_convolution_is_one_line(mesh_of):
    x = conv_arrays(S=16)
    with pytest.raises(UserError, match="a halo of 3 tokens needs shards of as many, and they have 2"):
        recurrences.causal_conv(x["u"], x["w"], x["bias"], mesh=mesh_of(seq=8))


@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_every_product_is_exact_whatever_the_default(op):
    """A TPU's default would round fp32 states to bf16. Forward, backward and summaries."""
    run, make = OPS[op]
    mesh = make_mesh(seq=4)
    arrays = {name: jnp.asarray(x) for name, x in make().items()}
    with jax.default_matmul_precision("default"), jax.set_mesh(mesh):
        text = jax.jit(jax.grad(lambda x: jnp.sum(run(x, None, mesh)))).lower(arrays).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)
