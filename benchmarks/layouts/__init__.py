"""What every layout deviates, sends, takes and holds, beside one process."""
