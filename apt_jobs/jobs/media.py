"""What an image or a table of a job may be. A file is what its bytes are, whatever its name or its script says."""

MAX_IMAGE_BYTES = 10 << 20
MAX_TABLE_BYTES = 4 << 20
MAX_TABLE_ROWS, MAX_TABLE_COLUMNS = 10_000, 100
MAX_JOB_FILES, MAX_JOB_BYTES = 2_000, 1 << 30  # of a job
MEDIA_FOLDER = "media"  # beside the output folder
TABLE_SUFFIX = "json"
HEAD_BYTES = 16  # enough for `image_type`
IMAGE_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}


def image_type(head: bytes) -> str | None:
    """Return the media type of an image by its first bytes; None: it is none that browsers only draw."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return None
