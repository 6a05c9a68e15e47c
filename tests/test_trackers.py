"""Where metrics go: metrics.jsonl is exact across restarts, W&B and TensorBoard never end a run, and what a person sees."""

import dataclasses
import json
import logging
import pathlib
import subprocess
import sys
import types

import pytest
from rich.console import Console

from lcx.train_loop import screen, trackers
from lcx.train_loop.settings import TrackConfig
from tests.experiments import small


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No key, no netrc, and a server that nobody can reach, whatever the machine's own settings are."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "home").mkdir()


@pytest.fixture
def open_all(tmp_path):
    """open_all(resumed_at, **fields of TrackConfig) -> the trackers of a run in `tmp_path`, closed when the test ends."""
    opened = []

    def call(resumed_at=0, **fields):
        found = trackers.open_trackers(TrackConfig(**fields), tmp_path, "a run", {"model": {"layers": 2}}, resumed_at)
        opened.extend(found)
        return found

    yield call
    for tracker in opened:
        tracker.close()


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- metrics.jsonl


def steps(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(open_all, tmp_path):
    (jsonl,) = open_all(wandb="disabled")
    jsonl.log(1, {"loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}
    jsonl.close()


def test_a_run_that_starts_anew_keeps_the_lines_of_the_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0, 3.0):
        jsonl = trackers.Jsonl(path, 0)
        jsonl.log(1, {"loss": loss})
        jsonl.close()
    losses = {file.name: json.loads(file.read_text())["loss"] for file in tmp_path.glob("*.jsonl")}
    assert losses == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}


@pytest.mark.parametrize("resumed_at,kept", [(4, [2, 4]), (5, [2, 4]), (9, [2, 4, 6])])
def test_steps_that_will_be_done_again_are_dropped(tmp_path, resumed_at, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)))
    jsonl = trackers.Jsonl(path, resumed_at)
    jsonl.log(10, {"loss": 0.5})
    jsonl.close()
    assert steps(path) == [*kept, 10]


@pytest.mark.parametrize("cut", ["", '{"ste', '{"step": 6, "loss": 1', '{"loss": 1.0}'])
def test_a_line_cut_short_by_a_kill_is_dropped_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n' + cut)
    jsonl = trackers.Jsonl(path, 100)
    jsonl.log(5, {"loss": 0.5})
    jsonl.close()
    assert steps(path) == [2, 4, 5]


def test_a_kill_while_the_file_is_rewritten_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n')
    monkeypatch.setattr(trackers.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trackers.Jsonl(path, 2)
    assert steps(path) == [2, 4]


# ---- W&B


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A workdir in which a process of its own logged three steps to W&B with mode auto and no key."""
    workdir = tmp_path_factory.mktemp("offline")
    code = (
        "import pathlib\n"
        "from lcx.train_loop import trackers\n"
        "from lcx.train_loop.settings import TrackConfig\n"
        f"opened = trackers.open_trackers(TrackConfig(), pathlib.Path({str(workdir)!r}), 'a run', {{'layers': 2}}, 0)\n"
        "for step in (1, 2, 3):\n"
        "    [tracker.log(step, {'loss': 1.0 / step}) for tracker in opened]\n"
        "[tracker.close() for tracker in opened]\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(workdir), "WANDB_BASE_URL": "http://127.0.0.1:9", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout + done.stderr


def test_auto_without_a_key_logs_offline_into_the_workdir(offline_run):
    workdir, said = offline_run
    (file,) = workdir.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0 and file.stem == f"run-{(workdir / 'wandb_id').read_text()}"
    assert steps(workdir / "metrics.jsonl") == [1, 2, 3]
    assert said == ""


def test_what_was_logged_offline_can_be_read_back(offline_run):
    (file,) = offline_run[0].glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "leet" in done.stderr:
        pytest.skip("this wandb cannot read its offline files")
    text = done.stdout
    assert done.returncode == 0, done.stderr
    assert "loss" in text and "0.3333333333333333" in text


class FakeWandb(types.ModuleType):
    """wandb that notes how it was started and fails where it is told to."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.modes, self.options, self.lines, self.fails = [], [], [], fails
        self.Settings = lambda **settings: settings

    def init(self, mode, **options):
        self.modes.append(mode)
        self.options.append(options)
        if mode in self.fails:
            raise RuntimeError(f"no {mode}\nand a long story")
        return types.SimpleNamespace(log=self.log, finish=lambda: None)

    def log(self, metrics, step):
        if "log" in self.fails:
            raise OSError("disk full")
        self.lines.append((step, metrics))


@pytest.fixture
def fake_wandb(monkeypatch):
    def make(*fails):
        module = FakeWandb(fails)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return make


@pytest.mark.parametrize(
    "mode,environment,started",
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
    ],
)
def test_the_mode_of_wandb(open_all, monkeypatch, fake_wandb, mode, environment, started):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = fake_wandb()
    assert len(open_all(wandb=mode)) == 2
    assert module.modes == [started]


