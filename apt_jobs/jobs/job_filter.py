"""The filter language of lists of jobs: `state:running,queued label:team=a lr>1e-3 -kind:generate "some text"`.

Terms stand side by side, and all of them have to hold; a minus before one turns it round. This is the only parser; what
a term means for a row of the database is in `db/job_filters.py`.
"""

import math
import re
from dataclasses import dataclass

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.states import JobState

MAX_CHARS = 2_000
MAX_TERMS = 20
WORD_FIELDS = ("state", "kind", "queue", "sweep", "schedule", "id")
NO_SWEEP = "none"  # `sweep:none`: jobs of no sweep
ALIASES = {"lr": "training.learning_rate"}
COLUMNS = ("priority", "attempt", "step", "num_steps")  # numbers of the row itself
OPERATORS = ("=", "!=", ">", ">=", "<", "<=")

_TERM = re.compile(
    r"""(?P<minus>-)?(?:
      (?P<field>[a-z]+):(?P<words>"[^"]*"|[^\s"]+)
    | (?P<path>[A-Za-z][A-Za-z0-9_./-]*)(?P<operator>>=|<=|!=|=|>|<)(?P<value>"[^"]*"|[^\s"]+)
    | "(?P<quoted>[^"]*)"
    | (?P<bare>[^\s"]+)
    )(?=\s|$)""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class WordTerm:
    """That a field is one of some words."""

    field: str
    words: tuple[str, ...]
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class LabelTerm:
    """That a job has a label, with a value if one is given."""

    name: str
    value: str | None
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class NumberTerm:
    """That a number of the row, of its spec or of its metrics compares so. What has no number there does not match."""

    path: str  # `step`, `training.learning_rate`, `train_loss`
    operator: str  # one of `OPERATORS`
    value: float
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class EqualTerm:
    """That a text of the spec is this one, or is another one."""

    path: str
    value: str
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class TextTerm:
    """That name or id has a part, whatever the case of ASCII letters."""

    text: str
    is_negated: bool = False


Term = WordTerm | LabelTerm | NumberTerm | EqualTerm | TextTerm


def parse_filter(text: str) -> list[Term]:
    """Return the terms of a filter; none of an empty one.

    Raises:
        InvalidInput: it is too long, or a term cannot be read; the message says which and what would be right.
    """
    if len(text) > MAX_CHARS:
        raise InvalidInput(f"the filter has {len(text):,} characters; at most {MAX_CHARS:,} are allowed")
    terms: list[Term] = []
    place = len(text) - len(text.lstrip())
    while place < len(text):
        found = _TERM.match(text, place)
        if found is None:
            shown = text[place : place + 40]
            why = "a quote is not closed" if shown.count('"') % 2 else "it is no term"
            raise InvalidInput(f"the filter cannot be read at {shown!r}: {why}; {_EXAMPLES}")
        terms.append(_term(found))
        place = found.end()
        place += len(text[place:]) - len(text[place:].lstrip())
    if len(terms) > MAX_TERMS:
        raise InvalidInput(f"the filter has {len(terms)} terms; at most {MAX_TERMS} are allowed")
    return terms


_EXAMPLES = 'write terms as state:running, label:team=a, training.learning_rate>1e-3, "part of a name", -kind:generate'


def _term(found: re.Match[str]) -> Term:
    is_negated = found["minus"] is not None
    if found["field"] is not None:
        return _word_term(found["field"], _unquoted(found["words"]), is_negated)
    if found["path"] is not None:
        return _path_term(found, is_negated)
    text = found["quoted"] if found["quoted"] is not None else found["bare"]
    return TextTerm(text, is_negated)


def _word_term(field: str, text: str, is_negated: bool) -> Term:
    if field == "label":
        name, equals, value = text.partition("=")
        if not name:
            raise InvalidInput(f"label:{text} names no label; write label:team or label:team=a")
        return LabelTerm(name, value if equals else None, is_negated)
    if field not in WORD_FIELDS:
        raise InvalidInput(f"the filter has no field {field!r}; it knows label, {', '.join(WORD_FIELDS)}")
    words = tuple(word for word in text.split(",") if word)
    known = {"state": [state.value for state in JobState], "kind": ["train", "generate"]}.get(field)
    for word in words:
        if known is not None and word not in known:
            raise InvalidInput(f"there is no {field} {word!r}; expected one of {', '.join(known)}")
    if not words:
        raise InvalidInput(f"{field}: names nothing; write {field}:a or {field}:a,b")
    return WordTerm(field, words, is_negated)


def _path_term(found: re.Match[str], is_negated: bool) -> Term:
    path, operator, text = ALIASES.get(found["path"], found["path"]), found["operator"], found["value"]
    number = None
    if not text.startswith('"'):
        try:
            number = float(text)
        except ValueError:
            pass
    if number is not None and math.isfinite(number):
        return NumberTerm(path, operator, number, is_negated)
    if operator in ("=", "!=") and "." in path:
        return EqualTerm(path, _unquoted(text), is_negated != (operator == "!="))
    expected = "a finite number" if operator not in ("=", "!=") else 'a number, or a path of the job as "model.x"'
    raise InvalidInput(f"{found[0]!r} compares with {text[:40]!r}; expected {expected}")


def _unquoted(text: str) -> str:
    return text[1:-1] if text.startswith('"') else text
