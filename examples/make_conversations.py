"""Write small data sets to fine-tune on: `python make_conversations.py [FOLDER]`.

conversations.jsonl has `messages` of one to three turns, preferences.jsonl pairs of a right and a wrong answer.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

NUM_ROWS = 600
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    draw = random.Random(1)  # noqa: S311  # the same rows each time
    conversations = [{"messages": turn(draw) + turn(draw) * draw.randint(0, 1)} for _ in range(NUM_ROWS)]
    write(folder / "conversations.jsonl", conversations)
    write(folder / "preferences.jsonl", [preference(draw) for _ in range(NUM_ROWS)])


def turn(draw: random.Random) -> list[dict[str, str]]:
    """A question about a number, and its answer."""
    number = draw.randrange(len(NUMBERS) - 1)
    return [
        {"role": "user", "content": f"What comes after {NUMBERS[number]}?"},
        {"role": "assistant", "content": f"{NUMBERS[number + 1].capitalize()}."},
    ]


def preference(draw: random.Random) -> dict[str, Any]:
    question, answer = turn(draw)
    wrong = {"role": "assistant", "content": "I do not know."}
    return {"prompt": [question], "chosen": [answer], "rejected": [wrong]}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
