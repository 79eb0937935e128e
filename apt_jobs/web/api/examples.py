"""Examples of the OpenAPI document, by the name of their schema. A test checks each of them against its model."""

from typing import Any

_JOB_ID, _CHECKPOINT_ID = "job_01kb8r3mzt2x4v6w8y0a", "ckpt_01kb8r9qdc5e7g9j1m3p"
_AT, _LATER = "2026-11-25T03:30:00.000Z", "2026-11-25T03:42:10.250Z"

_TRAIN: dict[str, Any] = {
    "kind": "train",
    "name": "nightly",
    "dataset": "builtin",
    "num_ranks": 2,
    "labels": {"team": "a"},
    "model": {"d_model": 128, "num_layers": 4},
    "training": {"max_steps": 200, "learning_rate": 0.001},
}
_JOB: dict[str, Any] = {
    "object": "job",
    "id": _JOB_ID,
    "kind": "train",
    "name": "nightly",
    "queue": "train",
    "priority": 0,
    "labels": {"team": "a"},
    "state": "running",
    "reason": None,
    "attempt": 1,
    "max_attempts": 3,
    "created_at": _AT,
    "claimed_at": _LATER,
    "finished_at": None,
    "cancel_requested_at": None,
    "last_seq": 412,
    "step": 120,
    "num_steps": 200,
    "progress": {"step": 120, "epoch": 0, "train_loss": 2.41, "tokens_per_s": 21400.0, "eta_s": 38.5},
    "result": None,
    "error": None,
    "spec": _TRAIN,
    "schedule_id": None,
    "attempts": None,
    "best_checkpoint": None,
    "queue_position": None,
    "waiting_for": None,
}
_CHECKPOINT: dict[str, Any] = {
    "id": _CHECKPOINT_ID,
    "job_id": _JOB_ID,
    "filename": f"{_JOB_ID}/step-00000100",
    "epoch": 0,
    "global_step": 100,
    "val_loss": 2.52,
    "train_loss": 2.48,
    "file_size_mb": 12.4,
    "size_bytes": 12_400_000,
    "is_best": True,
    "created_at": _LATER,
}
_USAGE = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29, "cached_tokens": 0}

EXAMPLES: dict[str, Any] = {
    "AnyJobSpec": _TRAIN,
    "TrainSpec": _TRAIN,
    "GenerateSpec": {"kind": "generate", "texts": ["Once upon a time"], "max_length": 20, "temperature": 0.8},
    "JobAnswer": _JOB,
    "JobList": {"object": "list", "data": [_JOB], "has_more": False},
    "CheckpointAnswer": _CHECKPOINT,
    "CheckpointList": {"object": "list", "data": [_CHECKPOINT], "has_more": False},
    "LoadRequest": {"checkpoint_id": _CHECKPOINT_ID},
    "GenerateRequest": {"text": "Once upon a time", "max_length": 20, "temperature": 0.8, "seed": 1},
    "BatchGenerateRequest": {"texts": ["Once upon a time", "In the beginning"], "max_length": 20},
    "GenerateAnswer": {
        "generated_text": "Once upon a time there was a queue.",
        "input_text": "Once upon a time",
        "generation_time_ms": 84.2,
        "finish_reason": "length",
        "truncated": False,
        "choices": [{"text": "Once upon a time there was a queue.", "finish_reason": "length", "logprobs": None}],
        "usage": _USAGE,
        "model": _CHECKPOINT_ID,
        "job_id": _JOB_ID,
    },
    "CompletionRequest": {"model": "default", "prompt": "Once upon a time", "max_tokens": 20},
    "ChatRequest": {"model": "default", "messages": [{"role": "user", "content": "What is a queue?"}]},
    "BatchCreateRequest": {
        "input_file_id": "file-01kb8r3mzt2x4v6w8y0a",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"night": "2026-11-25"},
    },
    "AliasBody": {"model": f"{_JOB_ID}@latest"},
    "EmbeddingRequest": {"model": "default", "input": ["What is a queue?", "What is a worker?"]},
    "FineTuningRequest": {
        "model": _CHECKPOINT_ID,
        "training_file": "file-01kb8r3mzt2x4v6w8y0a",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "suffix": "support",
    },
    "UploadRequest": {"name": "mine", "format": "jsonl", "size_bytes": 1_048_576, "sha256": "0123456789abcdef" * 4},
    "ScheduleBody": {"name": "nightly", "cron": "30 3 * * *", "time_zone": "Europe/Berlin", "job": _TRAIN},
    "DueBody": {"cron": "30 3 * * *", "time_zone": "Europe/Berlin"},
    "QueueBody": {"max_running": 4, "paused": False},
    "QueueAnswer": {
        "name": "train",
        "queued": 12,
        "running": 4,
        "num_workers": 4,
        "max_running": 4,
        "paused": False,
    },
    "Problem": {
        "type": "urn:apt-jobs:invalid-request",
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "1 fault in the request; see `errors`",
        "errors": [
            {
                "pointer": "#/training/batch_size",
                "seen": "0",
                "detail": "Input should be greater than or equal to 1",
            }
        ],
        "incident": None,
    },
}
