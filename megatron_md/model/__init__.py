"""The denoiser: megatron-core's transformer with a bidirectional layer spec and a head at predicted positions only."""
