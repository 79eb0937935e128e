"""Turn events of ranks into incidents. Pure: no torch, no database."""
