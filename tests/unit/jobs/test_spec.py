"""The job spec: what is accepted, and which faults are named, all at once."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from apt_jobs.jobs.mixture import shares_of
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.monitor_options import MonitorOptions
from apt_jobs.jobs.sampling_options import SamplingOptions
from apt_jobs.jobs.spec import AnyJobSpec, GenerateSpec, TrainSpec, parse_spec, queue_of
from apt_jobs.jobs.training_options import TrainingOptions

ADAPTER: TypeAdapter[TrainSpec | GenerateSpec] = TypeAdapter(AnyJobSpec)


def faults_of(document: dict[str, Any]) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python(document)
    return {".".join(map(str, fault["loc"])) for fault in caught.value.errors()}


def test_a_training_job_needs_nothing_but_its_kind() -> None:
    spec = ADAPTER.validate_json('{"kind": "train"}')
    assert isinstance(spec, TrainSpec)
    assert queue_of(spec) == "train"


def test_the_queue_can_be_named() -> None:
    assert queue_of(ADAPTER.validate_python({"kind": "generate", "texts": ["a"], "queue": "slow"})) == "slow"


def test_a_spec_survives_a_round_trip_through_json() -> None:
    spec = ADAPTER.validate_json('{"kind": "train", "labels": {"team": "日本"}, "training": {"learning_rate": 1}}')
    assert ADAPTER.validate_json(spec.model_dump_json()) == spec


def test_all_faults_are_reported_at_once() -> None:
    document = {
        "kind": "train",
        "surprise": 1,
        "num_ranks": "2",
        "model": {"d_model": 7},
        "training": {"batch_size": 0, "learning_rate": float("nan")},
    }
    assert faults_of(document) == {
        "train.surprise",
        "train.num_ranks",
        "train.model.d_model",
        "train.training.batch_size",
        "train.training.learning_rate",
    }


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kind": "destroy"},
        {"kind": "train", "entry_point": "os:system"},
        {"kind": "train", "dataset": "../../etc/passwd"},
        {"kind": "train", "arguments": {"LD_PRELOAD=x": "a"}},
        {"kind": "train", "arguments": {"a": ["list"]}},
        {"kind": "train", "labels": {str(number): "x" for number in range(33)}},
        {"kind": "train", "monitor": {"vanishing_below": 2000.0}},
        {"kind": "train", "num_ranks": 513},
        {"kind": "train", "training": {"ema_decay": 1.0}},
        {"kind": "train", "training": {"ema_decay": 0.0}},
        {"kind": "train", "training": {"ema_decay": 0.9, "precision": "bf16-true"}},
        {"kind": "train", "model": {"rope_theta": 0.5}},
        {"kind": "train", "training": {"sample_prompts": ["a"] * 9}},
        {"kind": "train", "training": {"sample_prompts": [""]}},
        {"kind": "train", "training": {"sample_prompts": ["a" * 2_001]}},
        {"kind": "train", "training": {"sample_tokens": 257}},
        {"kind": "train", "training": {"sample_temperature": -1.0}},
        {"kind": "train", "num_ranks": 3, "num_nodes": 2},
        {"kind": "generate", "texts": []},
        {"kind": "generate", "texts": ["x" * 32_769]},
        {"kind": "generate", "texts": ["x"] * 65},
        {"kind": "generate", "texts": ["a"], "stop": [""]},
        {"kind": "generate", "texts": ["a"], "temperature": -0.1},
    ],
)
def test_a_bad_document_is_refused(document: dict[str, Any]) -> None:
    assert faults_of(document)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"d_model": 100, "num_attention_heads": 3}, "even multiple"),
        ({"d_model": 12, "num_attention_heads": 4}, "even multiple"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must divide"),
        ({"d_model": 16_384, "num_layers": 200, "d_ff": 131_072, "num_attention_heads": 128}, "parameters; at most"),
    ],
)
def test_an_impossible_model_is_refused_with_its_numbers(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        APTConfig(**fields)


def test_thresholds_must_be_ordered() -> None:
    assert MonitorOptions().exploding_above == 1e3
    with pytest.raises(ValidationError, match="must be less than"):
        MonitorOptions(vanishing_below=1.0, exploding_above=1.0)


def test_parameters_are_counted_by_hand() -> None:
    config = APTConfig(d_model=8, num_layers=1, num_attention_heads=2, vocab_size=300, d_ff=16, tie_embeddings=False)
    by_hand = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 300 * 8 + 8
    assert config.num_parameters == by_hand


def test_the_mlp_is_eight_thirds_wide_in_steps_of_eight() -> None:
    assert APTConfig(d_model=128).feed_forward_size == 344
    assert APTConfig(d_ff=100).feed_forward_size == 100


def test_a_nul_is_refused_where_the_database_holds_plain_text() -> None:
    assert faults_of({"kind": "train", "name": "a\0b", "labels": {"team": "\0"}}) == {"train.name", "train.labels.team"}
    spec = TypeAdapter(GenerateSpec).validate_python({"kind": "generate", "texts": ["a\0b"], "name": "a b"})
    assert spec.texts == ["a\0b"]


def test_embeddings_with_options_of_texts_are_refused_by_name() -> None:
    embeds = {"kind": "generate", "texts": [""], "embed": ["a"]}
    stored = TypeAdapter(GenerateSpec).validate_python(embeds).model_dump(mode="json")
    assert TypeAdapter(GenerateSpec).validate_python(stored).embed == ["a"]
    options = {
        "max_length": 7,
        "max_tokens": 7,
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {3: 1.0},
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "seed": 3,
        "stop": ["x"],
        "stop_token_ids": [3],
        "min_tokens": 1,
        "n": 2,
        "logprobs": 0,
        "json_schema": {},
        "regex": "a",
        "truncate": True,
        "stream": True,
    }
    assert set(options) == set(SamplingOptions.model_fields)
    for name, value in options.items():
        with pytest.raises(ValidationError, match=rf"embed continues no text: leave out {name},"):
            TypeAdapter(GenerateSpec).validate_python({**embeds, name: value})
    with pytest.raises(ValidationError, match="leave out temperature, n, which"):
        TypeAdapter(GenerateSpec).validate_python({**embeds, "temperature": 1.0, "n": 2})


@pytest.mark.parametrize("option", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_what_compares_validations_needs_them(option: dict[str, Any]) -> None:
    never = {"kind": "train", "training": {**option, "validation_fraction": 0.0}}
    with pytest.raises(ValidationError, match=f"{next(iter(option))} compares.*validation_fraction"):
        TrainSpec.model_validate(never)
    TrainSpec.model_validate({**never, "validation_dataset": "held-out"})
    TrainSpec.model_validate({"kind": "train", "training": option})


def test_a_job_keeps_the_learning_rate_that_suits_it() -> None:
    def rate_of(**fields: Any) -> float | None:
        return TrainSpec.model_validate({"kind": "train", **fields}).training.learning_rate

    assert rate_of() == 1e-3
    assert rate_of(base_model="m") == 2e-5
    assert rate_of(base_model="m", training={"lora": {}}) == 2e-4
    assert rate_of(training={"optimizer": "lion"}) == 1e-4
    assert rate_of(base_model="m", training={"learning_rate": 0.5}) == 0.5
    assert TrainSpec(kind="train", training=TrainingOptions()).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datasets": []}, "at least 1 item"),
        ({"datasets": [{"name": "a", "weight": 0.0}]}, "greater than 0"),
        ({"datasets": [{"name": "a", "weight": -1.0}]}, "greater than 0"),
        ({"datasets": [{"name": "a", "weight": float("nan")}]}, "finite number"),
        ({"datasets": [{"name": "a", "weight": float("inf")}]}, "finite number"),
        ({"datasets": [{"name": "a", "weight": "2"}]}, "valid number"),
        ({"datasets": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}, "names 'a' more than once"),
        ({"datasets": [{"name": "../a"}]}, "pattern"),
        ({"datasets": ["a"]}, "dictionary or"),
        ({"datasets": "a"}, "valid list"),
        ({"datasets": [{"name": "a"}], "dataset": "b"}, "dataset='b' and datasets are given"),
        ({"datasets": [{"name": "a"}], "entry_point": "mine"}, "built-in trainer"),
        ({"datasets": [{"name": f"a{number}"} for number in range(65)]}, "at most 64"),
        ({"validation_datasets": {"a/b": "a"}}, "pattern"),
        ({"validation_datasets": {str(number): "a" for number in range(17)}}, "at most 16"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSpec.model_validate({"kind": "train", **fields})


def test_a_mixture_survives_storage_and_names_all_its_data_sets() -> None:
    mixed = [{"name": "a", "weight": 3.0}, {"name": "b"}]
    spec = TrainSpec.model_validate(
        {"kind": "train", "datasets": mixed, "validation_dataset": "c", "validation_datasets": {"wiki": "d"}}
    )
    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert spec.dataset == "a"
    assert shares_of(spec.mixture) == [0.75, 0.25]
    assert spec.dataset_fields == {
        "datasets/0/name": "a",
        "datasets/1/name": "b",
        "validation_dataset": "c",
        "validation_datasets/wiki": "d",
    }
    assert TrainSpec(kind="train", dataset="a").dataset_fields == {"dataset": "a"}
