"""`python -m benchmarks [group or group/scenario]`: a table on the terminal, and JSON lines in build/bench.jsonl."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    checkpoint,
    compare,
    custom_metrics,
    data,
    fleet,
    generate,
    history,
    idle,
    insight,
    latency,
    monitor,
    queue,
    scrape,
    stream,
    stream_stall,
    submit,
    year,
)
from benchmarks.rows import Row

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "insight": insight.rows,
    "monitor": monitor.rows,
    "submit": submit.rows,
    "year": year.rows,
    "queue": queue.rows,
    "scrape": scrape.rows,
    "fleet": fleet.rows,
    "checkpoint": checkpoint.rows,
    "data": data.rows,
    "generate": generate.rows,
    "idle": idle.rows,
    "latency": latency.rows,
    "history": history.rows,
    "compare": compare.rows,
    "metrics": custom_metrics.rows,
    **{f"stream/{name}": scenario for name, scenario in stream.SCENARIOS.items()},
    "stream/training-stall": stream_stall.rows,
}
OUTPUT = Path("build/bench.jsonl")


def main() -> None:
    """Run one group, or all."""
    wanted = sys.argv[1:] or list(GROUPS)
    for name in wanted:
        if not any(_is_in(group, name) for group in GROUPS):
            sys.exit(f"unknown group {name}; there are: {', '.join(GROUPS)}")
    OUTPUT.parent.mkdir(exist_ok=True)
    table = Table("name", "ours", "peer", "ratio", "unit", "peer is")
    with OUTPUT.open("a") as file:
        for group in [group for name in wanted for group in GROUPS if _is_in(group, name)]:
            for row in GROUPS[group]():
                file.write(json.dumps(row.as_json()) + "\n")
                file.flush()
                cells = (row.name, f"{row.ours:,.4g}", f"{row.peer:,.4g}", f"{row.ratio:.3f}", row.unit, row.peer_name)
                table.add_row(*cells)
    Console().print(table)


def _is_in(group: str, name: str) -> bool:
    return group == name or group.startswith(f"{name}/")


main()
