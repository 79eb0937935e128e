"""The wheel that a release uploads: built, installed into a fresh environment without this checkout, and run."""

import os
import re
import signal
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest

from tests.acceptance.stack import DEADLINE_S, TINY, Stack, has_both_workers, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and what it depends on from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "hatch_build.py"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert re.fullmatch(r"apt_jobs-\d+\.\d+(\.\d+)?(\.dev\d+)?-py3-none-any\.whl", wheel.name)
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    installed = environment / "bin" / "python"
    pip = [str(installed), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    # A line of a .pth file joins the path without the .pth files there, so that the checkout's own is not followed.
    Path(purelib, "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return installed


def test_the_wheel_runs_by_itself(python: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    where = "import apt_jobs, apt_jobs_migrations; print(apt_jobs.__file__, next(iter(apt_jobs_migrations.__path__)))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(python.parents[1])) for path in found.stdout.split())
    stack = type("InstalledStack", (Stack,), {"python": str(python), "cwd": tmp_path})(tmp_path / "data")
    try:
        local = tmp_path / "data" / "local.json"
        until(lambda: local.exists() or stack.process.poll() is not None)
        assert stack.process.poll() is None, stack.process.communicate()
        with stack.client() as client:
            until(lambda: has_both_workers(client))
            page = httpx.get(f"{client.url}/", trust_env=False)
            assert 'id="app"' in page.text
            for asset in re.findall(r'(?:src|href)="(/assets/[^"]+)"', page.text):
                assert httpx.get(client.url + asset, trust_env=False).status_code == 200
            job = client.wait(client.submit(TINY)["id"])
            assert job["state"] == "succeeded", stack.story()
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.communicate(timeout=DEADLINE_S)
