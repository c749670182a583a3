"""A run from its config to its end: checks, estimates, parts, directory."""
