"""The long-running worker processes and the embedded stack."""
