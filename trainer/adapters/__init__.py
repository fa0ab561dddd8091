"""Adapters: small trained additions to a frozen model, in peft's files."""
