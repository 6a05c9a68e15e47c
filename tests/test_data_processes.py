"""Two processes that share a sequence: each reads its own part, and together they hold what one process would."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

SEQUENCE_LENGTH = 4096


def _loader(config, mesh):
    from lcx.data.config import DataConfig
    from lcx.data.loader import make_loader
    from lcx.data.sources import text_folder

    root = pathlib.Path(config["root"])
    data = DataConfig(
        source="text_folder",
        cache_dir=str(root / "cache"),
        packing=config["packing"],
        held_out="tail",
        seed=config.get("seed", 0),
    )
    source = text_folder.Config(path=str(root / "texts"))
    return make_loader(data, source, split="train", mesh=mesh, batch=2, sequence_length=SEQUENCE_LENGTH)


def _child(rank, config):
    import jax

    from lcx.data.store import TokenStore
    from lcx.mesh import initialize_distributed, make_mesh
    from lcx.registry import UserError

    initialize_distributed()
    read = []
    original = TokenStore.read
    TokenStore.read = lambda self, a, b: read.append(b - a) or original(self, a, b)
    report = {}
    for name, axes in config["meshes"].items():
        loader = _loader(config, make_mesh(**axes))
        loader.restore(config["state"])
        read.clear()
        for step in range(2):
            for field, value in next(loader).items():
                for shard in value.addressable_shards:
                    (rows, columns) = shard.index
                    key = f"{name}/{step}/{field}/{rows.start or 0}/{columns.start or 0}"
                    report[key] = np.asarray(shard.data)
        report[f"read/{name}"] = np.array(sum(read))
    np.savez(pathlib.Path(config["root"]) / f"rank{rank}.npz", **report)
    if config["differ"]:
        try:
            _loader(config | {"seed": rank}, make_mesh(seq=-1))
        except UserError as error:
            print("REFUSED", error, flush=True)
    jax.distributed.shutdown()


def _run(config, devices):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "LCX_COORDINATOR": f"localhost:{port}",
        "LCX_PROCESSES": "2",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    command = [sys.executable, __file__, json.dumps(config)]
    processes = [
        subprocess.Popen(
            command, env=environment | {"LCX_PROCESS_ID": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err[-2000:] for _, err in outputs)
    return [out for out, _ in outputs]


@pytest.fixture
def root(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:03}.txt").write_bytes(
            bytes(random.integers(97, 123, size=random.integers(1, 3000), dtype=np.uint8))
        )
    return tmp_path


@pytest.mark.parametrize(
    "devices, meshes",
    [
        (2, {"sequence": dict(seq=4), "both": dict(data=2, seq=2), "replicas": dict(seq=2, tensor=2)}),
        (1, {"sequence": dict(seq=2), "rows": dict(fsdp=2)}),  # one device per process, as with one GPU each
    ],
)
def test_a_process_reads_its_own_tokens_and_the_batch_is_that_of_one_process(root, mesh_of, devices, meshes):
    config = dict(root=str(root), packing="concat")
    alone = _loader(config, mesh_of())
    next(alone)
    config |= dict(state=alone.state(), meshes=meshes, differ=devices == 1)
    expected = [{name: np.asarray(value) for name, value in next(alone).items()} for _ in range(2)]
    outputs = _run(config, devices)
    if config["differ"]:  # each process with another seed: both must stop
        assert all("REFUSED the processes of this run have different data" in out for out in outputs)
    reports = [np.load(root / f"rank{rank}.npz") for rank in range(2)]
    shape = expected[0]["tokens_BS"].shape
    for name in meshes:
        total = 2 * shape[0] * shape[1]
        for report in reports:
            assert total // 2 <= report[f"read/{name}"] <= total // 2 + 16, (name, int(report[f"read/{name}"]), total)
        for step in range(2):
            for field, whole in expected[step].items():
                seen = np.zeros(shape, bool)
                for report in reports:
                    for key in (key for key in report if key.startswith(f"{name}/{step}/{field}/")):
                        row, column = map(int, key.split("/")[-2:])
                        part = report[key]
                        at = np.s_[row : row + part.shape[0], column : column + part.shape[1]]
                        np.testing.assert_array_equal(part, whole[at], err_msg=key)
                        seen[at] = True
                assert seen.all()


if __name__ == "__main__":
    _child(int(os.environ["LCX_PROCESS_ID"]), json.loads(sys.argv[1]))
