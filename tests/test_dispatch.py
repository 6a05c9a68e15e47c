"""The dispatcher: named is strict, "auto" walks and records, and the device is the mesh's."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from lcx.ops import dispatch
from lcx.ops.attention import attention
from lcx.ops.types import Mask
from lcx.registry import UserError


@pytest.fixture
def table(monkeypatch):
    """An operation `double` with three implementations, of which `mosaic_tpu` refuses odd sizes."""
    modules = {name: types.ModuleType(name) for name in ("reference", "chunked", "mosaic_tpu")}
    for module in modules.values():
        module.refuse = lambda spec, shapes, dtypes, device_kind: None
    modules["mosaic_tpu"].refuse = lambda spec, shapes, dtypes, kind: "x has an odd size" if shapes["x"][0] % 2 else None
    monkeypatch.setitem(dispatch.KERNELS, "double", {name: name for name in modules})
    monkeypatch.setattr(dispatch, "load", lambda table, name, field: modules[name])
    return modules


def choose(implementation="auto", size=4):
    return dispatch.choose("double", implementation, spec=None, shapes=dict(x=(size,)), dtypes=dict(x=jnp.float32)).__name__


def on(monkeypatch, platform):
    monkeypatch.setattr(dispatch, "target", lambda: (platform, f"some {platform}"))


def test_auto_walks_the_order_of_the_platform_and_records_refusals(table, monkeypatch):
    with dispatch.recording() as record:
        assert choose() == "chunked"  # cpu
        on(monkeypatch, "tpu")
        assert choose() == "mosaic_tpu"
        assert choose(size=3) == choose(size=3) == "chunked"
    assert record.winners("double") == ("chunked", "mosaic_tpu")
    assert [(c.winner, c.refused) for c in record.choices["double"]] == [
        ("chunked", ()),
        ("mosaic_tpu", ()),
        ("chunked", (("mosaic_tpu", "x has an odd size"),)),
    ]
    stored = json.loads(json.dumps(record.as_dict()))
    assert stored["double"][2] == dict(
        requested="auto", winner="chunked", refused={"mosaic_tpu": "x has an odd size"}, device_kind="some tpu"
    )


def test_a_named_implementation_is_strict(table):
    assert choose("reference") == "reference"
    with pytest.raises(UserError, match="mosaic_tpu.*odd size.*valid: auto, reference, chunked, mosaic_tpu"):
        choose("mosaic_tpu", size=3)
    with pytest.raises(UserError, match="double: implementation='mosiac_tpu'.*did you mean 'mosaic_tpu'"):
        choose("mosiac_tpu")


def test_auto_raises_when_all_refuse(table):
    table["chunked"].refuse = lambda *facts: "not today"
    with pytest.raises(UserError, match="'auto' cannot run on cpu: chunked: not today"):
        choose()


def test_require_makes_another_winner_an_error(table, monkeypatch):
    with dispatch.recording(require={"double": "mosaic_tpu"}) as record:
        with pytest.raises(UserError, match="require.double='mosaic_tpu'.*'chunked' would run.*does not try it"):
            choose()
        on(monkeypatch, "tpu")
        with pytest.raises(UserError, match="'chunked' would run: mosaic_tpu: x has an odd size"):
            choose(size=3)
        assert choose() == "mosaic_tpu"
    assert record.winners("double") == ("mosaic_tpu",)
    choose(size=3)  # nothing is required any more
    with pytest.raises(UserError, match="require.double='chunkd'.*did you mean 'chunked'"):
        dispatch.recording({"double": "chunkd"}).__enter__()
    with pytest.raises(UserError, match="require='attentoin'.*did you mean 'attention'"):
        dispatch.recording({"attentoin": "chunked"}).__enter__()


def test_records_nest(table):
    with dispatch.recording() as outer:
        with dispatch.recording() as inner:
            choose()
        choose("reference")
    assert inner.winners("double") == ("chunked",)
    assert outer.winners("double") == ("chunked", "reference")


def test_the_device_is_that_of_the_mesh_in_force(mesh_of):
    assert dispatch.target() == ("cpu", "cpu")
    inside = []
    with jax.set_mesh(mesh_of(seq=2)):
        jax.jit(lambda: inside.append(dispatch.target()))()
    assert inside == [("cpu", "cpu")]
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.target() == ("tpu", "TPU v5e")


def test_attention_is_recorded_when_it_is_traced():
    q = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    f = jax.jit(lambda q: attention(q, q, q, mask=Mask()))
    with dispatch.recording() as record:
        f.lower(q)
    assert record.winners("attention") == ("chunked",)
    with dispatch.recording(require={"attention": "reference"}), pytest.raises(UserError, match="require.attention"):
        attention(*[jnp.zeros((1, 8, 2, 4))] * 3, mask=Mask())


def test_the_reference_refuses_long_sequences():
    q, k = (jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32) for length in (8, 16_385))
    with pytest.raises(UserError, match="at most 16384 keys, not 16385"):
        jax.eval_shape(lambda q, k: attention(q, k, k, mask=Mask(), implementation="reference"), q, k)


def test_every_line_of_the_table_loads():
    from lcx.registry import load
    from pallas_kernels import KERNELS

    for op, table in KERNELS.items():
        for name in table:
            assert callable(load(table, name, field=op).refuse), (op, name)