def test_a_key_in_netrc_counts(open_all, tmp_path, fake_wandb):
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    module = fake_wandb()
    open_all()
    assert module.modes == ["online"]


def test_a_continued_run_keeps_its_wandb_id(open_all, fake_wandb):
    module = fake_wandb()
    open_all(), open_all(resumed_at=3)
    first, second = module.options
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_disabled_does_not_even_import_wandb(open_all, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert len(open_all(wandb="disabled")) == 1


def test_no_way_online_goes_on_offline_with_one_warning(open_all, tmp_path, fake_wandb, caplog):
    module = fake_wandb("online")
    assert len(open_all(wandb="online")) == 2
    assert module.modes == ["online", "offline"]
    (warning,) = warnings_of(caplog)
    assert "no online" in warning and "long story" not in warning and str(tmp_path / "wandb") in warning


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_wandb_that_cannot_start_never_ends_the_run(open_all, tmp_path, fake_wandb, caplog, mode):
    fake_wandb("online", "offline")
    (jsonl,) = open_all(wandb=mode)
    jsonl.log(1, {"loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    assert "W&B is off for this run: no offline (metrics.jsonl goes on)" in warnings_of(caplog)


def test_a_tracker_that_fails_while_logging_warns_once_and_is_left_alone(open_all, tmp_path, fake_wandb, caplog):
    module = fake_wandb("log")
    opened = open_all(wandb="offline")
    for step in (1, 2, 3):
        for tracker in opened:
            tracker.log(step, {"loss": 1.0})
    for tracker in opened:
        tracker.close()
    assert warnings_of(caplog) == ["W&B stopped recording: disk full (metrics.jsonl goes on)"]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3] and module.lines == []


def test_metrics_jsonl_itself_is_not_guarded(open_all):
    """It is the run's record: a full disk must not pass in silence."""
    (jsonl,) = open_all(wandb="disabled")
    jsonl.close()
    with pytest.raises(ValueError):
        jsonl.log(1, {"loss": 1.0})


# ---- TensorBoard


def test_tensorboard_writes_event_files(open_all, tmp_path):
    pytest.importorskip("tensorboardX")
    _, board = open_all(wandb="disabled", tensorboard=True)
    board.log(1, {"loss": 1.5, "held_out_by_position": [{"start": 0}]})
    board.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"loss" in file.read_bytes()


def test_a_tensorboard_that_cannot_start_never_ends_the_run(open_all, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert len(open_all(wandb="disabled", tensorboard=True)) == 1
    (warning,) = warnings_of(caplog)
    assert warning.startswith("TensorBoard is off for this run")


def test_tensorboard_without_its_package_is_a_mistake_that_is_found_with_the_config(monkeypatch):
    from lcx.registry import UserError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"track.tensorboard=True needs the extra: pip install 'lcx\[tensorboard\]'"):
        small(track__tensorboard=True)


# ---- the screen

LINE = {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-3, "tokens_per_second": 12_345.0, "step_seconds": 0.5, "skipped": 0}
RECORD = {
    "parameters": {"total": 1_234_567},
    "pattern": ["ring"],
    "device": {"count": 8, "kind": "cpu"},
    "mesh": {"sizes": {"data": 1, "seq": 8}},
    "implementations": {"attention": [{"winner": "chunked"}]},
    "compiled_step_bytes": {"arguments": 2**20, "outputs": 2**20, "temporary": 2**30, "peak": 2**30 + 2**20},
}


def test_plain_lines_where_there_is_no_terminal(capsys):
    shown = screen.Screen(20)
    shown.start(0)
    shown.advance(10)
    shown.line(10, LINE)
    shown.line(20, LINE | {"mfu": 0.415, "skipped": 2})
    shown.stop()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 10/20  loss 2.5000  |grad| 1.25  lr 1.00e-03  12.3K tok/s  0.5 s/step  0s to go")
    assert "MFU 41.5 %" in second and "skipped 2" in second
    assert "\x1b" not in first + second and "\r" not in first + second


def test_a_terminal_gets_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(screen, "Console", lambda **options: Console(force_terminal=True, width=100, **options))
    shown = screen.Screen(20)
    shown.start(5)
    shown.advance(10)
    shown.stop()
    out = capsys.readouterr().out
    assert "\x1b" in out and "10/20" in out
    with shown.doing("compiling"):
        pass
    assert "compiling" in capsys.readouterr().out


def test_what_takes_long_is_named_where_there_is_no_terminal(capsys):
    with screen.Screen(20).doing("compiling the training step"):
        assert capsys.readouterr().out == "compiling the training step ...\n"


def opening(capsys, scale: str, workdir: str, full_length: int = 1024) -> str:
    e, shown = dataclasses.replace(small(scale=scale), full_length=full_length), screen.Screen(20)
    shown.announce(e)
    shown.opening(e, RECORD, workdir)
    return capsys.readouterr().out


def test_a_rehearsal_says_so_first_with_both_lengths(capsys):
    first, *rest = opening(capsys, "rehearsal", "runs/mine").splitlines()
    assert first.startswith("REHEARSAL of base") and "64 tokens" in first and first.endswith("the real experiment has 1,024.")
    assert any("1.23M parameters" in line for line in rest) and any("attention: chunked" in line for line in rest)


def test_a_rehearsal_at_the_real_length_says_so(capsys):
    first = opening(capsys, "rehearsal", "runs/mine", full_length=64).splitlines()[0]
    assert first.endswith("64 tokens a sequence; as many as the real experiment has.")


def test_a_full_run_does_not_speak_of_rehearsals(capsys):
    assert "REHEARSAL" not in opening(capsys, "full", "runs/mine")


def test_a_long_path_is_shown_whole(capsys):
    path = "/a/very/long/path/" + "of/many/folders/" * 10 + "workdir"
    assert path in opening(capsys, "full", path)


def test_only_the_first_process_writes(monkeypatch, capsys):
    monkeypatch.setattr(screen.jax, "process_index", lambda: 1)
    screen.Screen(20).say("hello")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (12.3, "12.3"),
        (999, "999"),
        (999.9, "1K"),
        (1000, "1K"),
        (4560, "4.56K"),
        (999_999, "1M"),
        (1_234_567, "1.23M"),
        (8.03e9, "8.03G"),
        (7.05e13, "70.5T"),
        (-4560, "-4.56K"),
    ],
)
def test_figures(value, text):
    assert screen.figure(value) == text


@pytest.mark.parametrize(
    "seconds,text",
    [(0, "0s"), (5.9, "5s"), (60, "1m00s"), (184, "3m04s"), (3599, "59m59s"), (3720, "1h02m"), (90_000, "25h00m")],
)
def test_durations(seconds, text):
    assert screen.duration(seconds) == text


def test_a_duration_that_is_not_known():
    assert screen.duration(float("inf")) == screen.duration(float("nan")) == "?"


def test_bytes():
    assert (screen.gib(2**20), screen.gib(3 * 2**29)) == ("1.0 MiB", "1.50 GiB")
