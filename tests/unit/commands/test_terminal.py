"""Text of others on its way to the terminal."""

import json
import unicodedata

import pytest

from apt_jobs.commands.terminal import BLOCK, print_json, print_table, printable


def test_nothing_that_a_terminal_executes_or_hides_passes() -> None:
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything)
    hidden = {char for char in shown if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert hidden == {"\u200c", "\u200d"}  # scripts and emoji are written with them


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b", "\\x9b"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\u202e", "\\u202e"),
        ("\U000e0001", "\\U000e0001"),
        ("\ud800", "\\ud800"),
        ("[bold]x[/] \\ \u00fc\u4e2d", "[bold]x[/] \\ \u00fc\u4e2d"),
    ],
)
def test_what_is_escaped_and_what_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_blocks_keep_their_lines() -> None:
    assert printable("a\n\tb\r\n\x1b", BLOCK) == "a\n\tb\\r\n\\x1b"


def test_a_pipe_gets_a_line_a_row_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["id", "name"], [["1", "x" * 5_000], ["22", ""], ["3", "\u4e2d\n[/x]"]])
    assert capsys.readouterr().out.splitlines() == ["id  name", "1   " + "x" * 5_000, "22  -", "3   \u4e2d\\n[/x]"]


def test_columns_stay_in_line_beside_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "id"], [["\u4e2d\u6587", "1"], ["abcd", "2"]])
    assert capsys.readouterr().out.splitlines() == ["name  id", "\u4e2d\u6587  1", "abcd  2"]


def test_json_stays_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"name": " ".join(map(chr, range(0x110000)))}
    print_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert not any(
        unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in set(printed) - set("\n\u200c\u200d")
    )
