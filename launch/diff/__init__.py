"""Two runs side by side: what differs, and from which step on. No torch, no numpy."""
