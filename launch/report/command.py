"""`tessera report`: one HTML file about a run, which needs nothing else."""

from pathlib import Path

from launch.exit_codes import FINISHED
from launch.words import options_of

USAGE = """usage: tessera report run=DIR [output=FILE]

Writes one HTML file that needs no network: a summary in plain words, the curves, evaluations,
samples, data by source, starts and faults, config and environment. Every run writes it at its end.

  run=DIR       the run's folder
  output=FILE   where the page goes; default: report.html in the run's folder
"""


def main(arguments: list[str]) -> int:
    """Run `tessera report` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    options = options_of("report", arguments, needed={"run": "DIR"}, optional=["output"])
    from launch.report.write import write_report

    output = Path(options["output"]).expanduser() if options.get("output") else None
    print(write_report(Path(options["run"]).expanduser(), output))
    return FINISHED
