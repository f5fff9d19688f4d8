"""Data sets: simulation and reading of files, the cache on disk, and batches cut from it."""
