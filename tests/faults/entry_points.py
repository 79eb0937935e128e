"""Trainings that behave badly: one ignores SIGTERM, one dies at once."""

import os
import signal
import time

from apt_jobs.events.kinds import LineLogged
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import RunFile


def ignore_sigterm(run_file: RunFile, spool: SpoolWriter) -> None:
    """Never ends by itself, whoever asks."""
    del run_file
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spool.append(LineLogged("info", "rank", "running"))
    while True:
        time.sleep(1.0)


def die(run_file: RunFile, spool: SpoolWriter) -> None:
    """Ends without a word, each time."""
    del run_file, spool
    os._exit(1)
