"""Training: settings, checkpoints, weights of other projects, the device, the log of a run."""
