"""Evaluation, generation and reports of a trained model."""
