"""An event-driven job queue with a live monitor for training and running language models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("apt-jobs")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0.0.0"
