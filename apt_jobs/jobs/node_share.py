"""How the share of a further node in an attempt goes: a file of its run folder that the node writes."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from apt_jobs.jobs.run_file import RunFile


class ShareState(StrEnum):
    """How far a node is."""

    JOINED = "joined"  # its ranks are being started, or work
    FINISHED = "finished"  # its ranks ended well
    ENDED_EARLY = "ended_early"  # they did not, or its process was started again


class NodeShare(BaseModel):
    """The document in the file."""

    model_config = ConfigDict(frozen=True)

    state: ShareState
    reason: str | None = None  # why it ended early


def write_share(run_file: RunFile, node_rank: int, state: ShareState, reason: str | None = None) -> None:
    """Report how the share of a node goes.

    Raises:
        OSError: the disk does not take it.
    """
    path = run_file.share_path(node_rank)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(NodeShare(state=state, reason=reason).model_dump_json())
    temporary.rename(path)  # it appears whole


def read_share(run_file: RunFile, node_rank: int) -> NodeShare | None:
    """Return what the node reported last; None: it has not joined.

    Raises:
        OSError: the disk does not say.
    """
    try:
        return NodeShare.model_validate_json(run_file.share_path(node_rank).read_bytes())
    except FileNotFoundError:
        return None
