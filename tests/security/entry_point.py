"""A registered entry point that writes down what its process was given."""

import json
import os
import sys

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import RunFile


def record(run_file: RunFile, spool: SpoolWriter) -> None:
    """What a rank sees: its command, its environment and the job's arguments."""
    del spool
    seen = {"command": sys.argv, "environment": dict(os.environ), "arguments": run_file.spec.arguments}
    (run_file.run_dir / "seen.json").write_text(json.dumps(seen))
