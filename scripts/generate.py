"""Write every generated file again: `make generate`, or `python -m scripts.generate`."""

import sys
from pathlib import Path

from scripts import events_page, events_typescript, reference, rest_typescript

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {
    ROOT / "docs" / "reference" / "events.md": events_page.document,
    ROOT / "apt_jobs" / "web" / "ui" / "src" / "generated" / "events.ts": events_typescript.typescript,
    ROOT / "apt_jobs" / "web" / "ui" / "src" / "generated" / "rest.ts": rest_typescript.typescript,
}


def main() -> int:
    """Write the files and name those that changed."""
    texts = {path: generate() for path, generate in GENERATED.items()}
    texts |= {reference.FOLDER / name: text for name, text in reference.pages().items()}
    for path, text in texts.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
