"""What architectures share.

layers        norms, rotary embeddings, activations, initialisations
kernels       attention and the loss, chosen by device
kv_cache      the cache of generation, and rows of several documents
attention     kinds of attention: grouped, windowed, latent, …
batchnorm     kinds of batch normalisation
ngrams        counted n-grams
construction  constructing a model that fits into memory
"""
