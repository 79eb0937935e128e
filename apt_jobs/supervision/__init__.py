"""What keeps one attempt alive: lease, relay of events, and the process tree of torchrun."""
