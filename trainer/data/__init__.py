"""From raw text to exact, packed steps."""
