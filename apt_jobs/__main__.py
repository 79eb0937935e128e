"""`apt-jobs` and `python -m apt_jobs`: the commands of `cli.py`, whose imports take a second."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C before it is there ends the process as any other, without a traceback."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from apt_jobs import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
