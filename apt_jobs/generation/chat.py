"""A chat as tokens: the tokenizer's own template around the messages, whose text is never read as special tokens."""

import secrets
from collections.abc import Sequence

from apt_jobs.errors import InvalidInput
from apt_jobs.generation.models import LoadedModel
from apt_jobs.jobs.spec import ChatMessage


def encode_chat(model: LoadedModel, messages: Sequence[ChatMessage]) -> list[int]:
    """Return the prompt of the assistant's next message.

    Raises:
        InvalidInput: the model has no template, or its template refuses the messages.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"model {model.folder.name!r} has no chat template: ask for a completion of a text, or choose another model"
        )
    names = [name for name in tokenizer.get_added_vocab() if name]
    if not any(name in message.content for message in messages for name in names):
        return _tokens(model, _written(model, messages))
    mark = secrets.token_hex(16)  # the template is written around marks, and the texts are encoded apart from it
    marked = [
        ChatMessage(role=message.role, content=f"{mark}{number:04d}{mark}") for number, message in enumerate(messages)
    ]
    parts = _written(model, marked).split(mark)
    prompt: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            prompt += model.encode(messages[int(part)].content)
        else:
            prompt += _tokens(model, part)
    return prompt


def _written(model: LoadedModel, messages: Sequence[ChatMessage]) -> str:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        written = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as exc:  # a template raises whatever it likes, jinja2's errors included
        raise InvalidInput(f"the chat template of model {model.folder.name!r} refuses the messages: {exc}") from exc
    assert isinstance(written, str)
    return written


def _tokens(model: LoadedModel, text: str) -> list[int]:
    tokens: list[int] = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens
