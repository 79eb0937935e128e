"""The content of an upload, piece by piece: the body itself, or the one file of a multipart form.

`TextCheck` sees every piece on its way to the disk: it takes a UTF-8 byte order mark away and names the byte that is
wrong.
"""

import asyncio
import codecs
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from apt_jobs.errors import InvalidDataset, OutOfSpace
from apt_jobs.jobs.dataset_format import NPY_MAGIC, PARQUET_MAGIC, DatasetFormat, compression_of
from apt_jobs.web.problems import ProblemError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # is not there when it runs

RAW_TYPES = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})  # curl sends the last one
FORM_TYPE = "multipart/form-data"
MAX_FIELDS_BYTES = 1 << 16  # of a form, besides its file
MAX_FIELDS = 20  # the same
IDLE_TIMEOUT_S = 30.0  # between two pieces of an upload
MIN_BYTES_PER_S = 1_000  # of an upload as a whole, after the first `IDLE_TIMEOUT_S`
_UTF8_MARK = codecs.BOM_UTF8
_OTHER_MARKS = (  # the longer ones first: a mark of UTF-32 begins as one of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MARK_BYTES = 4
CHECKED_BYTES = 8  # of a file's beginning: enough for any format
_MAGICS = {DatasetFormat.PARQUET: PARQUET_MAGIC, DatasetFormat.NPY: NPY_MAGIC}
_TOKEN_BYTES = {DatasetFormat.UINT16: 2, DatasetFormat.UINT32: 4}


class TextCheck:
    """A text as it arrives. What `feed` returns is to be stored."""

    def __init__(self, what: str = "data set") -> None:
        self._what = what  # for errors
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._head: bytes | None = b""  # until enough came to see a byte order mark
        self._num_bytes = 0  # that were decoded, or wait in the decoder

    def feed(self, part: bytes, *, final: bool = False) -> bytes:
        """Check a piece.

        Raises:
            InvalidDataset: it is no UTF-8 text; the message has the offset in what was sent.
        """
        if self._head is not None:
            part = self._head + part
            if len(part) < _MARK_BYTES and not final:
                self._head = part
                return b""
            self._head = None
            part = self._without_mark(part)
        if (zero := part.find(b"\0")) >= 0:
            raise InvalidDataset(
                f"the {self._what} is binary: byte {self._num_bytes + zero:,} is zero; upload UTF-8 text"
            )
        waiting = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(part, final)
        except UnicodeDecodeError as exc:
            offset = self._num_bytes - waiting + exc.start
            raise InvalidDataset(
                f"the {self._what} is not UTF-8: byte {offset:,} is {exc.object[exc.start]:#04x} ({exc.reason}); "
                "convert it, for instance with iconv -f LATIN1 -t UTF-8"
            ) from exc
        self._num_bytes += len(part)
        return part

    def _without_mark(self, part: bytes) -> bytes:
        for mark, name in _OTHER_MARKS:
            if part.startswith(mark):
                raise InvalidDataset(
                    f"the {self._what} is {name}, says its byte order mark; convert it: iconv -f {name} -t UTF-8"
                )
        if part.startswith(_UTF8_MARK):
            self._num_bytes = len(_UTF8_MARK)
            return part[len(_UTF8_MARK) :]
        return part


class UploadCheck:
    """A data set as it arrives. Text is checked whole; of the other formats what their first bytes and size show."""

    def __init__(self, dataset_format: DatasetFormat) -> None:
        self._format = dataset_format
        self._head: bytes | None = b""  # until enough came to know what it is
        self._text: TextCheck | None = None
        self._num_bytes = 0

    def feed(self, part: bytes, *, final: bool = False) -> bytes:
        """Check a piece; returns what is to be stored.

        Raises:
            InvalidDataset: it is not of the format that was named.
        """
        if self._head is not None:
            part = self._head + part
            if len(part) < CHECKED_BYTES and not final:
                self._head = part
                return b""
            self._head = None
            self._begin(part)
        self._num_bytes += len(part)
        if final and self._num_bytes % _TOKEN_BYTES.get(self._format, 1):
            raise InvalidDataset(
                f"the data set is cut: {self._num_bytes:,} bytes are no whole number of {self._format} tokens"
            )
        return part if self._text is None else self._text.feed(part, final=final)

    def _begin(self, head: bytes) -> None:
        magic = _MAGICS.get(self._format)
        if magic is not None and head and not head.startswith(magic):
            raise InvalidDataset(f"the data set does not begin as {self._format} does; name its `format`")
        if self._format.may_be_compressed and compression_of(head) is None:
            self._text = TextCheck()


class Check(Protocol):
    """What looks at an upload on its way to the disk."""

    def feed(self, part: bytes, *, final: bool = False) -> bytes:
        """Check a piece; returns what is to be stored."""


async def receive(
    parts: AsyncIterator[bytes],
    file: Path,
    max_bytes: int,
    what: str,
    check: Check | None = None,
    *,
    appends: bool = False,
) -> str:
    """Stream an upload into a file, synced in the end; returns the SHA-256 of what was stored.

    Args:
        parts: Its pieces.
        file: Replaced, if it is there.
        max_bytes: More than so many are refused.
        what: Its name in messages.
        check: Sees each piece, and last an empty one with `final=True`.
        appends: Add to the file instead.

    Raises:
        ProblemError: 400, 408 or 413: it is too large, too slow, or ends early. What arrived stays in the file.
        OutOfSpace: the disk does not take it.
        InvalidDataset: it is empty, or not what `check` wants.
    """
    digest, num_received, size, began_s = hashlib.sha256(), 0, 0, time.monotonic()
    try:
        with file.open("ab" if appends else "wb") as opened:
            is_over = False
            while not is_over:
                part = await _next_piece(parts, what)
                is_over = part is None
                num_received += len(part or b"")
                if num_received > max_bytes:
                    raise ProblemError(413, f"{what} is larger than {max_bytes:,} bytes")
                if time.monotonic() - began_s > IDLE_TIMEOUT_S + num_received / MIN_BYTES_PER_S:
                    raise ProblemError(408, f"{what} comes with less than {MIN_BYTES_PER_S:,} bytes a second")
                stored = (part or b"") if check is None else check.feed(part or b"", final=is_over)
                size += len(stored)
                digest.update(stored)
                await asyncio.to_thread(opened.write, stored)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as exc:
        raise OutOfSpace(f"{what} cannot be written: {exc.strerror}") from exc
    if size == 0:
        raise InvalidDataset(f"{what} is empty; send it as the body, or as the file of a form")
    return digest.hexdigest()


async def _next_piece(parts: AsyncIterator[bytes], what: str) -> bytes | None:
    """Return the next piece of an upload; None: it is over.

    Raises:
        ProblemError: 400 or 408: the connection ended, or nothing comes.
    """
    try:
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            return await anext(parts, None)
    except TimeoutError as exc:
        raise ProblemError(408, f"nothing more of {what} came for {IDLE_TIMEOUT_S:.0f} s") from exc
    except ClientDisconnect as exc:
        raise ProblemError(400, f"the connection ended within {what}") from exc


def upload_parts(request: Request, kinds: frozenset[str] = RAW_TYPES) -> AsyncIterator[bytes]:
    """Return the pieces of an upload, whose content type is one of `kinds`, text, or a form.

    Raises:
        ProblemError: 415, the content type is none of ours; 400, the form is broken or has not one file.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProblemError(415, f"the body is encoded as {encoding[:40]!r}; send it as it is")
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        _, options = parse_options_header(sent)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise ProblemError(400, "the multipart form has no boundary in its Content-Type")
        return file_of_form(request, Form(boundary))
    if kind in kinds or kind.startswith("text/"):
        return request.stream()
    raise ProblemError(
        415, f"the body is {kind[:100]!r}; send it as text/plain or application/octet-stream, or as the file of a form"
    )


def form_of(request: Request) -> "Form":
    """Return the multipart form that a request is, of which nothing was read yet.

    Raises:
        ProblemError: 415, it is none; 400, it has no boundary.
    """
    sent = request.headers.get("content-type", "")
    kind = sent.partition(";")[0].strip().lower()
    if kind != FORM_TYPE:
        raise ProblemError(415, f"the body is {kind[:100] or 'of no declared type'!r}; send it as {FORM_TYPE}")
    boundary = parse_options_header(sent)[1].get(b"boundary", b"")
    if not boundary:
        raise ProblemError(400, "the multipart form has no boundary in its Content-Type")
    return Form(boundary)


async def file_of_form(request: Request, form: "Form") -> AsyncIterator[bytes]:
    """Yield the pieces of the form's file; then its other fields are known."""
    async for part in request.stream():
        for piece in form.feed(part):
            yield piece
    form.end()


class Form:
    """A multipart form with one file, parsed as it arrives. `fields` are the others, `filename` what the file's is."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename = ""
        self._name = b""
        self._pieces: list[bytes] = []
        self._header_name = self._header_value = b""
        self._is_file = False
        self._num_files = 0
        self._num_fields = 0
        self._num_other_bytes = 0
        self._has_ended = False
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_part_data": self._take_data,
            "on_header_field": self._take_header_name,
            "on_header_value": self._take_header_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, cast("MultipartCallbacks", callbacks))
        except FormParserError as exc:
            raise ProblemError(400, f"the multipart form cannot be read: {exc}") from exc

    def feed(self, data: bytes) -> list[bytes]:
        """Parse what came; the pieces of the file in it."""
        self._pieces = []
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise ProblemError(400, f"the multipart form cannot be read: {exc}") from exc
        if self._num_files > 1:
            raise ProblemError(400, "the form has several files; an upload is one: upload each by itself")
        if self._num_fields > MAX_FIELDS:
            raise ProblemError(400, f"the form has more than {MAX_FIELDS} fields besides its file")
        if self._num_other_bytes > MAX_FIELDS_BYTES:
            raise ProblemError(413, f"the fields of the form are larger than {MAX_FIELDS_BYTES:,} bytes")
        return self._pieces

    def end(self) -> None:
        """Return if the form was whole and had a file."""
        if not self._has_ended:
            raise ProblemError(400, "the multipart form ends before its closing boundary")
        if not self._num_files:
            raise ProblemError(400, "the form has no file; send one: curl -F file=@corpus.txt")

    def _begin_part(self) -> None:
        self._is_file = False
        self._name = self._header_name = self._header_value = b""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            if b"filename" in options or options.get(b"name") == b"file":
                self._is_file = True
                self._num_files += 1
                self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            else:
                self._num_fields += 1
                self._name = options.get(b"name", b"")
        self._header_name = self._header_value = b""

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._pieces.append(data[start:end])
        else:
            self._num_other_bytes += end - start
            name = self._name.decode("utf-8", "replace")
            self.fields[name] = self.fields.get(name, "") + data[start:end].decode("utf-8", "replace")

    def _end(self) -> None:
        self._has_ended = True
