"""What an operator types to back a service up, and to restore it elsewhere."""

import os
from pathlib import Path
from typing import Annotated

import typer

from apt_jobs.commands.terminal import echo, load_settings, print_table

app = typer.Typer()
NICENESS = 10  # a backup has time
Store = Annotated[Path, typer.Argument(help="The folder of backups, outside of the data directory.")]


@app.command()
def backup(
    folder: Store,
    keep: Annotated[int | None, typer.Option(min=1, max=100_000, help="Delete older backups but for so many.")] = None,
    runs: Annotated[bool, typer.Option(help="With spools, logs and outputs of attempts.")] = True,
    list_all: Annotated[bool, typer.Option("--list", help="List the backups there, and make none.")] = False,
    check: Annotated[bool, typer.Option("--verify", help="Read the newest one to its end, and make none.")] = False,
) -> None:
    """Back up database and files while the service runs. What a backup there has already is not copied again."""
    from apt_jobs.backup.create import back_up
    from apt_jobs.backup.restore import verify
    from apt_jobs.backup.store import BackupStore
    from apt_jobs.db.engine import Database
    from apt_jobs.private_files import PRIVATE_UMASK

    os.umask(PRIVATE_UMASK)
    store = BackupStore(folder)
    if list_all:
        found = [store.read(name) for name in store.snapshots()]
        columns = ["name", "jobs", "files", "bytes", "version"]
        print_table(
            columns,
            [
                [one.name, f"{one.tables['jobs'].num_rows:,}", f"{len(one.files):,}", f"{one.num_bytes:,}", one.version]
                for one in found
            ],
        )
        return
    if check:
        snapshot = verify(store, None)
        echo(f"{snapshot.name} is whole: {len(snapshot.files):,} files, {snapshot.num_bytes:,} bytes")
        return
    os.nice(NICENESS)
    settings = load_settings()
    database = Database(settings.database)
    try:
        done = back_up(database, settings, store, runs=runs, keep=keep)
    finally:
        database.dispose()
    snapshot = done.snapshot
    echo(
        f"{snapshot.name}: {snapshot.tables['jobs'].num_rows:,} jobs, {len(snapshot.files):,} files, "
        f"{snapshot.num_bytes:,} bytes; {done.num_new_files:,} files and {done.num_new_bytes:,} bytes were read"
    )
    if snapshot.num_skipped:
        echo(f"{snapshot.num_skipped:,} files were left out: no plain files, not readable, or gone meanwhile")
    if done.deleted:
        echo(f"deleted {len(done.deleted)} older backups")


@app.command()
def restore(
    folder: Store,
    name: Annotated[str | None, typer.Option(help="Which backup, as --list shows it; default: the newest.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where to: new or empty.")] = None,
) -> None:
    """Restore a backup into an empty data directory, and into the database of APT_JOBS_DATABASE_URL if that is set."""
    from apt_jobs.backup.restore import restore as restore_backup
    from apt_jobs.backup.store import BackupStore
    from apt_jobs.private_files import PRIVATE_UMASK

    os.umask(PRIVATE_UMASK)
    settings = load_settings(data_dir=data_dir)
    snapshot = restore_backup(BackupStore(folder), name, settings)
    echo(f"restored {snapshot.name} to {settings.root}: {snapshot.tables['jobs'].num_rows:,} jobs")
