"""Write a conversation as its model reads it, and find where in that text the answers are.

A template that marks them (`{% generation %}`) says it itself. For any other the conversation is written up to each
answer, and up to its end: what the second has more is the answer. Both have to be how the whole conversation begins,
else the model would be trained on other words than it is asked with later.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from apt_jobs.artifacts.conversations import Conversation
from apt_jobs.artifacts.dataset_rows import WrongRow, shown
from apt_jobs.errors import InvalidInput

_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A text with the parts of it to train on."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [first, after the last) character
    has_special_tokens: bool  # those that are spelled out are tokens, not text
    is_ended: bool  # by a token of the template; else EOS is to be added


class ChatTemplate:
    """One template with the special tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take the template of the tokenizer.

        Raises:
            InvalidInput: it has none, or one that Jinja does not read.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name, as some older models have them
            template = template.get("default")
        if not template:
            raise InvalidInput(
                "the data set holds conversations, and the model has no chat template to write them with: "
                "give one as data.chat_template, or start from a base_model that has one"
            )
        self._template: str = template
        self._tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._special = {str(token) for token in tokenizer.all_special_tokens}
        self._special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._marks_answers = _MARKS_ANSWERS.search(template) is not None
        try:
            self._render([{"role": "user", "content": "a"}], None)
        except _FAILURES as exc:  # others than this one may come from the beginning: each conversation tries again
            if isinstance(exc, TemplateSyntaxError):
                raise InvalidInput(f"the chat template is no Jinja: line {exc.lineno}: {exc.message}") from exc

    def write(self, conversation: Conversation) -> RenderedText:
        """Return the text of a conversation, and its answers.

        Raises:
            WrongRow: the template fails, or does not show where an answer is.
        """
        try:
            if conversation.is_completion:
                text, spans = self._completed(conversation)
            elif self._marks_answers:
                text, spans = self._marked(conversation)
            else:
                text = self._render(conversation.messages, conversation.tools)[0]
                spans = tuple(self._span(conversation, number, text) for number in conversation.answers)
        except _FAILURES as exc:
            if isinstance(exc, WrongRow):
                raise
            raise WrongRow(f"the chat template fails: {shown(f'{type(exc).__name__}: {exc}')}") from exc
        is_ended = any(token in text[spans[-1][0] :] for token in self._special if token)
        return RenderedText(text, spans, has_special_tokens=True, is_ended=is_ended)

    def _marked(self, conversation: Conversation) -> tuple[str, tuple[tuple[int, int], ...]]:
        text, marked = self._render(conversation.messages, conversation.tools, return_assistant_tokens_mask=True)
        in_order = [number for number, one in enumerate(conversation.messages) if one["role"] == "assistant"]
        if len(marked) != len(in_order):
            raise WrongRow(f"the chat template marks {len(marked)} answers of {len(in_order)}")
        wanted = set(conversation.answers)
        return text, tuple(span for number, span in zip(in_order, marked, strict=True) if number in wanted)

    def _completed(self, conversation: Conversation) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return the text of a prompt with one answer: all that comes after the prompt is trained on, as TRL has it."""
        text, _ = self._render(conversation.messages, conversation.tools)
        return text, ((self._prompt_chars(conversation, len(conversation.messages) - 1, text), len(text)),)

    def _prompt_chars(self, conversation: Conversation, number: int, text: str) -> int:
        """Return how much of the text the model is given when it is asked for message `number`."""
        prompt, _ = self._render(conversation.messages[:number], conversation.tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise WrongRow(
                f"the chat template asks for message {number + 1} in other words than it writes the conversation: "
                f"{shown(prompt[-80:])!r} is not how it begins; use one with {{% generation %}}"
            )
        return len(prompt)

    def _span(self, conversation: Conversation, number: int, text: str) -> tuple[int, int]:
        """Return where the answer is that message `number` is."""
        messages, tools = conversation.messages, conversation.tools
        start = self._prompt_chars(conversation, number, text)
        until, _ = self._render(messages[: number + 1], tools)
        content = messages[number]["content"].strip()
        if text.startswith(until) and len(until) > start:
            end = len(until)
            rest = until[until.rfind(content) + len(content) :] if content else ""
        else:  # some write an answer another way once the conversation goes on: without its reasoning, say
            begin, at = text.find(content, start), until.rfind(content)
            rest = until[at + len(content) :] if content and at >= 0 else ""
            end = begin + len(content) + len(rest)
            if not content or begin < 0 or at < 0 or not text.startswith(rest, begin + len(content)):
                raise WrongRow(
                    f"the chat template writes message {number + 1} another way once the conversation goes on; "
                    "use one with {% generation %}"
                )
        if rest.strip():  # what follows the end of a turn is the template's, not the model's
            end -= len(rest) - len(rest.rstrip())
        return start, end

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        texts: Any
        marked: Any
        texts, marked = render_jinja_template(  # type: ignore[str-unpack]  # it returns a pair, whatever it says
            conversations=[messages], tools=tools, chat_template=self._template, **options, **self._tokens
        )
        return texts[0], marked[0] if marked else []
