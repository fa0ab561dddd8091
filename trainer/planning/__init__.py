"""What a run would cost, found without starting it: memory, work, time."""
