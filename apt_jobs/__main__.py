"""`apt-jobs` and `python -m apt_jobs`: the commands of `cli.py`, whose imports take a second."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C before it is there ends the process as any other, without a traceback."""
    if sys.argv[1:2] == ["log"]:
        from apt_jobs.run.log_command import log_command  # of a job's process, which may call it in each step

        sys.exit(log_command(sys.argv[2:]))
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from apt_jobs import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
