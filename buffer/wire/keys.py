"""CURVE keys: who may speak to whom, and in which role.

Owns the key files of a run, and what they make of a socket. Each role has one key pair, `ROLE.key`
(public) and `ROLE.key_secret`. A server admits exactly the keys of the roles that it serves, and a
client trusts exactly one server's key, so that a peer's role follows from the key that it holds and
never from its words.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from buffer.wire.messages import Role

ROLES: tuple[Role, ...] = ("buffer", "engine", "learner", "monitor")
FOLDER = "keys"  # of a run on one machine, below its directory


# The roles whose public keys a process of a role needs, beside its own pair.
NEEDED: dict[Role, tuple[Role, ...]] = {
    "buffer": ("engine", "learner", "monitor"),
    "engine": ("buffer", "learner"),
    "learner": ("buffer", "engine"),
    "monitor": ("buffer",),
}


def public_file(role: Role) -> str:
    return f"{role}.key"


def secret_file(role: Role) -> str:
    return f"{role}.key_secret"


# Sockets ------------------------------------------------------------------------------------------


class _Authenticator(ThreadAuthenticator):
    """Admits the holders of some roles' keys. A peer's role is the User-Id of its messages."""

    def __init__(self, context: zmq.Context[Any], roles: dict[bytes, Role]) -> None:
        super().__init__(context)  # pyright: ignore[reportUnknownMemberType]
        self._roles = roles
        self.configure_curve_callback(credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._roles

    def curve_user_id(self, client_public_key: bytes) -> str:
        return self._roles[z85.encode(client_public_key)]


def secure_server(
    context: zmq.Context[Any],
    socket: zmq.Socket[bytes],
    keys: str,
    role: Role,
    admitted: Collection[Role],
) -> ThreadAuthenticator | None:
    """Make `socket` the server of `role`, which accepts only clients of the roles `admitted`.

    The authenticator returned must be stopped. Raises `ValueError` if the folder `keys` cannot be
    used.
    """
    if not keys:
        return None
    _, secret = _load(keys, secret_file(role))
    authenticator = _Authenticator(
        context, {_load(keys, public_file(one))[0]: one for one in admitted}
    )
    authenticator.start()
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret or b"")
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    return authenticator


def secure_client(socket: zmq.Socket[bytes], keys: str, role: Role, server: Role) -> None:
    """Make `socket` speak as `role`, to the server of the role `server` alone."""
    if not keys:
        return
    public, secret = _load(keys, secret_file(role))
    trusted, _ = _load(keys, public_file(server))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret or b"")
    socket.setsockopt(zmq.CURVE_SERVERKEY, trusted)


def role_of(frame: zmq.Frame) -> str:
    """The role that a message's sender has proved by its key, "" on a socket without keys."""
    try:
        user_id = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return user_id if isinstance(user_id, str) else ""


def _load(folder: str, name: str) -> tuple[bytes, bytes | None]:
    """(public, secret) of a key file; the secret is None in a public one."""
    file = Path(folder) / name
    _require_private(file, is_secret=name.endswith("_secret"))
    try:
        return zmq.auth.load_certificate(file)  # pyright: ignore[reportUnknownMemberType]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"buffer.keys={folder!r}: no usable {name} there ({error}); copy it from the folder "
            "that `python -m tools.keys FOLDER` has made"
        ) from error


def _require_private(path: Path, is_secret: bool) -> None:
    """Refuse a secret that another user could read, and a folder that another could write to."""
    for place, forbidden, verb in (
        (path.parent, 0o022, "replace"),
        (path, 0o077 if is_secret else 0o022, "read" if is_secret else "replace"),
    ):
        try:
            found = place.stat()
        except OSError as error:
            raise ValueError(
                f"buffer.keys: {place} cannot be used ({error.strerror}); "
                "`python -m tools.keys FOLDER` makes a folder with keys"
            ) from error
        mode = stat.S_IMODE(found.st_mode)
        if mode & forbidden:
            raise ValueError(
                f"buffer.keys: {place} has mode {mode:03o}, so other users of this machine could "
                f"{verb} the keys and join the run; run `chmod go= {place}`"
            )
        if os.geteuid() not in (0, found.st_uid) and found.st_uid:
            raise ValueError(
                f"buffer.keys: {place} belongs to user {found.st_uid}, and this process runs as "
                f"user {os.geteuid()}: its owner could join the run, so use keys of your own"
            )


# Files --------------------------------------------------------------------------------------------


def make_keys(folder: Path) -> None:
    """Write the key pairs of all roles. Raises ValueError, with nothing written, if one exists."""
    names = [name for role in ROLES for name in (public_file(role), secret_file(role))]
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise ValueError(
            f"{folder} already holds {', '.join(existing)}; replacing them would lock out running "
            "processes: name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    umask = os.umask(0o077)  # no secret is readable by others, even while it is being written
    try:
        folder.mkdir(exist_ok=True)
        for role in ROLES:
            zmq.auth.create_certificates(folder, role)  # pyright: ignore[reportUnknownMemberType]
    finally:
        os.umask(umask)


def keys_of_run(run_folder: Path) -> str:
    """The folder of the keys of a run on one machine. Made if the run has none yet."""
    folder = (run_folder / FOLDER).absolute()
    if not all((folder / secret_file(role)).exists() for role in ROLES):
        make_keys(folder)
    return str(folder)


def key_files(role: Role) -> list[str]:
    """The files of a folder of keys that a machine needs for processes of `role`."""
    return [secret_file(role), *(public_file(other) for other in NEEDED[role])]


def check_key_files(folder: str, role: Role) -> None:
    """Raises `ValueError` unless `folder` is "" or has the keys that a process of `role` needs."""
    for name in key_files(role) if folder else []:
        _load(folder, name)


def find_keys(address: str, runs: Path) -> str:
    """The keys of this user's newest run at `address`, or "" if none of `runs` has keys."""
    found = sorted(runs.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            section = yaml.safe_load(path.read_text())["buffer"]
            if section["address"] == address:
                return str(section["keys"] or "")
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue  # being written, or no run of ours
    return ""


def check_keys(folder: str, roles: Collection[Role]) -> None:
    """Raises `ValueError` unless `folder` has usable keys of all these roles."""
    for role in roles:
        _load(folder, secret_file(role))
        _load(folder, public_file(role))
