"""Training code whose first attempt waits without end, as ranks do for a lost peer; a later one has nothing to do."""

import os
import time

from apt_jobs.supervision.process_tree import MARKER

ATTEMPT = os.environ[MARKER].split(":")[1]
while ATTEMPT == "1":
    time.sleep(1.0)
