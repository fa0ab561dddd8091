"""`tessera sync`: send what a run's trackers do not have yet, each point once."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.words import options_of

if TYPE_CHECKING:
    from trainer.trackers.protocol import TrackerSpec

USAGE = """usage: tessera sync run=DIR

  tessera sync run=runs/demo    send the points of metrics.jsonl that the run's trackers lack

The server is asked what it has: it may be broken off, and started as often as you like.
"""


def main(arguments: list[str]) -> int:
    """Run `tessera sync`; return 0 when every tracker has all points, else 1."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    options = options_of("sync", arguments, needed={"run": "DIR"})
    folder = Path(options["run"]).expanduser().absolute()
    from trainer.trackers.delivery import read_settings

    are_sent = [_send(folder, name, spec) for name, spec in read_settings(folder).items()]
    return FINISHED if all(are_sent) else CHECK_FAILED


def _send(folder: Path, name: str, spec: "TrackerSpec") -> bool:
    """Send to one tracker, and say how it went."""
    from trainer.files import exclusive
    from trainer.trackers.delivery import Delivery
    from trainer.trackers.protocol import FOLDER
    from trainer.trackers.side import first_line

    spec.check()
    delivery = Delivery(spec, folder)
    try:
        with exclusive(folder / FOLDER / f"{name}.lock", on_wait=lambda: _refuse(name)):
            delivery.run(is_over=lambda: True, is_complete=lambda: True)
    except ValueError:
        raise
    except Exception as error:  # of the library's own kind: one line here, and the others' turn
        print(f"tessera: {name}: {first_line(error)}; try again later", file=sys.stderr)
        return False
    print(f"{name}: sent {delivery.num_rows} steps, has the curves up to {delivery.last_step}")
    return True


def _refuse(name: str) -> None:
    raise ValueError(
        f"{name} is being fed by the run itself, which goes on; wait for its end, or for the "
        "process that sends"
    )
