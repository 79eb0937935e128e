"""`apt-jobs log`: metrics, lines, images and progress of a job from a shell or a program in any language.

It loads neither the service nor the command line, so that a loop can afford a call in each of its steps.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from apt_jobs.jobs.handover import RUN_FILE_VARIABLE, read_handover
from apt_jobs.run.current import Run

EPILOG = "Example: apt-jobs log eval/bleu=31.2 eval/loss=2.1 --step 3"
USAGE_STATUS = 2


def log_command(arguments: Sequence[str]) -> int:
    """Log what the arguments say to the run that the environment names.

    Returns:
        The exit status: 0, or 2 where there is no run or an argument is wrong.
    """
    given = _parser().parse_args(arguments)
    handover = read_handover()
    if handover is None:
        name = os.environ.get(RUN_FILE_VARIABLE)
        what = f"{RUN_FILE_VARIABLE} names {name!r}, which is no run file" if name else "this is no process of a job"
        return _refused(f"{what}: a job's command may log, and what it starts")
    try:
        values = dict(map(_metric, given.metrics))
        images = [_pair(text, "--image") for text in given.image]
        progress = None if given.progress is None else _progress(given.progress)
    except ValueError as exc:
        return _refused(str(exc))
    if (values or images) and given.step is None:
        return _refused("metrics and images need --step: where they stand")
    run = Run(handover)
    if values:
        run.log(values, step=given.step)
    for name, path in images:
        run.log_image(name, path, step=given.step)
    if given.text is not None:
        run.log_text(given.text)
    if progress is not None:
        run.set_progress(*progress)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("apt-jobs log", description="Log to the job of this process.", epilog=EPILOG)
    parser.add_argument("metrics", nargs="*", metavar="NAME=VALUE", help="a metric")
    parser.add_argument("--step", type=int, help="where metrics and images stand")
    parser.add_argument("--text", help="a line of the job's log")
    parser.add_argument("--image", action="append", default=[], metavar="NAME=FILE", help="an image; may be repeated")
    parser.add_argument("--progress", metavar="DONE/TOTAL", help="how far the job is, in steps")
    return parser


def _metric(text: str) -> tuple[str, int | float]:
    name, value = _pair(text, "a metric")
    try:
        return name, int(value)
    except ValueError:
        pass
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is no number") from None


def _pair(text: str, what: str) -> tuple[str, str]:
    name, sign, value = text.rpartition("=")
    if not sign or not name:
        raise ValueError(f"{what} is NAME=VALUE, not {text!r}")
    return name, value


def _progress(text: str) -> tuple[int, int | None]:
    done, _, total = text.partition("/")
    if not done.isdecimal() or not (total.isdecimal() or not total):
        raise ValueError(f"--progress is DONE or DONE/TOTAL, not {text!r}")
    return int(done), int(total) if total else None


def _refused(message: str) -> int:
    sys.stderr.write(f"apt-jobs: {message}\n")
    return USAGE_STATUS
