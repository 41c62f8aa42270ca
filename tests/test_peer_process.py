"""Another interpreter beside ours: its answers, and one line for whatever goes wrong with it."""

import sys

import pytest

from experiments import peer_process
from experiments.peer_process import Peer
from moejax.errors import UserError


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a peer's script."""
    monkeypatch.setattr(peer_process, "__file__", str(tmp_path / "x.py"))
    (tmp_path / "peers").mkdir()

    def write(code):
        (tmp_path / "peers" / "peer.py").write_text(code)
        return sys.executable, "peer.py"

    return write


def test_answers_one_by_one_and_all(script):
    python = script(
        'import sys\nprint("by the way")\nprint(\'{"a": 1}\', flush=True)\nfor _ in sys.stdin: print("{}", flush=True)'
    )
    with Peer(*python) as peer:
        assert peer.answer() == {"a": 1}
        assert peer.go_on() == peer.go_on() == {}
    with Peer(*script('print(\'{"a": 1}\\n{"a": 2}\')')) as peer:
        assert list(peer) == [{"a": 1}, {"a": 2}]


def test_processes_it_started_end_with_it(script, tmp_path):
    """Else they hold its output open, and leaving waits for them."""
    late = "import pathlib, sys, time; time.sleep(5); pathlib.Path(sys.argv[1]).touch()"
    python = script(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {late!r}, {str(tmp_path / 'lived')!r}])\n"
        "print('{}', flush=True)\ninput()"
    )
    with Peer(*python) as peer:
        peer.answer()
    assert not (tmp_path / "lived").exists()


def test_one_line_for_what_goes_wrong(script):
    python, name = script('import sys\nprint("{}", flush=True)\ninput()\nsys.exit("no room")')
    with Peer(python, name) as peer:
        assert peer.answer() == {}
        with pytest.raises(UserError, match=r"--peer_python=.* could not run peer\.py: no room$"):
            peer.go_on()
        with pytest.raises(UserError, match="no room"):  # the pipe is broken now
            peer.go_on()
    with Peer(*script("")) as peer, pytest.raises(UserError, match="it ended without an answer"):
        peer.answer()
    with pytest.raises(UserError, match=r"--peer_python=/no/python: can't be run \(No such file or directory\)"):
        Peer("/no/python", "peer.py")
