"""What every stage runs on: mesh, train state, the training loop, checkpoints, writers, workdir."""
