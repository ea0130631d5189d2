"""How a student learns: what it begins as, losses, batches, steps, checkpoints."""
