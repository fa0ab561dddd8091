"""Images of rows: where they are stored, how they are read safely, and how batches get them."""
