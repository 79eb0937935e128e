"""Turn the rows of a fine-tuning data set into tokens, each with whether it is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.conversations import Completion, Example, RowKind, examples_of
from apt_jobs.artifacts.dataset_rows import Row, WrongRow
from apt_jobs.training.chat_template import ChatTemplate, RenderedText
from apt_jobs.training.encoding import DocumentEncoder, Ids, tokenizer_definition

Mask = np.ndarray[tuple[int], np.dtype[np.uint8]]
Positions = np.ndarray[tuple[int], np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """Tokens of some examples, one after the other, and what was wrong with the rows that are not among them."""

    ids: Ids
    mask: Mask  # 1: a token of an answer
    starts: Positions  # of each example in `ids`
    rows: Positions  # the row of each example
    wrong: list[tuple[int, str]]  # row, why


class ExampleEncoder:
    """Encodes batches of rows, in parallel over the cores as `tokenizers` does it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: RowKind, column: str) -> None:
        """Prepare to encode rows of one kind.

        Raises:
            InvalidInput: rows are conversations, and there is no template for them.
        """
        self._kind, self._column = kind, column
        documents = DocumentEncoder(tokenizer)
        self._bos_id, self._eos_id, self.dtype = documents.bos_id, documents.eos_id, documents.dtype
        definition = tokenizer_definition(tokenizer)
        self._plain, self._special = Tokenizer.from_str(definition), Tokenizer.from_str(definition)
        self._plain.encode_special_tokens = True  # `<|endoftext|>` in a completion is text
        self._special.encode_special_tokens = False
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if kind is RowKind.CONVERSATION else None  # others may be plain texts

    def encode(self, rows: Sequence[Row]) -> EncodedExamples:
        """Return the tokens of all rows that can be used."""
        texts: list[tuple[int, RenderedText]] = []
        wrong: list[tuple[int, str]] = []
        for row in rows:
            try:
                written = [self._write(example) for example in examples_of(row.fields, self._kind, self._column)]
            except WrongRow as exc:
                wrong.append((row.number, str(exc)))
                continue
            texts += [(row.number, text) for text in written]
        encodings = self._encodings([text for _, text in texts])
        encoded = [
            (number, *self._with_borders(text, encoding))
            for (number, text), encoding in zip(texts, encodings, strict=True)
        ]
        without_answer = {number for number, _, mask in encoded if not mask.any()}
        wrong += [(number, "its answer has no token") for number in sorted(without_answer)]
        encoded = [one for one in encoded if one[0] not in without_answer]
        ends = np.cumsum([0, *(len(ids) for _, ids, _ in encoded)])
        return EncodedExamples(
            np.concatenate([np.empty(0, np.uint32), *(ids for _, ids, _ in encoded)]),
            np.concatenate([np.empty(0, np.uint8), *(mask for _, _, mask in encoded)]),
            ends[:-1].astype(np.uint64),
            np.array([number for number, _, _ in encoded], np.uint64),
            sorted(wrong),
        )

    def _write(self, example: Example) -> RenderedText:
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            return RenderedText(text, ((len(example.prompt), len(text)),), has_special_tokens=False, is_ended=False)
        self._template = self._template or ChatTemplate(self._tokenizer)
        return self._template.write(example)

    def _encodings(self, texts: Sequence[RenderedText]) -> list[Encoding]:
        found: dict[int, Encoding] = {}
        for tokenizer, is_special in ((self._special, True), (self._plain, False)):
            numbers = [number for number, text in enumerate(texts) if text.has_special_tokens is is_special]
            encoded = tokenizer.encode_batch([texts[number].text for number in numbers], add_special_tokens=False)
            found |= dict(zip(numbers, encoded, strict=True))
        return [found[number] for number in range(len(texts))]

    def _with_borders(self, text: RenderedText, encoding: Encoding) -> tuple[Ids, Mask]:
        """Return the tokens of one example with BOS and EOS, and which of them are answers.

        A token that begins in the prompt and ends in the answer counts as the answer's, as it does for TRL.
        """
        ids = np.asarray(encoding.ids, np.uint32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), np.uint8)
        for begin, end in text.spans:
            mask |= ((offsets[:, 0] < end) & (offsets[:, 1] > begin)).astype(np.uint8)
        if self._bos_id is not None and not text.has_special_tokens:  # a template writes its own
            ids, mask = np.insert(ids, 0, self._bos_id), np.insert(mask, 0, 0)
        if self._eos_id is not None and not text.is_ended:
            ends_with_answer = not text.text[text.spans[-1][1] :].strip()
            ids, mask = np.append(ids, np.uint32(self._eos_id)), np.append(mask, np.uint8(ends_with_answer))
        if len(mask):
            mask[0] = 0  # nothing comes before the first token to predict it from
        return ids, mask
