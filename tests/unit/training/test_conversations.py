"""Fine-tuning data: which rows can be used, what their templates write, and which tokens are answers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.dataset_rows import Source
from apt_jobs.errors import InvalidDataset, InvalidInput
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.run_file import NamedSource, RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.open_batches import open_batches
from apt_jobs.training.prepare import prepared_data
from apt_jobs.training.prepared import Examples, read_pointer
from tests.integration.run_files import run_file_in
from tests.integration.training.tiny_chat_model import TEMPLATE, UNMARKED, conversations, save_chat_model

QUESTION = {"role": "user", "content": "one two?"}
ANSWER = {"role": "assistant", "content": "three four."}
# As Qwen3 has it: earlier answers are written without the reasoning that the last one has.
FORGETTING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    named = {"marked": TEMPLATE, "unmarked": UNMARKED, "forgetting": FORGETTING, "plain": PLAIN, "none": None}
    return {name: save_chat_model(folder / name, template) for name, template in named.items()}


def _run_file(
    folder: Path,
    rows: list[Any] | Path,
    model: Path | None,
    dataset_format: DatasetFormat = DatasetFormat.JSONL,
    column: str = "text",
    objective: str = "next_token",
    **data: Any,
) -> RunFile:
    folder.mkdir(exist_ok=True)
    if isinstance(rows, list):
        (folder / "rows").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    spec = TrainSpec.model_validate(
        {
            "kind": "train",
            "dataset": "mine",
            "base_model": "chat" if model else None,
            "model": {"max_seq_len": data.pop("max_seq_len", 128), "vocab_size": 400},
            "training": {"objective": objective, "batch_size": 1},
            "data": data,
        }
    )
    file = rows if isinstance(rows, Path) else folder / "rows"
    return run_file_in(
        *(folder, spec),
        dataset_file=file,
        dataset_format=dataset_format,
        dataset_column=column,
        base_model_dir=model,
        prepared_dir=folder.parent / "prepared",
    )


def _prepare(run_file: RunFile) -> tuple[Examples, PreTrainedTokenizerFast]:
    with SpoolWriter(run_file.spool_path(0)) as spool, prepared_data(run_file, spool, 0) as tokenizer:
        assert tokenizer is not None
        return read_pointer(run_file.run_dir).open_examples(), tokenizer


def _texts(examples: Examples, tokenizer: PreTrainedTokenizerFast, *, answers: bool = False) -> list[str]:
    """Every example as text: all of it, or its answers with a bar between them."""
    found = []
    for begin, end in itertools.pairwise(examples.bounds):
        tokens = zip(examples.tokens[begin:end].tolist(), examples.answers[begin:end].tolist(), strict=True)
        runs = itertools.groupby(tokens, lambda pair: pair[1])
        decoded = [(answer, str(tokenizer.decode([token for token, _ in run]))) for answer, run in runs]
        parts = [text for answer, text in decoded if answer or not answers]
        found.append(("|" if answers else "").join(parts))
    return found


def test_only_answers_are_trained_on_whether_the_template_marks_them_or_not(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = conversations(9)
    found = [_prepare(_run_file(tmp_path / name, rows, models[name])) for name in ("marked", "unmarked")]
    texts = [_texts(*one, answers=True) for one in found]
    assert texts[0] == texts[1]
    for row, text in zip(rows, texts[0], strict=True):
        contents = [one["content"] + "<|im_end|>" for one in row["messages"] if one["role"] == "assistant"]
        assert text == "|".join(contents)
    examples, tokenizer = found[0]
    whole = _texts(examples, tokenizer)
    assert whole == [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]


def test_a_template_that_writes_earlier_answers_another_way(models: dict[str, Path], tmp_path: Path) -> None:
    row = {"messages": [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "five."}]}
    found = _texts(*_prepare(_run_file(tmp_path / "a", [row], models["forgetting"])), answers=True)
    assert found == ["three four.<|im_end|>|<think>\n\n</think>\n\nfive.<|im_end|>"]


def test_a_template_that_ends_no_answer_has_eos_behind_the_last(models: dict[str, Path], tmp_path: Path) -> None:
    found = _texts(*_prepare(_run_file(tmp_path / "a", [{"messages": [QUESTION, ANSWER]}], models["plain"])))
    assert found == ["user: one two?\nassistant: three four.\n<|endoftext|>"]


def test_a_template_of_the_job_goes_before_the_models_and_is_kept(models: dict[str, Path], tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", [{"messages": [QUESTION, ANSWER]}], models["marked"], chat_template=PLAIN)
    examples, tokenizer = _prepare(run_file)
    assert _texts(examples, tokenizer)[0].startswith("user: one two?")
    assert tokenizer.chat_template == PLAIN


def test_a_model_from_nothing_learns_its_vocabulary_from_conversations(tmp_path: Path) -> None:
    examples, tokenizer = _prepare(_run_file(tmp_path / "a", conversations(9), None, chat_template=PLAIN))
    assert _texts(examples, tokenizer)[1].startswith("user: ")


def test_completions_are_texts_or_messages(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": "one two: ", "completion": "three <|im_end|>"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
    ]
    examples, tokenizer = _prepare(_run_file(tmp_path / "a", rows, models["marked"]))
    answers = _texts(examples, tokenizer, answers=True)
    assert [one.strip() for one in answers] == ["three <|im_end|><|endoftext|>", "three four.<|im_end|>"]
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special not in examples.tokens[: examples.bounds[1]]  # what a text spells out is text


def test_pairs_are_texts_messages_or_whole_conversations(models: dict[str, Path], tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "five."}
    rows = [
        {"prompt": "one ", "chosen": "two", "rejected": "three"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [other]},
        {"prompt": "one two?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, other]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, other]},
    ]
    found = _texts(*_prepare(_run_file(tmp_path / "a", rows, models["marked"], objective="dpo")), answers=True)
    messages = ["three four.<|im_end|>", "five.<|im_end|>"]
    assert [one.strip() for one in found] == ["two<|endoftext|>", "three<|endoftext|>", *messages * 3]


def test_parquet_and_a_column_of_another_name(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [one["messages"] for one in conversations(5)]
    pyarrow.parquet.write_table(pyarrow.table({"talk": rows, "id": list(range(5))}), tmp_path / "file")
    from_parquet = _run_file(tmp_path / "a", tmp_path / "file", models["marked"], DatasetFormat.PARQUET, "talk")
    from_lines = _run_file(tmp_path / "b", [{"talk": row} for row in rows], models["marked"], column="talk")
    assert _texts(*_prepare(from_parquet)) == _texts(*_prepare(from_lines))


def test_an_answer_of_weight_0_is_not_trained_on(models: dict[str, Path], tmp_path: Path) -> None:
    row = {"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "weight": 1}]}
    for name in ("marked", "unmarked"):
        found = _texts(*_prepare(_run_file(tmp_path / name, [row], models[name])), answers=True)
        assert found == ["three four.<|im_end|>"]


def test_tools_are_left_to_the_template(models: dict[str, Path], tmp_path: Path) -> None:
    template = "{{ tools | tojson if tools else '' }}" + UNMARKED
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    row = {"messages": [QUESTION, call, {"role": "tool", "content": "3"}, ANSWER], "tools": '[{"name": "add"}]'}
    examples, tokenizer = _prepare(_run_file(tmp_path / "a", [row], models["none"], chat_template=template))
    assert _texts(examples, tokenizer)[0].startswith('[{"name": "add"}]<|im_start|>user')


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [QUESTION]}, "there is no answer to train on"),
        ({"messages": []}, "field 'messages' has no message"),
        ({"messages": "hello"}, "field 'messages' is a JSON string; expected a list"),
        ({"messages": [QUESTION, "yes"]}, "message 2 of 'messages' is a JSON string"),
        ({"messages": [QUESTION, {"role": "bot", "content": "a"}]}, "message 2 of 'messages' has the role 'bot'"),
        ({"messages": [QUESTION, {"from": "gpt", "value": "a"}]}, "message 2 of 'messages' has no `role`"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "of the role 'assistant', is empty"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "has a JSON null as `content`"),
        ({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image"}]}]}, "a part that is no text"),
        ({"messages": [ANSWER]}, "it begins with the answer"),
        ({"messages": [QUESTION, ANSWER], "tools": "{"}, "field 'tools' is a string that is not JSON"),
        ({"text": "other"}, "no field 'messages'"),
        ('{"messages": [', "not JSON"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(models: dict[str, Path], tmp_path: Path, row: Any, words: str) -> None:
    rows = [*conversations(20), row, *conversations(2), row]
    with pytest.raises(InvalidDataset) as caught:
        _prepare(_run_file(tmp_path / "a", rows, models["marked"]))
    first, second = str(caught.value).splitlines()[1:]
    assert words in first
    assert first.startswith("line 21: ")
    assert second.startswith("line 24: ")
    assert not list((tmp_path / "prepared").glob("*/about.json"))


def test_all_wrong_rows_are_named_up_to_a_hundred(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"at least 100 rows(?s:.*)line 2:(?s:.*)line 101:"):
        _prepare(
            _run_file(tmp_path / "a", [{"messages": [QUESTION, ANSWER]}, *[{"messages": []}] * 300], models["marked"])
        )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "the chat template is no Jinja: line 1"),
        ("{{ raise_exception('roles must alternate') }}", "line 1: the chat template fails: .*roles must alternate"),
        ("{{ messages[7].content }}", "line 1: the chat template fails"),
        ("{{ messages | length }}{{ messages[0].content }}", "line 1: the chat template asks for message 2 in other"),
    ],
)
def test_a_template_that_fails_is_refused(models: dict[str, Path], tmp_path: Path, template: str, words: str) -> None:
    rows = [{"messages": [QUESTION, ANSWER]}]
    with pytest.raises(InvalidInput, match=words):
        _prepare(_run_file(tmp_path / "a", rows, models["marked"], chat_template=template))


def test_conversations_without_a_template_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no chat template .* data\.chat_template"):
        _prepare(_run_file(tmp_path / "a", conversations(3), models["none"]))


def test_rows_longer_than_the_context_are_named_skipped_or_cut(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [*conversations(3)[:1], {"messages": [QUESTION, {"role": "assistant", "content": "one two three " * 30}]}]
    run_file = _run_file(tmp_path / "a", rows, models["marked"], max_seq_len=64)
    with pytest.raises(InvalidDataset, match=r"1 rows that are longer than the 64 tokens(?s:.*)line 2: \d+ tokens"):
        _prepare(run_file)
    for what, count in (("skip", 1), ("truncate", 2)):
        run_file = _run_file(tmp_path / what, rows, models["marked"], max_seq_len=64, longer_than_context=what)
        _prepare(run_file)
        options = run_file.spec.training.model_copy(update={"validation_fraction": 0.0})
        spec = run_file.spec.model_copy(update={"training": options})
        batches = open_batches(run_file.run_dir, spec, 64, 1, can_pack=False)
        assert len(batches.train) == count


def _with_validation(run_file: RunFile, rows: list[Any]) -> RunFile:
    file = run_file.run_dir / "held"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = NamedSource(name="held", file=file, format=DatasetFormat.JSONL)
    spec = run_file.spec.model_copy(update={"validation_dataset": "held"})
    return run_file.model_copy(update={"validation_source": source, "spec": spec})


def test_a_validation_set_of_its_own_leaves_all_rows_to_the_training(models: dict[str, Path], tmp_path: Path) -> None:
    run_file = _with_validation(
        _run_file(tmp_path / "a", conversations(9), models["marked"]), [{"prompt": "one", "completion": " two"}] * 3
    )
    _prepare(run_file)
    batches = open_batches(run_file.run_dir, run_file.spec, 128, 1, can_pack=False)
    assert (len(batches.train), len(batches.validation)) == (9, 3)


def test_a_validation_set_that_holds_something_else_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    run_file = _run_file(tmp_path / "a", conversations(9), models["marked"])
    with pytest.raises(InvalidDataset, match="validation_dataset: data set 'held' holds text rows"):
        _prepare(_with_validation(run_file, [{"text": "one two"}] * 3))


@pytest.mark.parametrize(
    ("row", "objective", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "next_token", "set training.objective to 'dpo'"),
        ({"messages": [QUESTION, ANSWER]}, "dpo", "has no preferences: .* it has: 'messages'"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "dpo", "field 'rejected' is empty"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": "c"}, "dpo", "line 1: "),
    ],
)
def test_what_does_not_fit_the_objective_is_refused(
    models: dict[str, Path], tmp_path: Path, row: Any, objective: str, words: str
) -> None:
    with pytest.raises(InvalidDataset, match=words):
        _prepare(_run_file(tmp_path / "a", [row], models["marked"], objective=objective))


def test_the_objective_of_preferences_needs_its_model() -> None:
    with pytest.raises(ValueError, match=r"training\.objective 'dpo' needs base_model"):
        TrainSpec.model_validate({"kind": "train", "training": {"objective": "dpo"}})


def test_sources_with_rows() -> None:
    assert Source("a", Path("a"), DatasetFormat.JSONL).has_rows
    assert not Source("a", Path("a"), DatasetFormat.TEXT).has_rows
    assert not Source("a", None).has_rows
