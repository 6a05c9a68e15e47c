"""The fused head and loss: against full logits in plain jnp, in its count of products, and over meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.linear_cross_entropy import linear_cross_entropy
from lcx.parallel import linear_cross_entropy as over_mesh
from lcx.registry import UserError
from tests.tolerance import assert_close

B, S, D, V = 4, 24, 16, 32
QUICK = {"xla_backend_optimization_level": 0}


def problem(seed=0, dtype=np.float32):
    """Hidden states, head, labels and weights; a fifth of the weights is 0, some of these with labels that do not exist."""
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(B, S, D)).astype(dtype), random.normal(size=(D, V)).astype(np.float32) * 0.3
    labels = random.integers(0, V, (B, S)).astype(np.int32)
    weights = (random.random((B, S)) * (random.random((B, S)) > 0.2)).astype(np.float32)
    absurd = (weights == 0) & (random.random((B, S)) > 0.5)
    return x, w, np.where(absurd, random.choice([-1, V, 10**6], (B, S)), labels).astype(np.int32), weights


def full_logits(x, w, labels, weights, *, z_loss=0.0, label_smoothing=0.0, softcap=None):
    """(sum_loss, sum_weight, nll_BS, correct_BS) with every logit at once."""
    logits = jnp.einsum("bsd,dv->bsv", x, w)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)
    target = jax.nn.one_hot(labels, V)
    nll = -jnp.sum(log_p * target, -1)
    smooth = target * (1 - label_smoothing) + label_smoothing / V
    loss = -jnp.sum(log_p * smooth, -1) + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    real = weights != 0
    correct = real & (jnp.argmax(logits, -1) == labels)
    return jnp.where(real, weights * loss, 0).sum(), weights.sum(), jnp.where(real, nll, 0), correct


ON_NLL = np.random.default_rng(9).normal(size=(B, S)).astype(np.float32)


def results_of(f, x, w, labels, weights, per_token):
    """{name: array}: values and the gradients by name of a mean loss, plus the per-token losses' own cotangents."""

    def objective(x, w, weights):
        sum_loss, sum_weight, *tokens = f(x, w, labels, weights)
        total = sum_loss / sum_weight + (jnp.sum(tokens[0] * ON_NLL) if per_token else 0)
        return total, dict(zip(("sum_loss", "sum_weight", "nll", "correct"), (sum_loss, sum_weight, *tokens), strict=False))

    (dx, dw, dweights), values = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(x, w, weights)
    return values | dict(dx=dx, dw=dw, dweights=dweights)


def expected_of(arguments, per_token, **options):
    options.pop("chunk", None)
    f = lambda *a: full_logits(*a, **options)[: 4 if per_token else 2]
    x, w, labels, weights = arguments
    return jax.jit(lambda *a: results_of(f, *a, per_token), compiler_options=QUICK)(np.asarray(x, np.float32), w, labels, weights)


def compare(actual, expected, dtype="float32"):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name == "correct":
            np.testing.assert_array_equal(actual[name], value)
        else:
            assert_close(actual[name], value, name=name, gradient=name.startswith("d"), dtype=dtype)


OPTIONS = {
    "plain": {},
    "odd_chunk": dict(chunk=7),
    "smooth_z_softcap": dict(chunk=40, z_loss=1e-2, label_smoothing=0.1, softcap=2.0),
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_full_logits(name, per_token):
    options, arguments = OPTIONS[name], problem()
    f = functools.partial(linear_cross_entropy, per_token=per_token, implementation="chunked", **options)
    run = jax.jit(lambda *a: results_of(f, *a, per_token), compiler_options=QUICK)
    expected = expected_of(arguments, per_token, **options)
    compare(run(*arguments), expected)
    x, w, labels, weights = arguments
    for changed in ((x * 1.001, w, labels, weights), (x, w, np.roll(labels, 1), weights), (x, w, labels, np.roll(weights, 1))):
        with pytest.raises(AssertionError):
            compare(run(*changed), expected)


def test_the_reference_equals_full_logits():
    options, arguments = OPTIONS["smooth_z_softcap"], problem()
    f = functools.partial(linear_cross_entropy, per_token=True, implementation="reference", **options)
    run = jax.jit(lambda *a: results_of(f, *a, True), compiler_options=QUICK)
    compare(run(*arguments), expected_of(arguments, True, **options))


def test_bf16_hidden_states():
    x, w, labels, weights = problem()
    x = x.astype(jnp.bfloat16)
    f = functools.partial(linear_cross_entropy, chunk=13)
    actual = jax.jit(lambda *a: results_of(f, *a, False), compiler_options=QUICK)(x, w, labels, weights)
    assert actual["dx"].dtype == jnp.bfloat16
    assert actual["dw"].dtype == actual["sum_loss"].dtype == jnp.float32
    compare(actual, expected_of((x, w, labels, weights), False), dtype="bfloat16")


def test_a_label_outside_the_vocabulary_is_not_passed_over():
    x, w, labels, weights = problem()
    for bad in (-1, V):
        labels[0, 0], weights[0, 0] = bad, 1.0
        for implementation in ("chunked", "reference"):
            f = jax.jit(functools.partial(linear_cross_entropy, implementation=implementation))
            assert np.isnan(f(x, w, labels, weights)[0])


def test_the_first_of_equal_logits_counts_as_the_prediction():
    x, w, labels, weights = problem()
    labels[:], weights[:] = 3, 1.0
    labels[0, 0] = 0
    correct = linear_cross_entropy(x, w * 0, labels, weights, per_token=True)[3]
    assert correct[0, 0] and correct.sum() == 1


def lowered(f, tokens=4096, vocabulary=1024):
    shapes = (1, tokens, 32), (32, vocabulary), (1, tokens), (1, tokens)
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, k) for s, k in zip(shapes, kinds, strict=True)))


