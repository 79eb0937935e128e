"""`apt-jobs run`: a folder's code as a job of the real stack, from its first line to its own exit status."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.client.client import Client
from apt_jobs.errors import InvalidInput
from tests.acceptance.stack import DEADLINE_S, Stack, marked, until

TRAIN = """
import json, os, pathlib, sys
import apt_jobs

run = apt_jobs.current_run()
print("begins", *sys.argv[1:], os.environ.get("MINE"), os.environ.get("MY_SECRET"), os.environ.get("RANK"), flush=True)
assert pathlib.Path.cwd() == run.output_dir
assert pathlib.Path("config/small.json").read_text() == '{"width": 3}'
first = 1
if run.resume_dir:
    first = json.loads((run.resume_dir / "state.json").read_text())["step"] + 1
for step in range(first, 11):
    run.log({"eval/bleu": step / 2}, step=step)
    if step == 5:
        pathlib.Path("state").mkdir(exist_ok=True)
        pathlib.Path("state/state.json").write_text(json.dumps({"step": step}))
        run.save_checkpoint("state", step=step)
        pathlib.Path("config/small.json").write_text("changed by the job")
        if run.attempt == 1:
            os.kill(os.getpid(), 9)
print("ends", run.attempt, first, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "config" / "small.json").write_text('{"width": 3}')
    (folder / ".gitignore").write_text("*.bin\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)
    (folder / "train.py").write_text(TRAIN + "# an edit\n")
    (folder / "data.bin").write_bytes(bytes(1 << 20))
    return folder


def ran(stack: Stack, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run `apt-jobs run ARGUMENTS` to its end; what it printed on both streams."""
    process = stack.command("run", *arguments)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status, out + err
    return out, err


def test_a_folder_runs_is_killed_and_runs_on_with_the_very_same_code(
    stack: Stack, client: Client, folder: Path
) -> None:
    options = ["--workdir", str(folder), "--env", "MINE=yes", "--label", "team=a", "--name", "mine"]
    out, err = ran(stack, *options, "--", "python", "train.py", "--lr", "3e-4")
    assert out.splitlines() == ["begins --lr 3e-4 yes None None", *out.splitlines()[1:]]
    assert out.splitlines()[-1] == "ends 2 6"
    assert "4 files, commit" not in err
    assert "3 files, commit" in err
    assert "with changes on main" in err
    [job] = [row for row in client.list_jobs(label="team=a") if row["name"] == "mine"]
    assert job.state == "succeeded"
    job = client.get(job.id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["queued", "succeeded"]
    assert client.metrics(job.id)["custom"]["eval/bleu"]["last"] == 5.0
    code = client.code(job["spec"]["code"]["sha256"])
    assert "+# an edit" in code["diff"]
    inspected = stack.command("inspect", job.id).communicate(timeout=DEADLINE_S)[0]
    assert json.loads(inspected)["code"]["commit"] == code["commit"]
    again = client.submit(job["spec"])  # what the page and a clone submit
    assert client.wait(again.id, DEADLINE_S).state == "succeeded"


def test_it_exits_as_the_command_does(stack: Stack, client: Client, tmp_path: Path) -> None:
    script = (
        "import os, sys; value = os.environ['TOKEN']; print('as it was', value); sys.exit('why it failed ' + value)"
    )
    (tmp_path / "fails.py").write_text(script)
    (tmp_path / "run.sh").write_text("echo from a shell; exit 3\n")
    workdir = ["--workdir", str(tmp_path), "--label", "exit=1", "--"]
    stored = subprocess.run(
        [stack.python, "-m", "apt_jobs", "secrets", "set", "TOKEN"],
        env=stack.environment,
        input="hf_0123456789\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hf_0123456789" not in stored.stdout + stored.stderr
    out, _ = ran(stack, "--secret", "TOKEN", *workdir, "python", "fails.py", status=1)
    assert out.splitlines() == ["as it was ***", "why it failed ***"]
    _, err = ran(stack, "--secret", "NO_TOKEN", *workdir, "python", "fails.py", status=2)
    assert "apt-jobs secrets set NO_TOKEN" in err
    out, err = ran(stack, *workdir, "sh", "run.sh", status=3)
    assert (out, "the command exited with 3" in err) == ("from a shell\n", True)
    _, err = ran(stack, *workdir, "pyhton", "fails.py", status=127)
    assert "the command 'pyhton' cannot be started: No such file or directory" in err
    error = client.list_jobs(label="exit=1")[-1]["error"]
    assert (error["exit_status"], "why it failed ***" in error["traceback"]) == (1, True)


def test_what_cannot_run_is_refused_by_name_before_anything_is_submitted(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    (tmp_path / "link").symlink_to("/etc/passwd")
    _, err = ran(stack, "--workdir", str(tmp_path), "--", "python", "a.py", status=2)
    assert "'link' is a link out of the folder" in err
    (tmp_path / "link").unlink()
    _, err = ran(stack, "--workdir", str(tmp_path), "--env", "LD_PRELOAD=x", "--", "python", "a.py", status=2)
    assert "a job may not set LD_PRELOAD" in err
    out, err = ran(stack, "--workdir", str(tmp_path), "--dry-run", "--", "python", "a.py")
    assert (out, "1 file," in err) == ("a.py\n", True)


TREE = """
import os, subprocess, sys, time
if len(sys.argv) > 1:
    time.sleep(1000)
command = [sys.executable, __file__, "child"]
subprocess.Popen(command)
subprocess.Popen(command, start_new_session=True)
subprocess.Popen(command, start_new_session=True, env={"PATH": os.environ["PATH"]}, cwd="/")
print("up", os.getpid(), flush=True)
time.sleep(1000)
"""


def test_a_cancelled_command_dies_with_all_that_it_started(stack: Stack, client: Client, tmp_path: Path) -> None:
    (tmp_path / "tree.py").write_text(TREE)
    job = submitted(client, tmp_path, ["python", "tree.py"])
    until(lambda: any("up" in event["message"] for event in client.stored_events(job, kinds=["log"])))
    assert len(marked(job)) >= 4
    client.cancel(job)
    assert client.wait(job, DEADLINE_S).state == "cancelled"
    until(lambda: marked(job) == [])
    until(
        lambda: (
            not [pid for pid in Path("/proc").glob("[0-9]*") if f"{job}/output/tree.py\0child".encode() in _line(pid)]
        )
    )


def _line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


OWN_TORCHRUN = """
import os, apt_jobs
run = apt_jobs.current_run()
run.log({f"rank{os.environ['RANK']}": 1.0}, step=1)
if os.environ["RANK"] == "0":
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter("tb") as writer:
        writer.add_scalar("of/tensorboard", 3.0, 1)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
"""


def test_a_command_may_start_its_own_torchrun_and_is_one_rank_of_ours(client: Client, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(OWN_TORCHRUN)
    mirror = {"APT_JOBS_MIRROR": "tensorboard"}
    own = submitted(client, tmp_path, ["torchrun", "--standalone", "--nproc-per-node=2", "ranks.py"], env=mirror)
    ours = submitted(client, tmp_path, ["python", "ranks.py"], launcher="torchrun", num_ranks=2, env=mirror)
    for job in (own, ours):
        assert client.wait(job, DEADLINE_S).state == "succeeded", client.get(job)["error"]
        assert set(client.metrics(job)["custom"]) == {"rank0", "rank1", "of/tensorboard"}
        lines = [event["message"] for event in client.stored_events(job, kinds=["log"])]
        assert {"rank 0 of 2", "rank 1 of 2"} <= set(lines)


def test_code_that_was_not_uploaded_is_refused_with_its_field(client: Client) -> None:
    job = {"kind": "train", "code": {"sha256": "0" * 64}, "argv": ["python", "a.py"]}
    with pytest.raises(InvalidInput, match="#/code/sha256"):
        client.submit(job)
    with pytest.raises(InvalidInput, match="whole command in argv"):
        client.submit({**job, "argv": []})


def submitted(client: Client, folder: Path, command: list[str], **fields: Any) -> str:
    code = client.upload_code(folder)["sha256"]
    job = {"kind": "train", "launcher": "none", "argv": command, "code": {"sha256": code}, **fields}
    return client.submit(job).id
