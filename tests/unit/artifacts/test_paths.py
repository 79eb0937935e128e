"""A name that somebody else chose leads nowhere but into its folder."""

from pathlib import Path

import pytest

from apt_jobs.artifacts.paths import inside, is_plain_name

OUTSIDE = [
    *("", ".", "..", "/", "../outside", "../../outside", "x/../../outside", "x/../y", "./x", "x/.", "x/..", "x//y"),
    *("x/", "/etc/passwd", "//etc/passwd", "x\0y", "\0", "../root2/x", "..\0/x", "x\ud800/../.."),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root2").mkdir()  # a longer name that begins alike
    (tmp_path / "root" / "x" / "y").mkdir(parents=True)
    return tmp_path / "root"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_not_a_plain_path_down_is_refused(root: Path, name: str) -> None:
    assert inside(root, name) is None
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["x", "x/y", "missing", "missing/too", "...", "x y", "~", "-x", "\\..\\x", "ü#%"])
def test_a_plain_path_is_below_its_folder(root: Path, name: str) -> None:
    assert inside(root, name) == root / name


def test_links_lead_only_to_what_is_inside(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "outside")
    (root / "up").symlink_to("..")
    (root / "self").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "good").symlink_to("x")
    assert [inside(root, name) for name in ("out", "out/x", "up/outside", "up/root", "self", "loop")] == [None] * 6
    assert inside(root, "good/y") == root / "x" / "y"


def test_a_folder_that_is_a_link_itself_is_followed(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert inside(link, "x") == root / "x"


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["x" * 200] * 30), "\udcff" + "x" * 300])
def test_a_name_that_no_disk_can_hold_is_refused(root: Path, name: str) -> None:
    assert inside(root, name) is None
