"""Runnable comparisons with peers: both sides in turn in one command, a result row each."""
