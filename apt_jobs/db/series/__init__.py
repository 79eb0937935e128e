"""Numbers of steps: how they are stored, downsampled and read."""
