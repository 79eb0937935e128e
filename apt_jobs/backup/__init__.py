"""Copies of a living service, each one consistent cut of database and files, and their restoration elsewhere."""
