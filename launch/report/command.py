"""`tessera report`: one HTML file about a run, which needs nothing else."""

from pathlib import Path

from launch.exit_codes import FINISHED

USAGE = """usage: tessera report run=DIR [output=FILE]

Writes one HTML file that needs no network: a summary in plain words, the curves, evaluations,
samples, data by source, starts and faults, config and environment. Every run writes it at its end.

  run=DIR       the run's folder
  output=FILE   where the page goes; default: report.html in the run's folder
"""
KEYS = ("run", "output")


def main(arguments: list[str]) -> int:
    """Run `tessera report` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    options = dict(word.partition("=")[::2] for word in arguments)
    for key in options:
        if key not in KEYS:
            raise ValueError(f"{key!r} is no option of report; set run=DIR or output=FILE")
    if not options.get("run"):
        raise ValueError("run is missing; give the folder of a run: tessera report run=DIR")
    from launch.report.write import write_report

    output = Path(options["output"]).expanduser() if options.get("output") else None
    print(write_report(Path(options["run"]).expanduser(), output))
    return FINISHED
