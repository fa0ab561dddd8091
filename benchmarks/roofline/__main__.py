"""What a step costs, what it would cost at this machine's limits, and where the difference goes.

    python -m benchmarks.roofline                    all cases, as two tables
    python -m benchmarks.roofline only=llama compile=true threads=1 precision=fp32

Each case runs in a process of its own, with the engine and loop of `tessera train`: nine steps as
they are, interleaved with the step's own products one by one; one step whose operations are
counted; two under torch's profiler. The floor is what products cost at the rate of a square product
and what the optimizer moves at the rate of memory; it leaves out all else that a step must do.
"""

import sys

from benchmarks.in_turn import append_row, read_texts
from benchmarks.roofline.cases import CASES
from benchmarks.roofline.cost import OPTIONS, RESULTS, measure
from benchmarks.roofline.tables import lines
from launch.exit_codes import BAD_CONFIG, FINISHED


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/roofline.jsonl; return the exit code."""
    try:
        options = read_texts(words, dict(OPTIONS))
        names = [name for name in CASES if options["only"] in name]
        if not names:
            raise ValueError(f"only={options['only']} is none of {', '.join(CASES)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    row = measure(names, options)
    print("\n".join(lines(row)))
    append_row(RESULTS, row)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
