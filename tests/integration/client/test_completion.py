"""The Tab key in real shells: what `apt-jobs completion` prints completes commands and options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apt_jobs import cli

ASK = {  # a shell without a keyboard, asked as the Tab key does
    "bash": "source $SCRIPT; COMP_WORDS=(apt-jobs webhooks d); COMP_CWORD=2; _apt_jobs_completion apt-jobs; "
    'printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": "compdef() { }; _arguments() { print -rl -- $@ }; source $SCRIPT; words=(apt-jobs webhooks d); CURRENT=3; "
    "_apt_jobs_completion",
    "fish": "source $SCRIPT; complete --do-complete 'apt-jobs webhooks d'",
}


@pytest.mark.parametrize("shell", list(ASK))
def test_a_shell_completes_commands(shell: str, tmp_path: Path) -> None:
    folder = Path(sys.executable).parent  # of the program of these tests
    script = tmp_path / "script"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SCRIPT": str(script), "HOME": str(tmp_path)}
    script.write_text(CliRunner().invoke(cli.app, ["completion", shell]).output)
    asked = subprocess.run([shell, "-c", ASK[shell]], env=environment, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    for command in ("deliveries", "delete", "disable"):
        assert command in asked.stdout
    assert "enable" not in asked.stdout.replace("disable", "")
