"""What training scripts share: settings, the training loop, checkpoints."""
