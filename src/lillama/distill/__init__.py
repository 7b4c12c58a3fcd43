"""Local distillation: a block learns to reproduce the activations of the block that it replaces."""
