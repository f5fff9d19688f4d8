"""The experiments: network, loss and report of each, for the training scripts."""
