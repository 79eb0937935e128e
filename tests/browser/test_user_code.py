"""The page of a job that brought its code: command, commit, diff, images and tables, on a desk and on a phone."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from apt_jobs.client.client import Client
from tests.browser.conftest import RunningStack, Watched, wait_until

DEADLINE_S = 120.0
SCRIPT = """
import numpy as np
import apt_jobs

run = apt_jobs.current_run()
for step in range(1, 21):
    run.log({"eval/bleu": 30 - 20 / step, "eval/loss": 2 / step}, step=step)
    if step % 5 == 0:
        y, x = np.mgrid[0:120, 0:200] / 40
        image = np.stack([np.sin(x + step) / 2 + 0.5, np.cos(y) / 2 + 0.5, x * y / 15], -1)
        run.log_image("samples/first", image, step, caption=f"a pattern of step {step}")
rows = [{"prompt": f"Once upon a time {n}", "answer": "<script>alert(1)</script>", "score": n / 7} for n in range(150)]
run.log_table("eval/answers", rows, step=20)
"""


@pytest.fixture(scope="module")
def job_id(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that has ended, of a folder with a commit and a change."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "train.py").write_text("print('first')\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)
    (folder / "train.py").write_text(SCRIPT)
    with Client(stack.url, stack.api_key) as client:
        code = client.upload_code(folder)["sha256"]
        command = ["python", "train.py", "--name", "two words"]
        job = client.submit(
            {"kind": "train", "name": "mine", "launcher": "none", "argv": command, "code": {"sha256": code}}
        )
        assert client.wait(job.id, DEADLINE_S).state == "succeeded", client.get(job.id)["error"]
    return job.id


SIZES = [(1440, 1000, "light"), (1440, 1000, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.mark.parametrize(("width", "height", "scheme"), SIZES)
def test_the_page_shows_the_code_and_what_it_logged(
    stack: RunningStack,
    open_window: Callable[..., Watched],
    job_id: str,
    width: int,
    height: int,
    scheme: str,
    tmp_path: Path,
) -> None:
    window = open_window(width, height, scheme)
    page = window.context.new_page()
    page.goto(f"{stack.url}/jobs/{job_id}")
    expect(page.get_by_test_id("command")).to_have_text("python train.py --name 'two words'")
    code = page.get_by_role("region", name="Code")
    expect(code).to_contain_text("with changes")
    code.get_by_text("Changes to the commit").click()
    expect(page.get_by_test_id("diff")).to_contain_text("+import apt_jobs")
    image = page.get_by_role("region", name="Image samples/first")
    expect(image.get_by_role("img", name="samples/first at step 20")).to_be_visible()
    wait_until(
        lambda: image.get_by_role("img").evaluate("image => image.complete && image.naturalWidth") == 200,
        DEADLINE_S,
        "the image is drawn",
    )
    slider = image.get_by_role("slider")
    slider.focus()
    slider.press("Home")
    expect(image).to_contain_text("a pattern of step 5")
    table = page.get_by_role("region", name="Table eval/answers")
    expect(table).to_contain_text("<script>alert(1)</script>")
    expect(table).to_contain_text("The first 100 of 150 rows")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=tmp_path / f"user-code-{width}-{scheme}.png", full_page=True)
    assert window.complaints == []
