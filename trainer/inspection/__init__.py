"""What is in a step, for people: counts, and rows with their words."""
