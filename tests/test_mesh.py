"""Joining a run of several processes: every environment that JAX knows, and none by mistake; no stored programs for CPUs."""

import os
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental.compilation_cache import compilation_cache

from lcx.mesh import initialize_distributed, make_mesh
from lcx.registry import UserError

PREFIXES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "LCX_")
SRUN = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="node[1-4]", SLURM_NTASKS="4", SLURM_PROCID="1", SLURM_LOCALID="0")
MPIRUN = dict(
    OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1:34911",
    OMPI_VERSION="4.1.6",
    OMPI_COMM_WORLD_SIZE="2",
    OMPI_COMM_WORLD_RANK="0",
    OMPI_COMM_WORLD_LOCAL_RANK="0",
)
POD = dict(KUBERNETES_SERVICE_HOST="10.0.0.1")
BY_HAND = dict(LCX_COORDINATOR="localhost:1234", LCX_PROCESSES="2", LCX_PROCESS_ID="1")


@pytest.fixture
def joins(monkeypatch):
    """joins(**environment) -> the keywords of every call of jax.distributed.initialize."""

    def call(**environment):
        calls = []
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(PREFIXES)]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
            initialize_distributed()
        return calls

    return call


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)


@pytest.fixture
def kubernetes(monkeypatch):
    """kubernetes(parallelism) -> a cluster whose job has that many pods."""

    def install(parallelism):
        client = types.SimpleNamespace(
            CoreV1Api=object, BatchV1Api=object, exceptions=types.SimpleNamespace(ApiException=RuntimeError)
        )
        config = types.SimpleNamespace(load_incluster_config=lambda: None)
        monkeypatch.setitem(sys.modules, "kubernetes", types.SimpleNamespace(client=client, config=config))
        job = types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=parallelism))
        monkeypatch.setattr(clusters.K8sCluster, "_job", classmethod(lambda cls: job))

    return install


def test_a_single_host_joins_nothing(joins):
    assert joins() == []


def test_every_task_of_srun_joins(joins):
    assert joins(**SRUN) == [{}]
    assert joins(**SRUN, SLURM_STEP_NUM_TASKS="4") == [{}]


def test_one_task_of_srun_is_a_single_host(joins):
    assert joins(**SRUN | dict(SLURM_NTASKS="1")) == []


def test_a_shell_of_sbatch_or_salloc_waits_for_nobody(joins):
    shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert joins(**shell) == []
    assert joins(SLURM_JOB_ID="7", SLURM_NTASKS="4") == []
    # salloc may run its shell in a step of its own, with the number of tasks that srun would start.
    assert joins(**SRUN, SLURM_STEP_NUM_TASKS="1") == []


def test_open_mpi_joins_when_there_are_several(joins):
    assert joins(**MPIRUN) == [{}]
    assert joins(**MPIRUN | dict(OMPI_COMM_WORLD_SIZE="1")) == []


@pytest.mark.parametrize("hosts", ["10.0.0.1,10.0.0.2", "localhost"])
def test_every_host_of_a_tpu_on_gke_joins_also_a_single_one(joins, on_tpu, hosts):
    assert joins(TPU_WORKER_HOSTNAMES=hosts, TPU_WORKER_ID="0", TPU_SKIP_MDS_QUERY="1") == [{}]


def test_every_cloud_tpu_vm_joins_also_a_single_one(joins, on_tpu, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("0", 200))
    assert joins() == [{}]


def test_tpu_host_names_without_a_tpu_are_no_run(joins):
    assert joins(TPU_WORKER_HOSTNAMES="10.0.0.1,10.0.0.2") == []


def test_the_pods_of_an_indexed_job_join(joins, kubernetes):
    kubernetes(2)
    assert joins(**POD, JOB_COMPLETION_INDEX="0") == [{}]
    kubernetes(1)
    assert joins(**POD, JOB_COMPLETION_INDEX="0") == []


def test_any_other_pod_is_a_single_host(joins):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX is not even asked: without its package it would warn, with it look for a job
        assert joins(**POD) == []


def test_a_run_by_hand_joins_as_stated(joins):
    assert joins(**BY_HAND) == [dict(coordinator_address="localhost:1234", num_processes=2, process_id=1)]


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(LCX_PROCESSES=None), "LCX_PROCESSES='' must be an integer of at least 1"),
        (dict(LCX_PROCESSES="two"), "LCX_PROCESSES='two' must be an integer of at least 1"),
        (dict(LCX_PROCESSES="0"), "LCX_PROCESSES='0' must be an integer of at least 1"),
        (dict(LCX_PROCESS_ID=None), "LCX_PROCESS_ID='' must be an integer from 0 to 1"),
        (dict(LCX_PROCESS_ID="1.5"), "LCX_PROCESS_ID='1.5' must be an integer from 0 to 1"),
        (dict(LCX_PROCESS_ID="2"), "LCX_PROCESS_ID='2' must be an integer from 0 to 1"),
    ],
)
def test_a_run_by_hand_that_is_not_stated_in_full_is_one_line(joins, change, text):
    with pytest.raises(UserError, match=text):
        joins(**{name: value for name, value in (BY_HAND | change).items() if value is not None})


@pytest.fixture
def stored(tmp_path):
    """Names of the programs in JAX's compilation cache, which is on and takes everything."""
    options = dict(
        jax_enable_compilation_cache=True,
        jax_compilation_cache_dir=str(tmp_path),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda: {path.name.split("-")[0] for path in tmp_path.iterdir()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_over_several_cpu_devices_are_not_read_back(stored):
    """XLA loses the order of their collectives: they hang, or give NaN."""

    def alone(x):
        return x + 1

    def together(x):
        return x + 2

    make_mesh()
    jax.jit(alone)(jnp.zeros(3))
    assert "jit_alone" in stored()
    make_mesh(seq=2)
    jax.jit(together)(jnp.zeros(3))
    assert "jit_together" not in stored()
