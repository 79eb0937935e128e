"""The vocabulary: job specs, states and the one transition table. Pure Python, no I/O."""
