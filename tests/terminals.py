"""A terminal for tests: what a person would see of what a program writes into it."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import rich.console

TOKEN = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Understands what status lines need: returns, erased lines, one line up, the cursor."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row, self.column = 0, 0
        self.has_cursor = True

    def feed(self, text: str) -> None:
        for private, number, code, control, written in TOKEN.findall(text):
            if written:
                self._write(written)
            elif control == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif control == "\r":
                self.column = 0
            elif private and number == "25":
                self.has_cursor = code == "h"
            elif code == "K":
                self.lines[self.row] = "" if number == "2" else self.lines[self.row][: self.column]
            elif code == "A":
                self.row -= int(number or 1)
            else:
                assert code == "m", (private, number, code)

    def _write(self, text: str) -> None:
        for letter in text:
            if self.column == self.columns:
                self.feed("\r\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


class Seen(NamedTuple):
    """What came of some work."""

    screen: Screen
    written: bytes
    code: int


def seen(work: Callable[[], None], columns: int, environment: dict[str, str]) -> Seen:
    """Do some work in a child whose terminal this is; return what it shows at the end."""
    pid, master = pty.fork()
    if pid == 0:
        code = 1
        try:
            size = struct.pack("HHHH", 24, columns, 0, 0)
            fcntl.ioctl(1, termios.TIOCSWINSZ, size)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            rich._console = rich.console.Console(width=columns, _environ=environment)
            work()
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    written = b""
    with suppress(OSError):  # the child has ended
        while data := os.read(master, 1 << 16):
            written += data
    os.close(master)
    _, status = os.waitpid(pid, 0)
    screen = Screen(columns)
    screen.feed(written.decode())
    return Seen(screen=screen, written=written, code=os.waitstatus_to_exitcode(status))
