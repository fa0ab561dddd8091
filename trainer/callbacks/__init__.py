"""Optional listeners of the loop."""
