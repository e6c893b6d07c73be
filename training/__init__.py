"""What a training run is made of: optimizer, checkpoints, the guard, processes, metrics."""
