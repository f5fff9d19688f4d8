"""Molecules a second of `QM9Dataset.batch` on one core, for three ways of having the edge frames.

    python preprocess_qm9.py
    python -m benchmarks.qm9_batches                 # of data/cache/qm9
    python -m benchmarks.qm9_batches path/to/cache   # of another cache with bonds as edges

"rotations cached" is what `batch` does. "rotations computed" makes them from the relative positions of the batch.
"blocks cached" gathers Wigner blocks to degree 3 as if they were in the cache, which would have nine times the size
(it takes 1.5 GB of memory here). The last column goes on to the basis of a network of degree 3.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from dataloader.cache import CacheError, open_cache
from dataloader.qm9 import QM9Batch, QM9Dataset
from se3_transformer.model.basis import edge_frames, wigner_blocks

BATCH_SIZES = (32, 240, 1600)
MAX_DEGREE = 3
BLOCK_SIZE = sum((2 * degree + 1) ** 2 for degree in range(1, MAX_DEGREE + 1))  # numbers an edge; degree 0 is 1
MOLECULES = 9600  # in a round
ROUNDS = 5  # of which the median counts


def main():
    torch.set_num_threads(1)
    cache_dir = sys.argv[1] if len(sys.argv) > 1 else "data/cache/qm9"
    cache = open_cache(cache_dir, "python preprocess_qm9.py", {"graph": "bonds"})
    rotations = cache.arrays["rotations"]
    ways = {  # arrays of the data set, what gives frames, what gives the basis
        "rotations cached": (cache.arrays, lambda batch: None, lambda batch: batch.basis(MAX_DEGREE)),
        "rotations computed": (
            cache.arrays | {"rotations": rotations[:, :0]},  # rows without numbers cost nothing
            lambda batch: edge_frames(batch.graph.rel_pos),
            lambda batch: wigner_blocks(edge_frames(batch.graph.rel_pos), MAX_DEGREE),
        ),
        "blocks cached": (
            cache.arrays | {"rotations": np.ones((len(rotations), BLOCK_SIZE), np.float32)},
            lambda batch: None,
            lambda batch: None,
        ),
    }
    datasets = {way: QM9Dataset(arrays, cache.settings) for way, (arrays, *_) in ways.items()}
    size = len(cache.arrays["targets"])
    molecules = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:MOLECULES]
    print(f"{cache_dir}: {size:,} molecules; torch {torch.__version__}, one thread\n")
    print("molecules/s        batch size   with frames   with basis")
    for batch_size in BATCH_SIZES:
        batches = molecules.split(batch_size)
        for way, (_, *finishes) in ways.items():
            frames, basis = (rate(datasets[way], batches, finish) for finish in finishes)
            print(f"{way:18} {batch_size:10,} {frames:13,.0f} {basis:12,.0f}")


def rate(dataset: QM9Dataset, batches: tuple[torch.Tensor, ...], finish: Callable[[QM9Batch], object]) -> float:
    """Molecules a second of processor time: the median over rounds after a first one, which reads from disk."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began = time.process_time()
        for molecules in batches:
            finish(dataset.batch(molecules))
        seconds.append(time.process_time() - began)
    return sum(map(len, batches)) / statistics.median(seconds[1:])


if __name__ == "__main__":
    try:
        main()
    except CacheError as error:
        sys.exit(f"error: {error}")
