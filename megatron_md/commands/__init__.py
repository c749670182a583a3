"""Commands of `megatron-md` that belong to no other part: each module has `add_arguments(parser)` and `run(args)`."""