@pytest.mark.parametrize(("per_token", "products"), [(False, 3), (True, 4)])
def test_products_and_memory(per_token, products):
    def objective(x, w, labels, weights, chunk=256):
        sum_loss, sum_weight, *tokens = linear_cross_entropy(x, w, labels, weights, chunk=chunk, per_token=per_token)
        return sum_loss / sum_weight + (tokens[0].max() if per_token else 0)

    count = lambda f: len(re.findall(r"stablehlo\.dot_general", lowered(f).as_text()))
    assert count(objective) == 1  # no gradient is computed that nobody asked for
    gradient = jax.value_and_grad(objective, argnums=(0, 1))
    assert count(gradient) == products
    all_logits = r"f32\[(?:1,)?4096,1024\]|f32\[16,256,1024\]|f32\[4194304\]"
    assert not re.search(all_logits, lowered(gradient).compile().as_text())
    whole = jax.value_and_grad(functools.partial(objective, chunk=4096), argnums=(0, 1))
    assert re.search(all_logits, lowered(whole).compile().as_text())  # the pattern does find them


ALL_AXES = dict(data=2, fsdp=2, seq=4, tensor=2)
MESHES = [(dict(tensor=2), True), (dict(fsdp=2, tensor=4), False), (ALL_AXES, False), (ALL_AXES, True), (dict(seq=8), False)]


@pytest.mark.parametrize(("sizes", "per_token"), MESHES, ids=str)
def test_equals_one_device_over_a_mesh(mesh_of, sizes, per_token):
    options, arguments = dict(chunk=5, z_loss=1e-2, label_smoothing=0.1, softcap=2.0), problem()
    mesh = mesh_of(**sizes)
    f = functools.partial(over_mesh.linear_cross_entropy, mesh=mesh, per_token=per_token, **options)
    run = jax.jit(lambda *a: results_of(f, *a, per_token), compiler_options=QUICK)
    expected = expected_of(arguments, per_token, **options)
    with jax.set_mesh(mesh):
        compare(run(*arguments), expected)
        x, w, labels, weights = arguments
        w = w.copy()
        w[:, -1] *= 1.01  # in the last slice of the vocabulary
        with pytest.raises(AssertionError):
            compare(run(x, w, labels, weights), expected)


def test_the_head_is_gathered_before_the_loop(mesh_of):
    mesh = mesh_of(fsdp=2, seq=2, tensor=2)
    objective = lambda *a: over_mesh.linear_cross_entropy(*a, mesh=mesh, chunk=3)[0]
    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(*problem()).as_text()
    first_loop = text.index("stablehlo.while")
    assert "all_gather" in text[:first_loop]
    assert "all_gather" not in text[first_loop:]


def test_mistakes_are_one_line(mesh_of):
    x, w, labels, weights = problem()
    for message, call in {
        "V=33 cannot be divided among mesh axes tensor=2": lambda: over_mesh.linear_cross_entropy(
            x, np.ones((D, 33), np.float32), labels, weights, mesh=mesh_of(tensor=2)
        ),
        r"B=4 cannot be divided among mesh axes data=8 \* fsdp=1": lambda: over_mesh.linear_cross_entropy(
            x, w, labels, weights, mesh=mesh_of(data=8)
        ),
        "w_DV has shape": lambda: linear_cross_entropy(x, w.T, labels, weights),
        "labels_BS has dtype float32": lambda: linear_cross_entropy(x, w, weights, weights),
        "weights_BS has shape": lambda: linear_cross_entropy(x, w, labels, weights[:1]),
        "chunk=0": lambda: linear_cross_entropy(x, w, labels, weights, chunk=0),
        "label_smoothing=1.0": lambda: linear_cross_entropy(x, w, labels, weights, label_smoothing=1.0),
        "did you mean 'chunked'": lambda: linear_cross_entropy(x, w, labels, weights, implementation="chunk"),
    }.items():
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Hidden states of 2^31 + 2^21 elements: the losses and gradients at the end are those of the end alone."""
    S, D, V, tail = 2**21 + 2**11, 1024, 8, 2**11
    w_DV = jax.random.normal(jax.random.key(0), (D, V), jnp.float32) / 32
    block = jax.random.normal(jax.random.key(1), (tail, D), jnp.float32).astype(jnp.bfloat16)
    x_BSD = jnp.tile(block, (S // tail, 1))[None]
    labels_BS = jnp.tile(jnp.arange(tail, dtype=jnp.int32) % V, S // tail)[None]
    weights_BS = (jnp.arange(S) >= S - tail).astype(jnp.float32)[None]
    assert x_BSD.size > 2**31
    loss = lambda x, labels, weights: linear_cross_entropy(x, w_DV, labels, weights)[0]
    value, dx = jax.value_and_grad(loss)(x_BSD, labels_BS, weights_BS)
    last = slice(S - tail, S)
    alone, dx_alone = jax.value_and_grad(loss)(x_BSD[:, last], labels_BS[:, last], weights_BS[:, last])
    assert_close(value, alone)
    assert_close(dx[:, last].astype(jnp.float32), dx_alone.astype(jnp.float32), gradient=True)
    assert not dx[:, : S - tail].any()
