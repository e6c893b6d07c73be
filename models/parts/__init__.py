"""What architectures share: norms, rotary embeddings, attention and its kernels, the KV cache."""
