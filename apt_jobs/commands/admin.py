"""What an operator types: start the service, migrate, keys, login links, import a folder.

Processes are imported inside their commands, the one exception to "imports at the top": `apt-jobs --help` answers at
once, and the web process never loads torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from apt_jobs.addresses import is_wildcard
from apt_jobs.commands.lifetimes import parse_expiry
from apt_jobs.commands.processes import prepare_process
from apt_jobs.commands.terminal import echo, load_settings, open_client, print_json, print_table
from apt_jobs.errors import Unavailable
from apt_jobs.logs import configure_logging
from apt_jobs.private_files import keep_private

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where everything is kept.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="TCP port of the web process.")]


@app.command()
def up(port: Port = None, data_dir: DataDir = None) -> None:
    """Start everything on this machine: Valkey, web, a training and a generation worker."""
    from apt_jobs.workers.embedded import Stack, run_embedded

    settings = load_settings(port=port, data_dir=data_dir)
    configure_logging(settings.log_level)

    def on_ready(stack: Stack) -> None:
        echo("")
        echo(f"apt_jobs is up: {stack.browser_url}", style="bold")
        echo(f"data in {settings.root}")
        echo("Open this link once, in the browser that you want to use:")
        echo(f"  {stack.login_link}")
        if is_wildcard(settings.host) and not settings.allowed_hosts:
            echo(f"Other machines reach it at the addresses of this one, port {settings.port}, by HTTP only;")
            echo("APT_JOBS_ALLOWED_HOSTS names it for them.")
        echo("Ctrl-C stops everything.")
        echo("")

    run_embedded(settings, on_ready)


@app.command()
def web() -> None:
    """Start a web process."""
    from apt_jobs.web.serve import run_web

    settings = load_settings()
    prepare_process(settings)
    run_web(settings)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from apt_jobs.db.upgrade import upgrade_database
    from apt_jobs.operations.data_directory import mark_data_directory

    with _database() as database:
        upgrade_database(database)
        mark_data_directory(load_settings(), database)
    echo("the database is up to date")


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from apt_jobs.web.app import document

    print_json(document())


@app.command("import")
def import_folder(
    folder: Annotated[
        Path, typer.Argument(help="What a training outside of any job wrote, as apt_jobs_runs/TIME-PID.")
    ],
    name: Annotated[str | None, typer.Option(help="Shown in lists; default: the folder's.")] = None,
) -> None:
    """Show a training that ran outside of any job. It becomes a job that has ended; doing it twice changes nothing."""
    from apt_jobs.db.upgrade import upgrade_database
    from apt_jobs.supervision.imported_run import import_run

    settings = load_settings()
    with _database() as database:
        if settings.database_url is None:  # as `apt-jobs up` would, which may never have run here
            settings.root.mkdir(parents=True, exist_ok=True)
            upgrade_database(database)
        job_id, is_new = import_run(database, folder, name, settings.runs_dir)
    echo(f"{job_id} {'is imported' if is_new else 'was imported before'}")


@app.command("login-link")
def login_link() -> None:
    """Print a link that logs one browser in, once, within an hour."""
    from apt_jobs.db.access import Role, create_login_token

    with _database() as database, database.write() as session:
        token = create_login_token(session, Role.ADMIN, 3600.0)
    echo(f"{_service_url()}/login?token={token}")


@keys_app.command("create")
def create_key(
    name: str,
    role: Annotated[str, typer.Option(help="viewer, submitter or admin")] = "submitter",
    expires: Annotated[str | None, typer.Option(help="When it ends: 12h, 30d, 4w, or a date. Default: never.")] = None,
) -> None:
    """Make an API key. It is shown once."""
    from apt_jobs.db.access import Role
    from apt_jobs.db.access import create_key as create

    if role not in list(Role):
        raise typer.BadParameter(f"{role!r} is no role; use {', '.join(Role)}")
    with _database() as database, database.write() as session:
        echo(create(session, name, Role(role), parse_expiry(expires) if expires is not None else None))


@keys_app.command("list")
def list_all_keys() -> None:
    """List the API keys, without their secrets."""
    from apt_jobs.db.access import list_keys

    with _database() as database, database.read() as session:
        rows = list_keys(session)
    instants = ("expires_at", "revoked_at", "last_used_at")
    print_table(
        ["id", "role", "expires", "revoked", "last used", "name"],
        [[row.id, row.role, *(str(getattr(row, name) or "") for name in instants), row.name] for row in rows],
    )


@keys_app.command("revoke")
def revoke_key(key_id: str) -> None:
    """End an API key at once."""
    from apt_jobs.db.access import revoke_key as revoke

    with _database() as database, database.write() as session:
        revoke(session, key_id)


def _service_url() -> str:
    """Return where a browser finds the service: what runs on this data directory, else what the settings name."""
    try:
        with open_client() as client:
            return client.browser_url
    except Unavailable:
        return load_settings().browser_url


@contextmanager
def _database() -> Iterator[Any]:
    from apt_jobs.db.engine import Database

    settings = load_settings()
    if settings.database_url is None:
        keep_private(settings.root)
    database = Database(settings.database)
    try:
        yield database
    finally:
        database.dispose()
