"""What is trained: which head, which loss, which metrics."""
