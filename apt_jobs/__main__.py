"""`python -m apt_jobs` is `apt-jobs`."""

from apt_jobs.cli import main

main()
