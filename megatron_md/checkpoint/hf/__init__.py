"""Checkpoints of Hugging Face: families, tensors, folders, conversion both ways."""
