"""How a run survives: lock, commit protocol, saving and loading."""
