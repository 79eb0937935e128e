"""The preparation of a data set: the tokens that it writes, what it shares, and what it refuses."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from apt_jobs.errors import InvalidDataset, InvalidInput, OutOfSpace
from apt_jobs.events.kinds import LineLogged
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.folder_lock import FolderLock, lock_path
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.mixture import WeightedDataset
from apt_jobs.jobs.run_file import NamedSource, RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training import prepare
from apt_jobs.training.mixture import MixedSequences
from apt_jobs.training.open_batches import open_batches
from apt_jobs.training.preparation_progress import PreparationProgress
from apt_jobs.training.prepare import prepared_data
from apt_jobs.training.prepared import read_pointer
from apt_jobs.training.tokenizer import EOS
from tests.integration.run_files import run_file_in

MODEL = {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32}


def _run_file(folder: Path, content: bytes | None, **fields: Any) -> RunFile:
    folder.mkdir()
    spec = TrainSpec.model_validate({"kind": "train", "device": "cpu", "model": MODEL, "dataset": "mine"})
    if content is not None:
        (folder / "data").write_bytes(content)
        fields["dataset_file"] = folder / "data"
    return run_file_in(folder, spec, prepared_dir=folder.parent / "prepared", **fields)


def _prepare(run_file: RunFile) -> tuple[list[int], PreTrainedTokenizerFast]:
    with SpoolWriter(run_file.spool_path(0)) as spool, prepared_data(run_file, spool, 0) as tokenizer:
        assert tokenizer is not None
        return read_pointer(run_file.run_dir).open_tokens().tolist(), tokenizer


def _lines(run_file: RunFile) -> list[str]:
    events = [event for _, event in SpoolReader(run_file.spool_path(0)).read()]
    return [event.message for event in events if isinstance(event, LineLogged)]


def _jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _metaspace_model(folder: Path, *, legacy: bool) -> Path:
    """A model folder with a tokenizer in Llama's manner: a space before the text, and BOS."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["some words and more words\nagain the words"] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 120}))
    return folder


