"""Every family against transformers, cell by cell: `python -m benchmarks.parity`."""
