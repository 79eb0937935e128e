"""The database: tables, claims, transitions, events, histories, checkpoints, access keys."""
