"""Numbers that go wrong: what is found out about a step, and what the run does then."""
