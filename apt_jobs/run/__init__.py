"""What a user's script has of its job: `apt_jobs.current_run()`. Standard library only."""
