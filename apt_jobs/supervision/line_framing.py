"""From the bytes that a process prints to lines: what a terminal would show, one state of a progress bar at a time."""

import codecs

REWRITE_EVERY_S = 5.0  # between two states of a line that is not finished: a progress bar, a row of dots
MAX_LINE_CHARS = 2_000
LAST_CHARS = 400  # of a line that is cut: how much of its end is kept
MAX_PENDING_BYTES = 1 << 18  # of a line that has not ended


class LineFramer:
    """Splits one stream of bytes at line feeds, wherever reads cut it.

    A carriage return begins the line again: only the last state of a line counts, and while the line goes on, the state
    that it has every `REWRITE_EVERY_S` seconds. Other characters that Python calls line ends (U+2028, form feed) are
    part of a line.
    """

    def __init__(self) -> None:
        self._pending = bytearray()  # of the line that has not ended
        self._rewritten = b""  # the last state before it: a bar that is done is often overwritten with blanks
        self._num_cut_bytes = 0  # that are missing in the middle of `_pending`
        self._began_s = 0.0  # when the pending line began, or when its last state was shown
        self._shown = ""  # that state

    def feed(self, chunk: bytes, now_s: float) -> list[str]:
        """Add what was read at `now_s`; return the lines that ended with it, and states of the one that did not."""
        lines = []
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._extend(part, now_s)
            lines += self._end_line()
        self._extend(rest, now_s)
        return lines + self.poll(now_s)

    def poll(self, now_s: float) -> list[str]:
        """Return the state of the pending line when it is time to show one that is new."""
        if not self._pending or now_s - self._began_s < REWRITE_EVERY_S:
            return []
        self._began_s = now_s
        state = self._text(is_final=False)
        if not state or state == self._shown:
            return []
        self._shown = state
        return [state]

    def end(self) -> list[str]:
        """Return the last line, which no line feed ended."""
        return self._end_line()

    def skip(self) -> None:
        """Forget the pending line: what follows it was left out."""
        self._pending.clear()
        self._rewritten, self._num_cut_bytes, self._shown = b"", 0, ""

    def _extend(self, part: bytes, now_s: float) -> None:
        if not part:
            return
        if not self._pending:
            self._began_s = now_s
        self._pending += part
        if (start := self._pending.rfind(b"\r", 0, len(self._pending.rstrip(b"\r")))) >= 0:
            states = [state for state in self._pending[:start].split(b"\r") if state.strip()]
            self._rewritten = bytes(states[-1])[-MAX_LINE_CHARS:] if states else self._rewritten
            del self._pending[: start + 1]
            self._num_cut_bytes = 0
        if (excess := len(self._pending) - MAX_PENDING_BYTES) > 0:
            middle = MAX_PENDING_BYTES // 2
            del self._pending[middle : middle + excess]
            self._num_cut_bytes += excess

    def _end_line(self) -> list[str]:
        line, shown = self._text(is_final=True), self._shown
        self.skip()
        return [line] if line and line != shown else []

    def _text(self, *, is_final: bool) -> str:
        """Return what the pending line shows, without a character that is not whole yet, unless it never will be."""
        data = bytes(self._pending.rstrip(b"\r"))
        data = data if data.strip() else self._rewritten
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, is_final)
        return shortened(text.replace("\0", "\N{SYMBOL FOR NULL}"), self._num_cut_bytes) if text.strip() else ""


def shortened(text: str, num_cut: int = 0) -> str:
    """Return a line with its middle left out if it is too long; `num_cut` more characters were already."""
    if len(text) <= MAX_LINE_CHARS and not num_cut:
        return text
    num_left_out = num_cut + len(text) - MAX_LINE_CHARS
    return f"{text[: MAX_LINE_CHARS - LAST_CHARS]} [... {num_left_out:,} characters left out ...] {text[-LAST_CHARS:]}"


def shown_lines(data: bytes) -> list[str]:
    """Return the lines of a piece of a finished file that are not empty."""
    framer = LineFramer()
    return [line for line in [*framer.feed(data, 0.0), *framer.end()] if line]
