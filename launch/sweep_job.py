"""One job of a sweep: `tessera train`, which ends with the sweep that started it."""

import os
import sys

from launch.cli import main as command
from launch.exit_codes import INTERNAL
from trainer.parent_death import die_with


def main() -> int:
    """Run as a child of the sweep; what replaces this process inherits the tie."""
    if not die_with(int(sys.argv[1])):
        os._exit(INTERNAL)
    return command(["train", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
