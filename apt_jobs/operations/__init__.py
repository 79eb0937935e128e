"""What every door of the service does the same way: submit, say why a job waits, know who is alive."""
