"""`apt-jobs secrets`: values that jobs are given by name, which no command line and no answer ever shows."""

import sys
from typing import Annotated

import typer

from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.secrets import MAX_SECRET_CHARS

app = typer.Typer(no_args_is_help=True, help="Secrets that jobs are given by name.")
Name = Annotated[str, typer.Argument(help="Environment variable in which a job gets it, as HF_TOKEN.")]


@app.command("set")
def set_secret(name: Name) -> None:
    """Store a secret. Its value is asked for, or read from standard input; one newline at its end is left out."""
    if sys.stdin.isatty():
        value = typer.prompt(f"value of {name}", hide_input=True)
    else:
        value = sys.stdin.read(MAX_SECRET_CHARS + 3).removesuffix("\n").removesuffix("\r")
    if not value:
        raise InvalidInput("standard input is empty; pipe the value in, as: apt-jobs secrets set HF_TOKEN < file")
    with open_client() as client:
        client.set_secret(name, value)
    echo(f"{name} is stored")


@app.command("ls")
def list_all(as_json: AsJson = False) -> None:
    """List the names of the secrets."""
    with open_client() as client:
        rows = client.secrets()
    if as_json:
        print_json(rows)
        return
    print_table(["name", "created", "set"], [[row["name"], row["created_at"], row["updated_at"]] for row in rows])


@app.command()
def delete(name: Name) -> None:
    """Remove a secret."""
    with open_client() as client:
        client.delete_secret(name)
    echo(f"{name} is deleted")


@app.command("new-key")
def new_key() -> None:
    """Print a key for APT_JOBS_SECRETS_KEY. The first of several, with commas between, encrypts; any decrypts."""
    from cryptography.fernet import Fernet

    echo(Fernet.generate_key().decode())
