"""What a row of a fine-tuning data set holds: a conversation, a prompt with its completion, or a pair to prefer from.

Rows are in the forms that others use: `messages`, `prompt` and `completion`, `prompt` with `chosen` and `rejected`.
Each of the last four is a text or a list of messages.
"""

import enum
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from apt_jobs.artifacts.dataset_rows import Source, WrongRow, first_fields, kind_of, shown
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ANSWERING_ROLE = "assistant"
MESSAGES, PROMPT, COMPLETION, CHOSEN, REJECTED, TOOLS = (
    *("messages", "prompt", "completion", "chosen", "rejected", "tools"),
)


class RowKind(enum.StrEnum):
    """What every row of a data set holds."""

    TEXT = "text"  # a document, all of which is trained on
    CONVERSATION = "conversation"
    COMPLETION = "completion"
    PREFERENCE = "preference"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, of which some are answers to train on."""

    messages: list[dict[str, Any]]
    answers: list[int]  # indices of messages
    tools: list[Any] | None = None
    is_completion: bool = False  # the last message is the only answer, and all that is written for it is trained on


@dataclass(frozen=True, slots=True)
class Completion:
    """A text, and the text to train on that follows it."""

    prompt: str
    completion: str


Example = Conversation | Completion


def find_row_kind(source: Source, objective: str) -> RowKind:
    """Return what the rows of a data set hold, as its first one shows it.

    Raises:
        InvalidDataset: that is nothing to train on with this objective, or cannot be read.
    """
    fields = first_fields(source) if source.has_rows else {}
    return row_kind_of(fields, source.column, source.name, objective)


def row_kind_of(fields: Mapping[str, Any], column: str, name: str, objective: str) -> RowKind:
    """Return what a row with these fields, and so every row of its data set, holds.

    Raises:
        InvalidDataset: that is nothing to train on with this objective.
    """
    has_pair = CHOSEN in fields and REJECTED in fields
    if objective == "dpo":
        if not has_pair:
            raise InvalidDataset(
                f"data set {name!r} has no preferences: training.objective 'dpo' needs rows with `prompt`, `chosen` "
                f"and `rejected`; it has: {_names(fields)}"
            )
        return RowKind.PREFERENCE
    if column in fields:
        return RowKind.CONVERSATION if isinstance(fields[column], list) else RowKind.TEXT
    if column != DEFAULT_COLUMN:
        return RowKind.TEXT  # whose reader says that the column is missing
    if MESSAGES in fields:
        return RowKind.CONVERSATION
    if PROMPT in fields and COMPLETION in fields:
        return RowKind.COMPLETION
    if has_pair:
        raise InvalidDataset(f"data set {name!r} holds preferences; set training.objective to 'dpo' to train on them")
    return RowKind.TEXT


def columns_of(kind: RowKind, column: str, existing: Container[str]) -> list[str]:
    """Return the columns of a Parquet file that rows of this kind need."""
    fields = {
        RowKind.TEXT: [column],
        RowKind.CONVERSATION: [_messages_field(column), TOOLS],
        RowKind.COMPLETION: [PROMPT, COMPLETION, TOOLS],
        RowKind.PREFERENCE: [PROMPT, CHOSEN, REJECTED, TOOLS],
    }
    return [field for field in fields[kind] if field in existing]


def examples_of(row: Mapping[str, Any], kind: RowKind, column: str) -> list[Example]:
    """Return what a row holds: one example, or the chosen and the rejected one.

    Raises:
        WrongRow: it is not of this kind, or has nothing to train on.
    """
    if kind is RowKind.CONVERSATION:
        field = _messages_field(column)
        return [_conversation([], _messages(_given(row, field), field), _tools(row))]
    if kind is RowKind.COMPLETION:
        return [_example(row, _given(row, PROMPT), COMPLETION)]
    chosen, rejected = _given(row, CHOSEN), _given(row, REJECTED)
    if row.get(PROMPT) is not None:
        prompt = row[PROMPT]
        if isinstance(prompt, str) and isinstance(chosen, list):
            return _with_common_beginning(row, chosen, rejected)  # the prompt is in both, too
        return [_example(row, prompt, CHOSEN), _example(row, prompt, REJECTED)]
    return _with_common_beginning(row, chosen, rejected)


def contents_of(example: Example) -> list[str]:
    """Return the texts of an example, for a vocabulary to be learned from."""
    if isinstance(example, Completion):
        return [example.prompt + example.completion]
    return [message["content"] for message in example.messages if isinstance(message.get("content"), str)]


def _messages_field(column: str) -> str:
    return MESSAGES if column == DEFAULT_COLUMN else column


def _example(row: Mapping[str, Any], prompt: Any, field: str) -> Example:
    completion = _given(row, field)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise WrongRow(f"field {field!r} is empty")
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(_messages(prompt, PROMPT), _messages(completion, field), _tools(row))
    raise WrongRow(
        f"fields {PROMPT!r} and {field!r} are a JSON {kind_of(prompt)} and a JSON {kind_of(completion)}; expected two "
        "strings or two lists of messages"
    )


def _with_common_beginning(row: Mapping[str, Any], chosen: Any, rejected: Any) -> list[Example]:
    """Return a pair of whole conversations; what both begin with is their prompt."""
    both = _messages(chosen, CHOSEN), _messages(rejected, REJECTED)
    num_common = 0
    for one, other in zip(*both, strict=False):
        if one != other:
            break
        num_common += 1
    return [_conversation(messages[:num_common], messages[num_common:], _tools(row)) for messages in both]


def _conversation(prompt: list[dict[str, Any]], rest: list[dict[str, Any]], tools: list[Any] | None) -> Conversation:
    answers = [
        number
        for number, message in enumerate(rest, start=len(prompt))
        if message["role"] == ANSWERING_ROLE and message.get("weight", 1) != 0  # 0: as in OpenAI's files, no loss
    ]
    if not answers:
        raise WrongRow("there is no answer to train on: no message of the role 'assistant'")
    if answers[0] == 0:
        raise WrongRow("it begins with the answer: a message of the role 'user' is missing before it")
    messages = [{key: value for key, value in one.items() if key != "weight"} for one in (*prompt, *rest)]
    return Conversation(messages, answers, tools, is_completion=bool(prompt) and len(rest) == 1)


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise WrongRow(f"field {field!r} is a JSON {kind_of(value)}; expected a list of messages")
    if not value:
        raise WrongRow(f"field {field!r} has no message")
    return [_message(one, f"message {number} of {field!r}") for number, one in enumerate(value, start=1)]


def _message(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongRow(f"{what} is a JSON {kind_of(value)}; expected an object with `role` and `content`")
    message = {key: one for key, one in value.items() if one is not None}  # Parquet fills what is missing
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise WrongRow(f"{what} has no `role`; it has: {_names(message)}")
    if role not in ROLES:
        raise WrongRow(f"{what} has the role {shown(role)!r}; expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        message["content"] = content = _joined(content, what)
    if content is None and role == ANSWERING_ROLE and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise WrongRow(f"{what} has a JSON {kind_of(content)} as `content`; expected a string")
    may_be_empty = role not in ("user", ANSWERING_ROLE) or message.get("tool_calls")
    if not content.strip() and not may_be_empty:
        raise WrongRow(f"{what}, of the role {role!r}, is empty")
    return message


def _joined(parts: list[Any], what: str) -> str:
    """Return the text of a content in parts, as it is written for models that see images, too."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise WrongRow(f"{what} has a part that is no text: {shown(str(part))}")
    return "".join(part["text"] for part in parts)


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as exc:
            raise WrongRow(f"field {TOOLS!r} is a string that is not JSON: {exc.msg}") from exc
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise WrongRow(f"field {TOOLS!r} is no list of JSON schemas")
    return tools


def _given(row: Mapping[str, Any], field: str) -> Any:
    if row.get(field) is None:
        raise WrongRow(f"no field {field!r}; it has: {_names(row)}")
    return row[field]


def _names(fields: Mapping[str, Any]) -> str:
    return shown(", ".join(map(repr, list(fields)[:10])) or "none")
