"""Sweeps: one config in many variants, seeds and sizes, run in parallel processes, resumable, with one table."""
