"""A terminal that closes, or a lost ssh: what trains in it saves and ends, but not under nohup."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

LIMIT_SECONDS = 150.0
LOOP = """
import sys, time, types
from launch.signals import handle_signals
request = types.SimpleNamespace(is_set=False, is_polled=True, reason="")
handle_signals(request, says=True)
print("ready", flush=True)
while not request.is_set:
    time.sleep(0.01)
time.sleep(0.5)  # for the signals that come behind the first one
print("saved", flush=True)  # a terminal that has gone would answer with an error
print("saved", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    file.write(request.reason)
"""


def test_closed_terminal_is_a_stop_however_often_it_says_so(tmp_path: Path) -> None:
    pid, master = pty.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests does not count
            os.execv(sys.executable, [sys.executable, "-c", LOOP, str(tmp_path / "reason")])
        finally:
            os._exit(1)
    said = b""
    while b"ready" not in said:
        said += os.read(master, 1 << 10)
    os.kill(pid, signal.SIGHUP)  # from the shell
    os.close(master)  # and from the kernel
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "reason").read_text() == "SIGHUP"


def test_closed_terminal_is_nothing_to_what_nohup_has_started(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-c", LOOP, str(tmp_path / "reason")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0
    assert (tmp_path / "reason").read_text() == "SIGTERM"
