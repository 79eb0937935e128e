"""`apt-jobs`: the list of everything that can be started, and the one place where an error becomes a sentence.

Exit status: 0 if all went well; 1 if the job that was followed did not succeed; 2 for an error, which is one sentence
on standard error; 130 after Ctrl-C.
"""

import logging
import os
import sys
import traceback

import typer

from apt_jobs.commands import (
    admin,
    backup,
    compare,
    completion,
    datasets,
    doctor,
    jobs,
    mcp,
    models,
    retention,
    run,
    schedules,
    secrets,
    sweeps,
    webhooks,
    workers,
)
from apt_jobs.commands.progress import follow
from apt_jobs.commands.terminal import complain, echo, load_settings, prepare_streams
from apt_jobs.errors import AptJobsError

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they show local variables, keys among them
    help="A job queue with a live monitor for language models.",
)
app.add_typer(admin.app)
app.add_typer(backup.app)
app.add_typer(retention.app)
app.add_typer(completion.app)
app.add_typer(doctor.app)
app.add_typer(jobs.app)
app.add_typer(compare.app)
app.add_typer(run.app)
app.add_typer(mcp.app)
app.add_typer(models.app)
app.add_typer(models.models_app, name="models")
app.add_typer(workers.start_app, name="worker")
app.add_typer(workers.app, name="workers")
app.add_typer(schedules.app, name="schedules")
app.add_typer(sweeps.start_app)
app.add_typer(sweeps.app, name="sweeps")
app.add_typer(datasets.app, name="datasets")
app.add_typer(secrets.app, name="secrets")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(admin.keys_app, name="keys")


@app.command()
def demo(port: admin.Port = None) -> None:
    """Start everything, train a small model, show it live, generate from it. APT_JOBS_DEMO_EXIT=1 ends it then."""
    from apt_jobs.demo import run_demo

    run_demo(load_settings(port=port), echo, follow)


def main() -> None:
    """Run a command; whatever goes wrong is one sentence and an exit status."""
    prepare_streams()
    completion.prepare_completion()
    status = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wants
        status = status or 1
        _forget_output()
    except OSError as exc:
        complain(f"standard output cannot be written: {exc.strerror}")
        status = 2
        _forget_output()
    sys.exit(status)


def _run() -> int:
    try:
        app()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except AptJobsError as exc:
        complain(str(exc))
        return 2
    except Exception as exc:  # the edge of the process: the user gets a sentence, a service's log gets the rest
        if logging.getLogger().handlers:
            logger.exception("the command failed")
        elif os.environ.get("APT_JOBS_LOG_LEVEL", "").upper() == "DEBUG":
            traceback.print_exc()
        complain(f"unexpected {type(exc).__name__}: {exc}; APT_JOBS_LOG_LEVEL=DEBUG shows where")
        return 2
    return 0


def _forget_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail to write it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