def test_documents_end_with_eos_and_special_tokens_of_a_text_are_text(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", _jsonl(f"one {EOS} two", "", "three"), dataset_format=DatasetFormat.JSONL)
    tokens, tokenizer = _prepare(run_file)
    eos = tokenizer.eos_token_id
    assert tokens.count(eos) == 2
    assert tokens[-1] == eos
    first, second = tokens[: tokens.index(eos)], tokens[tokens.index(eos) + 1 : -1]
    assert [tokenizer.decode(first), tokenizer.decode(second)] == [f"one {EOS} two", "three"]
    assert "2 documents" in _lines(run_file)[-1]
    assert "1 empty documents are skipped" in _lines(run_file)[-1]


def test_pieces_become_the_tokens_of_the_whole_text(tmp_path: Path) -> None:
    text = "Words of many lines, 一段文字, repeated.\nAnd  more\n\nof them.\n" * 3_000
    tokens, tokenizer = _prepare(_run_file(tmp_path / "a", text.encode()))
    assert tokens == [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_puts_a_space_first_does_so_once_a_document(tmp_path: Path, legacy: bool) -> None:
    model = _metaspace_model(tmp_path / "model", legacy=legacy)
    text = "some words and more words\nagain the words\n" * 2_000
    tokens, tokenizer = _prepare(_run_file(tmp_path / "a", text.encode(), base_model_dir=model))
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert tokenizer.backend_tokenizer.decode(tokens[1:-1], skip_special_tokens=False) == text
    with_prefix = tokenizer.backend_tokenizer.encode("words", add_special_tokens=False).ids
    assert with_prefix[0] in tokenizer.backend_tokenizer.encode(" words", add_special_tokens=False).ids


def test_a_second_attempt_and_another_job_find_it_prepared(tmp_path: Path) -> None:
    first = _run_file(tmp_path / "a", b"words and words\n" * 100)
    tokens, tokenizer = _prepare(first)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    second = _run_file(tmp_path / "b", b"words and words\n" * 100, resume_dir=tmp_path / "checkpoint")
    assert _prepare(second)[0] == tokens
    assert _lines(second) == []
    assert read_pointer(first.run_dir) == read_pointer(second.run_dir)
    third = _run_file(tmp_path / "c", b"other words\n" * 100)
    assert _prepare(third)[0] != tokens


def test_documents_may_be_kept_apart(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", _jsonl(*["one two three and more"] * 200), dataset_format=DatasetFormat.JSONL)
    _, tokenizer = _prepare(run_file)
    spec = run_file.spec.model_copy(update={"data": DataOptions(separate_documents=True)})
    batches = open_batches(run_file.run_dir, spec, 32, 1, can_pack=True)
    (batch,) = batches.micro_batches(1, 0)
    assert batch.positions_RT is not None
    assert ((batch.ids_RT == tokenizer.eos_token_id)[:, :-1] == (batch.positions_RT == 0)[:, 1:]).all()
    with pytest.raises(InvalidInput, match=r"data\.separate_documents: the model"):
        open_batches(run_file.run_dir, spec, 32, 1, can_pack=False)


def test_a_text_may_be_validated_on_another(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", b"words and words\n" * 100)
    (tmp_path / "held").write_bytes(b"more words and other words\n" * 50)
    source = NamedSource(name="held", file=tmp_path / "held")
    spec = run_file.spec.model_copy(update={"validation_dataset": "held"})
    run_file = run_file.model_copy(update={"validation_source": source, "spec": spec})
    tokens, tokenizer = _prepare(run_file)
    batches = open_batches(run_file.run_dir, spec, 32, 1, can_pack=False)
    assert len(batches.train) == len(tokens) // 32
    held = tokenizer.backend_tokenizer.encode("more words and other words\n" * 50).ids
    (first, *_) = batches.validation_batches(0)
    assert first.rows.ids_RT[0].tolist() == held[:32]


def _mixed(folder: Path, second: bytes, **fields: Any) -> RunFile:
    """A mixture of a text and a second one."""
    run_file = _run_file(folder, b"words and words\n" * 400)
    (folder / "second").write_bytes(second)
    source = NamedSource(name="second", file=folder / "second", **fields)
    datasets = [WeightedDataset(name=run_file.spec.dataset), WeightedDataset(name="second", weight=3.0)]
    spec = run_file.spec.model_copy(update={"datasets": datasets})
    return run_file.model_copy(update={"mixed_sources": [source], "spec": spec})


def test_a_mixture_shares_one_vocabulary_and_counts_by_its_weights(tmp_path: Path) -> None:
    run_file = _mixed(tmp_path / "a", "和文字和文字\n".encode() * 800)
    _, tokenizer = _prepare(run_file)
    assert any(len(token) > 2 and token[0] in "åæ" for token in tokenizer.get_vocab())  # it has words of the second
    batches = open_batches(run_file.run_dir, run_file.spec, 32, 1, can_pack=False)
    assert isinstance(batches.train, MixedSequences)
    few, many = batches.train.quotas
    assert many == pytest.approx(3 * few, abs=2)
    assert few + many == len(batches.train)
    assert len(batches.validation) >= 2  # of each some


def test_a_mixture_of_different_rows_is_refused(tmp_path: Path) -> None:
    row = b'{"prompt": "a", "completion": "b"}\n'
    with pytest.raises(InvalidDataset, match=r"datasets: .* 'second' holds completion rows, the training has text"):
        _prepare(_mixed(tmp_path / "a", row * 10, format=DatasetFormat.JSONL))
    with pytest.raises(InvalidDataset, match="data set 'second' holds token ids, which mean nothing without"):
        _prepare(_mixed(tmp_path / "b", bytes(640), format=DatasetFormat.UINT16))
    with pytest.raises(InvalidDataset, match="data set 'second' is empty"):
        _prepare(_mixed(tmp_path / "c", b"\n"))
    short = _mixed(tmp_path / "d", b"a few words")
    _prepare(short)
    with pytest.raises(InvalidDataset, match=r"datasets: data set 'second' has \d+ tokens, .* none to train on"):
        open_batches(short.run_dir, short.spec, 32, 1, can_pack=False)


def test_data_sets_may_be_evaluated_by_name(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", b"words and words\n" * 100)
    for name, content in (("wiki", b"other words\n" * 100), ("short", b"one")):
        (tmp_path / name).write_bytes(content)
    sources = {name: NamedSource(name=f"set-{name}", file=tmp_path / name) for name in ("wiki", "short")}
    names = {name: source.name for name, source in sources.items()}
    spec = run_file.spec.model_copy(update={"validation_datasets": names})
    run_file = run_file.model_copy(update={"evaluation_sources": sources, "spec": spec})
    _prepare(run_file)
    with pytest.raises(InvalidDataset, match="validation_datasets/short: data set 'set-short' has no sequence of 32"):
        open_batches(run_file.run_dir, spec, 32, 1, can_pack=False)
    spec = spec.model_copy(update={"validation_datasets": {"wiki": "set-wiki"}})
    batches = open_batches(run_file.run_dir, spec, 32, 1, can_pack=False)
    assert list(batches.evaluations) == ["wiki"]
    assert len(list(batches.validation_batches(0, batches.evaluations["wiki"]))) > 0


def test_two_jobs_at_once_prepare_once(tmp_path: Path) -> None:
    content = b"some words of a text\n" * 20_000
    run_files = [_run_file(tmp_path / name, content) for name in "abc"]
    threads = [threading.Thread(target=_prepare, args=(run_file,)) for run_file in run_files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({read_pointer(run_file.run_dir) for run_file in run_files}) == 1
    assert sum("prepared" in line for run_file in run_files for line in _lines(run_file)) == 1


def test_what_was_cut_on_the_disk_is_made_again(tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", b"words and words\n" * 100)
    tokens, _ = _prepare(run_file)
    file = Path(read_pointer(run_file.run_dir).file)
    file.write_bytes(file.read_bytes()[:-2])
    assert _prepare(run_file)[0] == tokens


@pytest.mark.parametrize("content", [b"", b" \n ", b"\xef\xbb\xbf"])
def test_an_empty_data_set_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidDataset, match="data set 'mine' is empty"):
        _prepare(_run_file(tmp_path / "a", content))
    assert not list((tmp_path / "prepared").glob(".tmp*"))


def test_wrong_rows_at_the_end_are_named_before_anything_trains(tmp_path: Path) -> None:
    content = _jsonl("fine") * 4_710 + b"wrong\n" + _jsonl("fine") * 3
    run_file = _run_file(tmp_path / "a", content, dataset_format=DatasetFormat.JSONL)
    with pytest.raises(InvalidDataset, match="line 4,711"):
        _prepare(run_file)


def test_a_stop_ends_a_long_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MIN_STOP_AFTER_S", 0.0)
    run_file = _run_file(tmp_path / "a", b"words and words\n" * 100)
    run_file.stop_path.touch()
    with SpoolWriter(run_file.spool_path(0)) as spool:
        for rank in (0, 1):
            with prepared_data(run_file, spool, rank) as tokenizer:
                assert tokenizer is None
    assert run_file.outcome_path.read_text() == "stopped"


def test_a_full_disk_is_no_fault_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(OutOfSpace, match="no room to prepare data set 'mine'"):
        _prepare(_run_file(tmp_path / "a", b"words"))


@pytest.mark.parametrize(("dataset_format", "dtype"), [("uint16", "<u2"), ("uint32", "<u4"), ("npy", "<u4")])
def test_token_files_are_mapped_where_they_lie(tmp_path: Path, dataset_format: str, dtype: str) -> None:
    model = _metaspace_model(tmp_path / "model", legacy=False)
    expected = np.arange(119, dtype=dtype)
    np.save(tmp_path / "ids.npy", expected)
    content = (tmp_path / "ids.npy").read_bytes() if dataset_format == "npy" else expected.tobytes()
    fields = {"dataset_format": DatasetFormat(dataset_format), "base_model_dir": model}
    run_file = _run_file(tmp_path / "a", content, **fields)
    assert _prepare(run_file)[0] == expected.tolist()
    assert read_pointer(run_file.run_dir).file == str(run_file.dataset_file)
    with pytest.raises(InvalidDataset, match="is cut"):
        _prepare(_run_file(tmp_path / "cut", content[:-1], **fields))
    other = np.array([1, 2, 500], dtype=dtype)
    np.save(tmp_path / "ids.npy", other)
    content = (tmp_path / "ids.npy").read_bytes() if dataset_format == "npy" else other.tobytes()
    with pytest.raises(InvalidDataset, match="another vocabulary: token 2 is 500; the model knows ids below 120"):
        _prepare(_run_file(tmp_path / "other", content, **fields))
    with pytest.raises(InvalidDataset, match="base_model"):
        _prepare(_run_file(tmp_path / "none", content, dataset_format=DatasetFormat(dataset_format)))


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    path = lock_path(tmp_path / "folder")
    first, second = FolderLock(path), FolderLock(path)
    assert first.try_exclusive()
    assert not second.try_shared()
    path.unlink()
    first.close()
    assert not second.try_shared()
    assert second.try_shared()
    second.close()


def test_progress_shows_what_is_done_and_what_is_left() -> None:
    lines: list[str] = []
    now_s = 0.0
    progress = PreparationProgress("data set 'mine'", 40_000_000, lines.append, lambda: now_s)
    for now_s in (1.0, 2.0, 3.0, 6.0, 7.0):
        progress.update(int(now_s * 5e6))
    assert lines == [
        "preparing data set 'mine': 10.0 of 40.0 MB (25%), 5.0 MB/s, about 6 s left",
        "preparing data set 'mine': 35.0 of 40.0 MB (88%), 5.0 MB/s, about 1 s left",
    ]
