"""`python -m benchmarks [group]`: a table on the terminal, and JSON lines in build/bench.jsonl."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import checkpoint, history, idle, insight, monitor, stream, submit
from benchmarks.rows import Row

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "insight": insight.rows,
    "monitor": monitor.rows,
    "submit": submit.rows,
    "checkpoint": checkpoint.rows,
    "idle": idle.rows,
    "stream": stream.rows,
    "history": history.rows,
}
OUTPUT = Path("build/bench.jsonl")


def main() -> None:
    """Run one group, or all."""
    wanted = sys.argv[1:] or list(GROUPS)
    unknown = set(wanted) - set(GROUPS)
    if unknown:
        sys.exit(f"unknown group {', '.join(sorted(unknown))}; there are: {', '.join(GROUPS)}")
    OUTPUT.parent.mkdir(exist_ok=True)
    table = Table("name", "ours", "peer", "ratio", "unit", "peer is")
    with OUTPUT.open("a") as file:
        for group in wanted:
            for row in GROUPS[group]():
                file.write(json.dumps(row.as_json()) + "\n")
                file.flush()
                cells = (row.name, f"{row.ours:,.4g}", f"{row.peer:,.4g}", f"{row.ratio:.3f}", row.unit, row.peer_name)
                table.add_row(*cells)
    Console().print(table)


main()
