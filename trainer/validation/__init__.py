"""Validation: answers to held-out questions, written by the model and compared with the data's."""
