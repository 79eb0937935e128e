"""Files that are found by an id or a name: where they are, and that they are nowhere else."""
