"""Prepare the data of an attempt: from documents to tokens on disk, once for each data set and tokenizer.

Rank 0 does it before it joins the process group, the other ranks wait for its pointer: no collective runs meanwhile, so
none times out. Memory is bounded by a batch of pieces, whatever the size of the data set. What is made is kept under a
hash of all that decides it, so that retries, other ranks and other jobs find it made.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.conversations import RowKind, find_row_kind
from apt_jobs.artifacts.dataset_rows import RowReader, Source
from apt_jobs.errors import InvalidDataset, OutOfSpace
from apt_jobs.events.kinds import LineLogged
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.folder_lock import FolderLock, lock_path
from apt_jobs.jobs.mixture import shares_of
from apt_jobs.jobs.outcome import Outcome, write_outcome
from apt_jobs.jobs.run_file import NamedSource, RunFile
from apt_jobs.jobs.spec import BUILTIN_DATASET
from apt_jobs.training.context import context_length
from apt_jobs.training.documents import DocumentReader, Piece
from apt_jobs.training.encoding import DocumentEncoder, Encoded, tokenizer_definition
from apt_jobs.training.preparation_progress import PreparationProgress
from apt_jobs.training.prepare_examples import ExampleFiles, check_lengths, require_alike, texts_of
from apt_jobs.training.prepared import (
    ABOUT,
    DOCUMENTS,
    TOKENS,
    VALIDATION,
    Pointer,
    evaluation_pointer_name,
    has_pointer,
    is_complete,
    mixed_pointer_name,
    publish,
    read_prepared,
    synced,
)
from apt_jobs.training.token_files import token_file_pointer
from apt_jobs.training.tokenizer import TRAINING_CHARS, learn_vocabulary, load_tokenizer, wrap_tokenizer

PREPARATION_VERSION = 1  # raise it when the same input gives other tokens
BATCH_CHARS = 2 << 20  # tokenised at once; two batches are in memory, about 150 bytes a character
RESERVE_BYTES = 64 << 20  # left free on the disk
POLL_S = 0.05  # between two looks of the other ranks
LOCK_POLL_S = 0.5
MIN_STOP_AFTER_S = 5.0  # a preparation is not given up before
_VOCABULARY = "tokenizer.json"


class PreparationStopped(Exception):
    """The attempt was asked to stop; nothing of an unfinished preparation is kept."""


@contextmanager
def prepared_data(run_file: RunFile, spool: SpoolWriter, rank: int) -> Iterator[PreTrainedTokenizerFast | None]:
    """Have the data of an attempt prepared, and kept while the block runs. Called by every rank, before they meet.

    Yields the tokenizer; None: the attempt was asked to stop meanwhile.

    Raises:
        InvalidDataset: the data cannot be used; the message names rows or bytes.
        OutOfSpace: the disk has no room for the tokens.
    """
    if rank != 0:
        yield load_tokenizer(_tokenizer_dir(run_file)) if _wait_for_pointer(run_file) else None
        return
    preparation = _Preparation(run_file, spool)
    try:
        try:
            with _parallel_tokenizers():
                tokenizer = preparation.run()
        except PreparationStopped:
            write_outcome(run_file.outcome_path, Outcome.STOPPED)
            yield None
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutOfSpace(f"no room for the prepared data set: {exc.strerror}") from exc
        yield tokenizer
    finally:
        preparation.close()


def _wait_for_pointer(run_file: RunFile) -> bool:
    """Wait for rank 0, with which torchrun and the supervisor end this process if it fails or hangs."""
    while not has_pointer(run_file.run_dir):
        if run_file.outcome_path.exists():
            return False
        time.sleep(POLL_S)
    return True


@contextmanager
def _parallel_tokenizers() -> Iterator[None]:
    """Let `tokenizers` use all cores. It reads the variable at each batch."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def _tokenizer_dir(run_file: RunFile) -> Path:
    bases = [run_file.base_model_dir, *run_file.base_adapter_dirs]  # the last adapter's has the template it was given
    return run_file.resume_dir or bases[-1] or run_file.run_dir / "tokenizer"


