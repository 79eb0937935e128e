"""What runs inside torchrun: model, data, loop, checkpoints and the gradient monitor."""
