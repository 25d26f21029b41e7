"""Whoever starts runs takes them along: no run trains on that nobody waits for."""

import os
import signal
import subprocess
import sys
import time

import pytest

from prac.lab.runs import children

# A run that would go on for a minute; and a command that waits for two of them, in the ways that there are.
CHILD = "import os, pathlib, sys, time; from prac.lab.runs import children; children.end_with_parent(); \
pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, which these may be, ignores it
from prac.lab.runs import children
children.command = lambda argv: [sys.executable, "-c", {child!r}, *argv]
try:
    children.run_all([[{folder!r}]] * 3, workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_runs_end_with_the_command(blow, tmp_path):
    script = PARENT.format(child=CHILD, folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert all(map(is_alive, pids))
        os.kill(parent.pid, blow)  # it alone: its children are not told
        assert parent.wait(30) != 0
        wait_for(lambda: not any(map(is_alive, pids)), 10)
        assert len(list(tmp_path.iterdir())) == 2  # the third never began
    finally:
        os.killpg(parent.pid, signal.SIGKILL) if parent.poll() is None else None


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_so_do_the_processes_of_torchrun(tmp_path):
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}, {str(tmp_path)!r}])"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    parent = subprocess.Popen([sys.executable, "-c", agent], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.iterdir()))
    (pid,) = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(pid), 10)


def test_a_child_whose_parent_is_gone_already_ends(tmp_path):
    """As where the command was killed while the child was still importing."""
    environment = {**os.environ, children.PARENT: "1" if os.getpid() != 1 else "2"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 143
    assert "the command that started this run has ended" in child.stderr


def test_exit_codes_come_in_order(monkeypatch):
    monkeypatch.setattr(children, "command", lambda argv: [sys.executable, "-c", f"raise SystemExit({argv[0]})"])
    assert children.run_all([["3"], ["0"], ["5"]], workers=2) == [3, 0, 5]
    assert children.launch(["7"], threads=1) == 7
