"""Config files and the training command. Fixtures of every session, so lcx is imported only in those that use them."""

import sys

import pytest

BASE = "config = base.get_config()\nconfig.update(name='mine', scale='full')\nconfig.mesh.seq = 1\nconfig.model.dtype = 'float32'"


@pytest.fixture
def config_file(tmp_path):
    """config_file(lines) -> the path of a config file that runs them on the base config."""

    def write(lines="", start=BASE):
        body = "\n".join(f"    {line}" for line in f"{start}\n{lines}\nreturn config".splitlines())
        path = tmp_path / "mine.py"
        path.write_text(f"from configs import base\nimport ml_collections\n\n\ndef get_config():\n{body}\n")
        return str(path)

    return write


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*arguments) -> (exit status, stderr, the experiment that would have run) of `python -m lcx.train`."""
    from lcx import command, train
    from lcx.train_loop import loop

    started = []

    class NoRun:
        def __init__(self, chosen, workdir):
            started.append(chosen)

        def train(self):
            return {"ending": "finished"}

    monkeypatch.setattr(loop, "Run", NoRun)
    monkeypatch.setattr(command, "prepare_platform", lambda: None)

    def call(*arguments):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["lcx.train", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main(train.run)
        return ended.value.code, capsys.readouterr().err, started[0] if started else None

    return call


@pytest.fixture
def mistake(cli):
    """mistake(*arguments) -> the text after `error: `, when the status is 2 and nothing started."""

    def call(*arguments):
        status, err, ran = cli(*arguments)
        assert status == 2 and ran is None, (status, err)
        assert err.startswith("error: ") and "Traceback" not in err
        return err.removeprefix("error: ").removesuffix("\n")

    return call


def says(text, *parts):
    """The text is one line and holds every part."""
    assert "\n" not in text
    assert all(part in text for part in parts), (text, parts)
