"""An event-driven job queue with a live monitor for training and running language models."""

__version__ = "0.1.0"
