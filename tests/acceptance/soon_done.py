"""Training code that has nothing to do: a job for tests of what happens around jobs."""

print("done")
