"""The words of docs/glossary.md: what is not said there is not said in names, prose or messages either."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Banned anywhere in Python, TypeScript, Svelte and Markdown: as whole words, in any case.
BANNED = re.compile(
    r"(?<![A-Za-z])(for[_ ]ever|own[_ ]code|own[_ ]place|obey(s|ed)?|fruitless|let_go|fall(s|ing)?_behind|fall_in"
    r"|fell_behind"
    r"|tell_first|say_started|look_after|end_broken|finish_broken|choose_tokens|hand(s|ed)?_on|thinned|from afar"
    r"|num_broken|carry_out|anew|outlets?)(?![A-Za-z])",
    re.IGNORECASE,
)
IDENTIFIER_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# Banned as a part of a name (`_tell_norms`, `hintPublisher`), where prose may still need the word.
BANNED_PARTS = frozenset(
    {"tell", "told", "say", "said", "hear", "heard", "pump", "hint", "hints", "settle", "fruitless", "outlet"}
)
ALLOWED_NAMES = {"hint", "hints", "get_type_hints", "tell"}  # type hints, and a file's method
EXEMPT = {"docs/glossary.md", "tests/architecture/test_words.py", "CHANGELOG.md"}
SUFFIXES = (".py", ".ts", ".svelte", ".md", ".toml", ".yml")


def _files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    return [
        ROOT / name
        for name in listed
        if name.endswith(SUFFIXES) and name not in EXEMPT and not name.startswith("migrations/versions/")
    ]


def _names_of(source: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_no_file_says_a_banned_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := BANNED.search(line))
    ]
    assert found == []


def test_no_name_has_a_banned_part() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("apt_jobs", "benchmarks")
        for name in sorted(_names_of(path.read_text(encoding="utf-8")) - ALLOWED_NAMES)
        if BANNED_PARTS & {part.lower() for part in IDENTIFIER_PARTS.findall(name)}
    ]
    assert found == []


@pytest.mark.parametrize("text", ["wait for ever", "def dispatch_for_ever():", "the ranks obeyed", "class Outlet"])
def test_a_banned_word_is_found(text: str) -> None:
    assert BANNED.search(text)
