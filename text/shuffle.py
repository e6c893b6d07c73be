"""A seeded order of any number of windows, without a table of them."""

import numpy as np


def permute(places, n, keys):
    """Where each of `places` (ints below n) goes in a shuffle of range(n) that needs no memory.

    A Feistel network on the smallest even number of bits that hold n; what lands at n or beyond is
    sent through again.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    x = places.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for key in keys:
            # multiply and fold, twice: the top bits are mixed
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo &= x >= n
    return x.astype(np.int64)
