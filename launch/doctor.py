"""`tessera doctor`: what of this machine, or of all hosts of a job, would stop a run."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from launch.examine.finding import RANKS, Finding, line, screen, verdict
from launch.examine.folder import examine_folder
from launch.examine.machine import examine_machine
from launch.examine.ranks import default_processes, examine_here
from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.floors import FLOORS
from launch.slurm_step import ranks_of_step
from launch.truth import truth
from launch.words import options_of

USAGE = """usage: tessera doctor [processes=N] [runs=DIR] [quick=true] [json=true]

Looks at versions, limits, memory, the folder of runs and the clock; then starts N processes (one
per GPU; without GPUs, two), tries every kernel, and times devices, collectives and links.

  tessera doctor                                             this machine
  tessera doctor quick=true                                  nothing is timed
  srun tessera doctor                                        all nodes of an allocation
  torchrun --nnodes 2 --nproc-per-node 8 ... -m launch doctor

Exit code 1: something is below what Tessera needs, or much slower than its peers.
"""


class Report:
    """What was found, shown as it comes: on a terminal, as plain lines, or not before the end."""

    def __init__(self, *, is_shown: bool) -> None:
        self.findings: list[Finding] = []
        self._packages: list[str] = []
        self.is_shown = is_shown
        self.is_terminal = is_shown and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.width = min(shutil.get_terminal_size().columns, 120)
        self.has_colors = self.is_terminal and "NO_COLOR" not in os.environ

    def add(self, said: Finding | str) -> None:
        """Take in a finding, or what is being done now."""
        self._clear()
        if isinstance(said, Finding):
            self.findings.append(said)
            if said.is_fine and said.check in FLOORS:  # some twenty: one line in all
                self._packages.append(f"{said.check} {said.found}")
                return
            if self._packages:
                together, self._packages = ", ".join(self._packages), []
                self._show(Finding(check="packages", found=together))
            self._show(said)
        elif self.is_terminal:
            print(f"  ...   {said}"[: self.width - 1], end="", flush=True)

    def _show(self, finding: Finding) -> None:
        is_screen = self.is_terminal
        self.say(screen(finding, self.width, self.has_colors) if is_screen else line(finding))

    def say(self, text: str) -> None:
        if self.is_shown:
            print(text, flush=True)

    def close(self) -> bool:
        """Say the verdict; return whether all is fine."""
        self._clear()
        self.say(verdict(self.findings))
        return all(finding.is_fine for finding in self.findings)

    def _clear(self) -> None:
        if self.is_terminal:
            print("\r\x1b[K", end="")


def main(arguments: list[str]) -> int:
    """Run all checks and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    defaults = {"processes": "", "runs": "runs", "quick": "false", "json": "false"}
    options = options_of("doctor", arguments, defaults=defaults)
    is_json, is_quick = truth("json", options["json"]), truth("quick", options["quick"])
    runs = Path(options["runs"]).expanduser()
    os.environ |= ranks_of_step(os.environ)
    if "RANK" in os.environ:
        return _as_rank(options["processes"], runs, is_json=is_json, is_quick=is_quick)
    processes = _processes(options["processes"])
    report = Report(is_shown=not is_json)
    report.say(f"{socket.gethostname()}:")
    _take(report, _look(runs, is_quick))
    report.say(f"{processes} process{'es' if processes > 1 else ''}:")
    report.add("importing torch")
    _take(report, examine_here(processes, runs, is_quick=is_quick))
    return _end(report, is_json)


def _as_rank(processes: str, runs: Path, *, is_json: bool, is_quick: bool) -> int:
    """Be one rank of a job: rank 0 speaks for all, and all return the same code."""
    from launch.examine.rank import examine_ranks
    from launch.worker import leave, placement_from

    placement = placement_from(os.environ)
    if processes and int(processes) != placement.world_size:
        raise ValueError(
            f"processes={processes} has no effect in a job of {placement.world_size} ranks; "
            "leave it out"
        )
    report = Report(is_shown=placement.is_main and not is_json)
    report.say(f"{socket.gethostname()}, the first host:")
    if placement.is_main:
        _take(report, _look(runs, is_quick))
    report.say(f"{placement.world_size} ranks:")
    _take(report, examine_ranks(placement, runs, is_quick=is_quick))
    if not placement.is_main:
        for finding in report.findings:
            if finding.check == RANKS:  # nobody else knows
                print(line(finding), file=sys.stderr)
    leave(_end(report, is_json and placement.is_main))


def _look(runs: Path, is_quick: bool) -> Iterator[Finding | str]:
    yield from examine_machine()
    yield "looking at the folder of runs"
    yield from examine_folder(runs, is_quick=is_quick)


def _take(report: Report, said: Iterator[Finding | str]) -> None:
    for each in said:
        report.add(each)


def _end(report: Report, is_json: bool) -> int:
    is_fine = report.close()
    if is_json:
        findings = [asdict(finding) for finding in report.findings]
        told = {"is_ready": is_fine, "verdict": verdict(report.findings), "findings": findings}
        print(json.dumps(told, indent=1))
    return FINISHED if is_fine else CHECK_FAILED


def _processes(text: str) -> int:
    if not text:
        return default_processes(os.environ)
    if not text.isdigit() or not int(text):
        raise ValueError(f"processes={text} starts nothing; set it to 1 or more")
    return int(text)
