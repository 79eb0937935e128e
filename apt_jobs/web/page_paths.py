"""The addresses of the user interface's pages; `PAGES` of ui/src/stores/router.svelte.ts names the page of each."""

import re

PAGE_PATHS = (
    "/",
    "/jobs/{job_id}",
    "/sweeps",
    "/sweeps/{sweep_id}",
    "/compare",
    "/checkpoints",
    "/generate",
    "/schedules",
    "/workers",
)
PATTERN = "|".join(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) for path in PAGE_PATHS)  # of all of them
