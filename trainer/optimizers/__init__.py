"""Optimizers of our own, beside torch's: less state, rounding of bf16 weights, and Muon."""
