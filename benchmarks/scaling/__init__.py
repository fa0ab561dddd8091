"""What a step, the data and a checkpoint cost the host as ranks, samples and tensors grow."""
