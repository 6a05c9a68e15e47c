"""The command as a process: killed, asked to stop, continued, and spread over two processes."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 40
SMALL = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.batch": 2,
    "checkpoint.every": 4,
    "sequence.length": 64,
    "model.dim": 32,
    "ffns.gated.width": 32,
    "evaluate.batches": 1,
    "track.wandb": "disabled",
    "data.packing": "stream",
    "mesh.seq": 4,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir name, **environment) -> a running `python -m lcx.train`; killed at the end if it still runs."""
    folder, running = tmp_path_factory.mktemp("runs"), []
    corpus = folder / "text"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        (corpus / f"{i}.txt").write_text(" ".join(rng.choice(["ring", "scan", "mesh", "axis"], size=300)))
    data = {"data.source": "text_folder", "datasets.text_folder.path": corpus, "data.held_out_fraction": 0.2}
    data["data.cache_dir"] = folder / "cache"

    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    compiles = {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}

    def run(name, devices=4, **environment):
        command = [sys.executable, "-m", "lcx.train", "--config", "configs/tiny.py", "--workdir", str(folder / name)]
        command += [f"--config.{field}={value}" for field, value in (SMALL | data).items()]
        own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | compiles
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        process.workdir = folder / name
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.stdout.close()
        process.wait()


def finish(process, status=0):
    """Waits for the end and returns what it printed."""
    output = process.communicate(timeout=240)[0]
    assert process.returncode == status, output
    return output


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_step(process, step):
    """Until the run has logged a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        file = process.workdir / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was never logged:\n{process.communicate(timeout=10)[0] if process.poll() is not None else ''}")


def kill_in_a_save(process):
    """Kills a run while it writes a checkpoint: the directory does not have its final name yet."""
    began, folder = time.time(), process.workdir / "checkpoints"
    while time.time() < began + 200 and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # renamed while we look
            if any(not save.name.isdigit() and save.stat().st_mtime > began for save in folder.iterdir()):
                return kill(process)
    pytest.fail("no checkpoint was ever begun")


def kill(*processes):
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


@pytest.fixture(scope="module")
def whole(start):
    """The losses of a run that nobody interrupts."""
    process = start("whole")
    finish(process)
    return losses(process.workdir)


def test_killed_asked_to_stop_and_continued_is_bit_for_bit_the_same(start, whole):
    kill_in_a_save(start("broken"))
    asked = start("broken")
    wait_for_step(asked, 14)
    asked.send_signal(signal.SIGTERM)
    assert "the state is saved, the same command continues" in finish(asked)
    stopped_at = max(losses(asked.workdir))
    output = finish(start("broken"))
    assert f"continuing after step {stopped_at}" in output
    assert losses(asked.workdir) == whole and len(whole) == STEPS


@pytest.mark.slow
def test_killed_over_and_over_it_ends_bit_for_bit_the_same(start, whole):
    """Moments drawn at random from before the first step on, every other one inside a save."""
    rng, kills = np.random.default_rng(int(time.time())), 0
    while kills < 6:
        process = start("often")
        if kills % 2 == 0:
            kill_in_a_save(process)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(1, 9))
            if process.poll() is not None:  # it came to its end before
                break
            kill(process)
        kills += 1
    assert kills >= 2
    process = start("often")
    finish(process)
    assert losses(process.workdir) == whole


def start_two(start, name):
    """The run over two processes, which find each other at a free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run = {"LCX_COORDINATOR": f"localhost:{port}", "LCX_PROCESSES": "2"}
    return [start(name, devices=2, **run, LCX_PROCESS_ID=str(i)) for i in range(2)]


def test_two_processes_train_as_one(start, whole):
    both = start_two(start, "two")
    for process in both:
        finish(process)
    two = losses(both[0].workdir)
    assert two.keys() == whole.keys()
    np.testing.assert_allclose([two[s] for s in range(1, 9)], [whole[s] for s in range(1, 9)], rtol=1e-4)
    assert (both[0].workdir / "checkpoints" / str(STEPS)).is_dir()


@pytest.mark.slow
def test_two_processes_killed_and_asked_to_stop_continue_bit_for_bit(start):
    """A SIGTERM to either one, as a cluster sends it before it takes a machine away, ends both after the same step."""
    for process in (unbroken := start_two(start, "two_whole")):
        finish(process)
    both = start_two(start, "two_broken")
    wait_for_step(both[0], 8)
    kill(*both)
    both = start_two(start, "two_broken")
    wait_for_step(both[0], 20)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        assert "the state is saved, the same command continues" in finish(process) or process is both[1]
    assert max(losses(both[0].workdir)) < STEPS
    for process in (both := start_two(start, "two_broken")):
        assert "continuing after step" in finish(process) or process is both[1]
    assert losses(both[0].workdir) == losses(unbroken[0].workdir)
