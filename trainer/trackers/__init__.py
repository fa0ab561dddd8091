"""Curves elsewhere: wandb and TensorBoard, fed beside the training from metrics.jsonl."""
