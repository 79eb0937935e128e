"""A worker whose jobs run on allocations of Slurm: claims as any worker does, submits, and watches."""
