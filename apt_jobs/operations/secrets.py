"""Secrets of jobs: encrypted in the database by a key that is not in it, decrypted where an attempt starts.

The key is `APT_JOBS_SECRETS_KEY`, or a file of the data directory that the first secret makes. See
docs/adr/0022-secrets-of-jobs.md.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from sqlalchemy.orm import Session

from apt_jobs.db.models import Secret
from apt_jobs.db.secrets import get_secret, num_secrets, store_secret
from apt_jobs.errors import Conflict, InvalidInput, NotFound, Unavailable, WorkerLacks
from apt_jobs.jobs.secrets import MAX_SECRET_CHARS, MIN_SECRET_CHARS
from apt_jobs.settings import Settings

MAX_SECRETS = 1_000
KEY_NAME = "secrets.key"
_MAX_KEY_BYTES = 4_096


def put_secret(session: Session, settings: Settings, name: str, value: str) -> Secret:
    """Encrypt and store a value.

    Raises:
        InvalidInput: it cannot be a secret. The message does not show it.
        Conflict: there are too many.
        Unavailable: the key cannot be read.
    """
    if not MIN_SECRET_CHARS <= len(value) <= MAX_SECRET_CHARS:
        raise InvalidInput(
            f"the value has {len(value):,} characters; expected {MIN_SECRET_CHARS} to {MAX_SECRET_CHARS:,}: a shorter "
            "one cannot be hidden in logs"
        )
    if "\0" in value:
        raise InvalidInput("the value has a NUL character, which cannot be passed to a process")
    try:
        raw = value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput("the value is no text in UTF-8") from exc
    if get_secret(session, name) is None and num_secrets(session) >= MAX_SECRETS:
        raise Conflict(f"there are {MAX_SECRETS:,} secrets already; delete one")
    return store_secret(session, name, _cipher(settings, create=True).encrypt(raw).decode())


def read_secrets(session: Session, settings: Settings, names: Sequence[str]) -> dict[str, str]:
    """Return the values of a job's secrets.

    Raises:
        NotFound: one was deleted since the job was submitted.
        Unavailable, WorkerLacks: this machine does not have the key, or has another one.
    """
    if not names:
        return {}
    cipher, values = _cipher(settings, create=False), {}
    for name in names:
        row = get_secret(session, name)
        if row is None:
            raise NotFound(f"the secret {name} does not exist any more: apt-jobs secrets set {name}")
        try:
            values[name] = cipher.decrypt(row.encrypted.encode()).decode()
        except InvalidToken as exc:
            raise WorkerLacks(
                f"the key of this machine does not decrypt the secret {name}: give it the service's "
                f"APT_JOBS_SECRETS_KEY or {KEY_NAME}, or set the secret again"
            ) from exc
    return values


def encrypt_text(settings: Settings, text: str) -> str:
    """Return what else is kept secret, encrypted by the key of the secrets.

    Raises:
        Unavailable: the key cannot be read.
    """
    return _cipher(settings, create=True).encrypt(text.encode()).decode()


def decrypt_text(settings: Settings, encrypted: str, what: str) -> str:
    """Return a text of `encrypt_text`; `what` names it in the error.

    Raises:
        Unavailable: this machine does not have the key, or has another one.
    """
    try:
        return _cipher(settings, create=False).decrypt(encrypted.encode()).decode()
    except InvalidToken as exc:
        raise Unavailable(
            f"the key of this machine does not decrypt what {what} needs: give it the service's APT_JOBS_SECRETS_KEY "
            f"or {KEY_NAME}"
        ) from exc


def _cipher(settings: Settings, *, create: bool) -> MultiFernet:
    """Return what encrypts by the first key and decrypts by any."""
    if settings.secrets_key is not None:
        where, text = "APT_JOBS_SECRETS_KEY", settings.secrets_key.get_secret_value()
    else:
        file = settings.root / KEY_NAME
        where, text = KEY_NAME, _read_key(file, create=create)
    try:
        return MultiFernet([Fernet(key) for key in text.replace(",", " ").split()])
    except ValueError as exc:  # the message of Fernet says nothing of the key
        raise Unavailable(f"{where} holds no key; make one by: apt-jobs secrets new-key") from exc


def _read_key(file: Path, *, create: bool) -> str:
    try:
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_key(file)
        with file.open("rb") as opened:
            return opened.read(_MAX_KEY_BYTES).decode("ascii", "replace")
    except OSError as exc:
        raise Unavailable(
            f"the key of the secrets, {KEY_NAME} of the data directory, cannot be read: {exc.strerror}"
        ) from exc


def _make_key(file: Path) -> None:
    """Make the file unless it is there; it appears whole, so that processes that start together share one key."""
    if file.exists():
        return
    temporary = file.with_name(f".{KEY_NAME}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as opened:
            opened.write(Fernet.generate_key())
            opened.flush()
            os.fsync(opened.fileno())
        os.link(temporary, file)
    except FileExistsError:
        pass  # another process was first
    finally:
        temporary.unlink(missing_ok=True)