class _Preparation:
    """What rank 0 does."""

    def __init__(self, run_file: RunFile, spool: SpoolWriter) -> None:
        self._run_file, self._spool = run_file, spool
        self._is_learned = not (run_file.resume_dir or run_file.base_model_dir)  # the vocabulary
        self._use(run_file.dataset_source)
        self._root = run_file.prepared_dir or run_file.run_dir / "prepared"
        self._locks: list[FolderLock] = []
        self._began_s = time.monotonic()

    def run(self) -> PreTrainedTokenizerFast:
        """Prepare, and write the pointers."""
        run_file, folder = self._run_file, _tokenizer_dir(self._run_file)
        has_words = not self._source.format.is_tokens
        if self._is_learned and has_words:
            self._make_tokenizer(folder)
        tokenizer = None if self._is_learned and not has_words else self._load_tokenizer(folder)
        pointer = self._pointer(tokenizer, folder)
        assert tokenizer is not None  # else the data set was refused
        kind = self._kind
        for field, file_name, source in self._further_sources():
            self._use(source)
            require_alike(kind, self._kind, field, self._words)
            self._pointer(tokenizer, folder).write(run_file.run_dir, file_name)
        pointer.write(run_file.run_dir)  # last: it is what other ranks wait for
        return tokenizer

    def _further_sources(self) -> Iterator[tuple[str, str, NamedSource]]:
        """Yield the data sets besides the first one: field of the job, name of the pointer's file, source."""
        run_file = self._run_file
        for number, source in enumerate(run_file.mixed_sources, start=1):
            yield "datasets", mixed_pointer_name(number), source
        if run_file.validation_source is not None:
            yield "validation_dataset", VALIDATION, run_file.validation_source
        for name, source in run_file.evaluation_sources.items():
            yield f"validation_datasets/{name}", evaluation_pointer_name(name), source

    def _use(self, source: NamedSource) -> None:
        """Prepare this data set from now on."""
        self._given, self._source = source, Source(source.name, source.file, source.format, source.column)
        self._words = "the built-in data set" if source.name == BUILTIN_DATASET else f"data set {source.name!r}"
        self._kind = find_row_kind(self._source, self._run_file.spec.training.objective)

    def _pointer(self, tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> Pointer:
        if self._source.format.is_tokens or tokenizer is None:
            of_the_tokens = None if self._is_learned else tokenizer
            return token_file_pointer(self._source, of_the_tokens, folder, self._stop_if_asked)
        return self._tokens(self._sha256_of(self._given), tokenizer)

    def _sha256_of(self, given: NamedSource) -> str:
        return given.sha256 or self._hash(Source(given.name, given.file, given.format, given.column))

    def close(self) -> None:
        """Let what was prepared be removed."""
        for lock in self._locks:
            lock.close()

    def _load_tokenizer(self, folder: Path) -> PreTrainedTokenizerFast:
        """Return the tokenizer with the job's template, which is saved with every checkpoint."""
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = self._run_file.spec.data.chat_template or tokenizer.chat_template
        return tokenizer

    def _hash(self, source: Source) -> str:
        digest = hashlib.sha256()
        if source.file is None:
            for piece in DocumentReader(source).pieces():
                digest.update(piece.text.encode())
            return digest.hexdigest()
        try:
            with source.file.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
                    self._stop_if_asked()
        except OSError as exc:
            raise InvalidDataset(f"data set {source.name!r} cannot be read: {exc.strerror}") from exc
        return digest.hexdigest()

    def _make_tokenizer(self, folder: Path) -> None:
        """Learn a vocabulary from the first documents, or find the one that an earlier attempt has learned."""
        run_file, spec = self._run_file, self._run_file.spec
        sources = [run_file.dataset_source, *run_file.mixed_sources]

        def build(temporary: Path) -> None:
            self._log(f"learning {spec.model.vocab_size:,} tokens from {self._words}")
            tokenizer = learn_vocabulary(self._samples(sources), spec.model.vocab_size)
            with synced(temporary / _VOCABULARY) as file:
                file.write(tokenizer.to_str().encode())

        hashes = [self._sha256_of(source) for source in sources]
        weights = [str(one.weight) for one in spec.datasets or ()]
        key = self._key("vocabulary", *hashes, *weights, str(spec.model.vocab_size), str(TRAINING_CHARS))
        found = self._shared(f"vocabulary-{key}", build)
        tokenizer = Tokenizer.from_file(str(found / _VOCABULARY))
        wrap_tokenizer(tokenizer, spec.model.max_seq_len).save_pretrained(folder)

    def _samples(self, sources: list[NamedSource]) -> Iterator[str]:
        """Yield the first texts of each data set, of each as many characters as its share."""
        for source, share in zip(sources, shares_of(self._run_file.spec.mixture), strict=True):
            if not source.format.is_tokens:  # it is refused where it is opened
                self._use(source)
                yield from self._sample(max(int(share * TRAINING_CHARS), 1))
        self._use(sources[0])

    def _sample(self, max_chars: int) -> Iterator[str]:
        reader, num_chars = DocumentReader(self._source), 0
        is_text = self._kind is RowKind.TEXT
        texts = (piece.text for piece in reader.pieces()) if is_text else texts_of(self._source, self._kind)
        for text in texts:
            self._stop_if_asked()
            yield text[: max_chars - num_chars]
            num_chars += len(text)
            if num_chars >= max_chars:
                break
        if reader.wrong_rows:  # say so before time goes into the vocabulary
            self._find_wrong_rows()
        if num_chars == 0:
            raise InvalidDataset(f"{self._words} is empty")

    def _find_wrong_rows(self) -> None:
        reader = DocumentReader(self._source)
        for _ in reader.pieces():
            self._stop_if_asked()
        reader.require_no_wrong_rows()

    def _tokens(self, sha256: str, tokenizer: PreTrainedTokenizerFast) -> Pointer:
        spec, source = self._run_file.spec, self._source
        definition = tokenizer_definition(tokenizer)
        special = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
        parts = ["tokens", sha256, source.format, source.column, special, definition]
        if self._kind is RowKind.TEXT:
            folder = self._shared(self._key(*parts), lambda temporary: self._write_tokens(temporary, tokenizer))
            return read_prepared(folder)
        parts += [self._kind, json.dumps(tokenizer.chat_template)]
        folder = self._shared(self._key(*parts), lambda temporary: self._write_examples(temporary, tokenizer))
        pointer = read_prepared(folder)
        words = check_lengths(pointer, source, spec.data, context_length(self._run_file))
        if words is not None:
            self._log(words)
        return pointer

    def _write_examples(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        files = ExampleFiles(self._source, self._kind, tokenizer)
        progress = PreparationProgress(self._words, RowReader(self._source).num_bytes, self._log)

        def on_batch(num_read: int) -> None:
            self._stop_if_asked()
            self._require_room(folder)
            progress.update(num_read)

        num_examples, num_tokens = files.write(folder, on_batch)
        progress.finish(num_tokens, num_examples, 0)

    def _write_tokens(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenise all documents into a folder, a batch at a time, reading one while another is encoded."""
        reader, encoder = DocumentReader(self._source), DocumentEncoder(tokenizer)
        progress = PreparationProgress(self._words, reader.num_bytes, self._log)
        num_tokens = num_documents = 0
        with (
            synced(folder / TOKENS) as tokens,
            synced(folder / DOCUMENTS) as documents,
            ThreadPoolExecutor(1, "encode") as executor,
        ):

            def write(encoded: Encoded) -> None:
                nonlocal num_tokens, num_documents
                self._require_room(folder)
                tokens.write(encoded.ids.astype(encoder.dtype).tobytes())
                documents.write(array("Q", (num_tokens + start for start in encoded.starts)).tobytes())
                num_tokens += len(encoded.ids)
                num_documents += len(encoded.starts)

            pending: Future[Encoded] | None = None
            for batch in _batches(reader):
                self._stop_if_asked()
                if reader.wrong_rows:  # read on for the others, but spend nothing on tokens
                    continue
                encoding = executor.submit(encoder.encode, batch)
                if pending is not None:
                    write(pending.result())
                pending = encoding
                progress.update(reader.num_bytes_read)
            if pending is not None:
                write(pending.result())
        reader.require_no_wrong_rows()
        if num_documents == 0:
            raise InvalidDataset(f"{self._words} is empty")
        about = {
            "dtype": encoder.dtype.str,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "num_empty_documents": reader.num_empty,
        }
        with synced(folder / ABOUT) as file:
            file.write(json.dumps(about).encode())
        progress.finish(num_tokens, num_documents, reader.num_empty)

    def _shared(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder of this name, made by this process or by another; it is kept until `close`."""
        folder = self._root / name
        lock = FolderLock(lock_path(folder))
        self._locks.append(lock)
        is_logged = False
        while True:
            if lock.try_shared() and _is_whole(folder):
                os.utime(folder)  # the one that was not used for longest is removed first
                return folder
            if lock.try_exclusive():  # which gives up the shared lock, if it fails as well
                if not _is_whole(folder):
                    self._build(folder, build)
                continue
            if not is_logged and not folder.is_dir():
                self._log(f"waiting for another job, which prepares {self._words}")
                is_logged = True
            self._stop_if_asked()
            time.sleep(LOCK_POLL_S)

    def _build(self, folder: Path, build: Callable[[Path], None]) -> None:
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        try:
            self._require_room(temporary)
            build(temporary)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there
            publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _key(self, *parts: str) -> str:
        all_parts = [str(PREPARATION_VERSION), tokenizers.__version__, *parts]
        return hashlib.sha256(json.dumps(all_parts).encode()).hexdigest()[:32]

    def _require_room(self, folder: Path) -> None:
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < RESERVE_BYTES:
            raise OutOfSpace(
                f"no room to prepare {self._words}: {free_bytes:,} bytes are free, {RESERVE_BYTES:,} must stay so"
            )

    def _stop_if_asked(self) -> None:
        """Give up when the attempt is to stop, unless this may end soon: then the training stops, and saves."""
        if self._run_file.stop_path.exists() and time.monotonic() - self._began_s > MIN_STOP_AFTER_S:
            raise PreparationStopped

    def _log(self, words: str) -> None:
        self._spool.append(LineLogged("info", "rank 0", words))


def _is_whole(folder: Path) -> bool:
    """Return whether a folder is there, and not cut by something else."""
    if not (folder / ABOUT).exists():
        return (folder / _VOCABULARY).exists()
    return is_complete(folder)


def _batches(reader: DocumentReader) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_chars = 0
    for piece in reader.pieces():
        batch.append(piece)
        num_chars += len(piece.text) + 64  # what a piece costs besides its text
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    yield batch
