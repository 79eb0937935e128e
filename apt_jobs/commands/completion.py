"""`apt-jobs completion`: what a shell reads to complete commands and options with the Tab key."""

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]  # not in its `__all__`

from apt_jobs.commands.terminal import echo

PROGRAM = "apt-jobs"
VARIABLE = "_APT_JOBS_COMPLETE"  # by which the script of a shell asks for completions
app = typer.Typer()


class Shell(StrEnum):
    """Shells that are completed in."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish")]) -> None:
    """Print the script that completes commands and options in a shell."""
    echo(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value), keep="\n\t")


def prepare_completion() -> None:
    """Let a shell that asks for completions be answered in its own form."""
    if VARIABLE in os.environ:
        completion_init()
