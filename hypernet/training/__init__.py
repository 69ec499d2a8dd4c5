"""Training with Lightning: modules, losses, optimizers, callbacks, run state."""
