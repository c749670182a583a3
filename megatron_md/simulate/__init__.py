"""What a step costs on GPUs that are not there: the real step on fake CUDA tensors, and a roofline over its kernels."""
