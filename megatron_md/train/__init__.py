"""The training loop and what joins it to megatron-core."""
