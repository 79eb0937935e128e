"""Identifiers: a prefix that says what it is, then 20 characters that sort by time of creation."""

import secrets
import time

_ALPHABET = "0123456789abcdefghijklmnopqrstuv"  # base 32, in ASCII order
_TIME_CHARS = 10  # 50 bits of milliseconds since 1970
_RANDOM_CHARS = 10  # 50 random bits


def new_job_id() -> str:
    return _new_id("job")


def new_checkpoint_id() -> str:
    return _new_id("ckpt")


def new_schedule_id() -> str:
    return _new_id("sched")


def new_sweep_id() -> str:
    return _new_id("sweep")


def new_webhook_id() -> str:
    return _new_id("wh")


def new_delivery_id() -> str:
    return _new_id("msg")  # as Standard Webhooks write it


def new_file_id() -> str:
    return _new_id("file", "-")  # as OpenAI writes it


def new_batch_id() -> str:
    return _new_id("batch")


def new_fine_tuning_id() -> str:
    return _new_id("ftjob", "-")


def _new_id(prefix: str, separator: str = "_") -> str:
    moment = _base32(time.time_ns() // 1_000_000, _TIME_CHARS)
    return f"{prefix}{separator}{moment}{_base32(secrets.randbits(5 * _RANDOM_CHARS), _RANDOM_CHARS)}"


def _base32(number: int, num_chars: int) -> str:
    chars = []
    for _ in range(num_chars):
        number, digit = divmod(number, 32)
        chars.append(_ALPHABET[digit])
    return "".join(reversed(chars))
