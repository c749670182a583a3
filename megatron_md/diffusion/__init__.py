"""The diffusion mathematics: mask schedules, corruption, objectives, NELBO, sampler; nothing here knows Megatron."""
