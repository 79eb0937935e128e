"""Groups of commands that `apt-jobs` has besides those in cli.py, and what they print with."""
