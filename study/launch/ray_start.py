"""Start Ray on this machine or join a cluster, and check first whether that can succeed.

The checks need milliseconds and run before any data are read. Ray itself reports most of these
faults as a long traceback, or after minutes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import ray
import ray._private.services

import models
import search_spaces
import study
from study.display import Display
from study.errors import InputError
from study.interrupts import kill_descendants

LOCAL = "local"
"""Address of a new Ray on this machine."""
AUTO = "auto"
"""Address of a cluster that runs on this machine, whatever its port."""
CONNECT_S = 15.0
"""Seconds that a cluster has to accept a connection, and as many to answer."""
MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket on Linux, in bytes."""
MIN_FREE = 50_000_000
"""Bytes that Ray's logs and sockets need."""
_WANTED = "RAY_ADDRESS must be host:port of a cluster's head, such as 10.0.0.1:6379, or auto"
_CHANGE = "change it, or unset it to run on this machine alone"
_TOKEN = (
    "the cluster's token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
)
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A call that every Ray head answers."""


def ray_address() -> str:
    """Return the address of the cluster to join, RAY_ADDRESS, or LOCAL."""
    return os.environ.get("RAY_ADDRESS", "").strip() or LOCAL


def will_start_ray() -> bool:
    """Return whether the study starts a Ray of its own."""
    return not ray.is_initialized() and ray_address() == LOCAL


def check_ray_start() -> None:
    """Check what the start of Ray needs, or whether the cluster to join answers.

    Raises:
        InputError: Ray can't be started here, or the cluster can't be joined.
    """
    if ray.is_initialized():
        return
    address = ray_address()
    if address == LOCAL:
        check_ray_folder()
        _check_token_file()
    else:
        check_cluster(address)


@contextlib.contextmanager
def ray_started(display: Display) -> Iterator[None]:
    """Start Ray, or join the cluster at RAY_ADDRESS; a Ray that already runs is used and kept.

    Raises:
        InputError: Ray could not be started or joined.
    """
    if ray.is_initialized():
        yield
        return
    address = ray_address()
    display.notify("starting Ray" if address == LOCAL else f"joining the cluster at {address}")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Workers must import these very packages, not an installed copy of another version. They
    # search the driver's working folder first, hence chdir.
    home = Path(study.__file__).parent.parent
    try:
        with contextlib.chdir(home), _kept_signal_handlers():
            if address == LOCAL:
                _start_ray(home)
            else:
                _join_cluster(address)
    except Exception as error:
        text = str(error.__cause__ or error).strip() or type(error).__name__
        reason = textwrap.shorten(text.partition("Traceback")[0] or text, 300, placeholder=" ...")
        raise InputError(_failure(address, reason)) from error
    except KeyboardInterrupt:
        kill_descendants(os.getpid())  # of a Ray that is started halfway
        raise
    try:
        yield
    finally:
        ray.shutdown()


def _failure(address: str, reason: str) -> str:
    if address != LOCAL:
        return (
            f"the Ray cluster at RAY_ADDRESS={address} could not be joined from this machine, "
            f"which must be one of its nodes: {reason}"
        )
    logs = ray_folder_of_machine() / "session_latest" / "logs"
    return f"Ray could not be started: {reason} (its logs are in {logs})"


def _start_ray(home: Path) -> None:
    paths = (str(home), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if not os.environ.get(name, "unset"):
            del os.environ[name]
    if not can_keep_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False, configure_logging=False)


def _join_cluster(address: str) -> None:
    ray.init(
        address=address,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"py_modules": [models, search_spaces, study]},
    )


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces by one that prints its C++ stack."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def ray_folder_of_machine() -> Path:
    """Return the folder in which Ray keeps its sockets and logs."""
    return Path(_temporary_folder()[1]) / "ray"


def _temporary_folder() -> tuple[str, str]:
    """Return the name of the variable that sets Ray's temporary folder, and the folder."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := os.environ.get(name):
            return name, folder
    return "RAY_TMPDIR", "/tmp"


def check_ray_folder() -> None:
    """Check that Ray's sockets and logs can be created in its temporary folder.

    Raises:
        InputError: the folder is relative, its path is too long, or it can't be written to.
    """
    name, folder = _temporary_folder()
    got = f"got {name}={folder}" if os.environ.get(name) else f"got the default, {folder}"
    now = f"{datetime.datetime.now():session_%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    path = os.path.join(folder, "ray", now, "sockets", "plasma_store")
    if not os.path.isabs(folder) or not folder.isascii():
        raise InputError(
            f"Ray's temporary folder must be an absolute path without other letters than ASCII, "
            f"{got}; set RAY_TMPDIR to another folder"
        )
    if (excess := len(os.fsencode(path)) - MAX_SOCKET_PATH) > 0:
        longest = len(os.fsencode(folder)) - excess
        raise InputError(
            f"the path of Ray's temporary folder must have at most {longest} bytes, because its "
            f"sockets are created below it, {got}; set RAY_TMPDIR to a shorter folder"
        )
    try:
        parent = Path(folder)
        parent.mkdir(parents=True, exist_ok=True)
        ray_folder = parent / "ray"
        with tempfile.TemporaryDirectory(dir=ray_folder if ray_folder.is_dir() else parent) as new:
            Path(new, "file").write_bytes(bytes(4096))
            with socket.socket(socket.AF_UNIX) as unix:
                unix.bind(os.path.join(new, "s"))
            free = shutil.disk_usage(new).free
    except OSError as error:
        raise InputError(
            f"Ray needs a temporary folder that files and sockets can be written to, {got} "
            f"({error.strerror or error}); set RAY_TMPDIR to another folder"
        ) from error
    if free < MIN_FREE:
        raise InputError(
            f"Ray's temporary folder needs {MIN_FREE / 1e6:.0f} MB, {got}, which has "
            f"{free / 1e6:.0f} MB left; free some, or set RAY_TMPDIR to another folder"
        )


def can_keep_token() -> bool:
    """Return whether Ray finds or can create the token of its cluster, in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    if not (home := os.environ.get("HOME")):
        return False
    token = Path(home) / ".ray" / "auth_token"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        if token.exists():
            return bool(token.read_text().strip())
        with tempfile.TemporaryFile(dir=token.parent) as file:
            file.write(b"token")
    except OSError:
        return False
    return True


def _check_token_file() -> None:
    """Raise if RAY_AUTH_TOKEN_PATH names no token."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        has_token = bool(Path(path).read_text().strip())
    except OSError:
        has_token = False
    if not has_token:
        raise InputError(
            f"RAY_AUTH_TOKEN_PATH must name a file with a token, got {path}; change or unset it"
        )


def check_cluster(address: str) -> None:
    """Check that the head of a Ray cluster answers at an address.

    Raises:
        InputError: the address has another form, or no cluster answers there in time.
    """
    got = f"got RAY_ADDRESS={address}"
    if address == AUTO:
        address = _address_of_auto()
        got = f"{got}, which is {address}"
    host, port = parse_address(address)
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"{_WANTED}, {got}, whose host is unknown; {_CHANGE}") from error
    except OSError as error:
        reason = error.strerror or "no answer in time"
        raise InputError(
            f"a Ray cluster must run at RAY_ADDRESS, {got}, where nothing answers "
            f"({reason.lower()}); start the cluster, or {_CHANGE}"
        ) from error
    token = cluster_token(ray_address())
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    answer = head_answer(host, port, token)
    if answer == grpc.StatusCode.UNAUTHENTICATED:
        sent = "another token" if token else "no token, or not RAY_AUTH_MODE=token"
        raise InputError(
            f"the Ray cluster at RAY_ADDRESS={address} wants its token, got {sent}; set "
            f"RAY_AUTH_MODE=token and {_TOKEN}"
        )
    if answer != grpc.StatusCode.OK:
        raise InputError(f"{_WANTED}, {got}, where no Ray head answers; {_CHANGE}")


def _address_of_auto() -> str:
    try:
        return str(ray._private.services.get_ray_address_from_environment(AUTO, None))
    except ConnectionError as error:
        raise InputError(
            "RAY_ADDRESS=auto joins a Ray cluster that runs on this machine, but there is none; "
            "start it (ray start --head), or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def parse_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` of RAY_ADDRESS; an IPv6 host stands in brackets.

    Raises:
        InputError: the address has another form.
    """
    scheme, separator, _ = address.rpartition("://")
    if scheme == "ray":
        raise InputError(
            "a study can't be run through Ray's client: run the command on a machine of the "
            "cluster (ray submit, or ray job submit) with RAY_ADDRESS=host:port of its head, got "
            f"RAY_ADDRESS={address}"
        )
    note = ", the address of a dashboard" if scheme in ("http", "https") else ""
    host, colon, port = address.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    is_valid = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if separator or not colon or not host or not is_valid or (":" in host and not is_ipv6):
        raise InputError(f"{_WANTED}, got RAY_ADDRESS={address}{note}; {_CHANGE}")
    return host.strip("[]"), int(port)


def head_answer(host: str, port: int, token: str | None) -> grpc.StatusCode:
    """Return how the server at this port answers a call to the head of a Ray cluster.

    Args:
        token: token of the cluster, if one is to be sent.
    """
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=CONNECT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def cluster_token(address: str) -> str | None:
    """Return the token that Ray sends to the cluster at RAY_ADDRESS, or None.

    Raises:
        InputError: RAY_AUTH_MODE is token, and there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if not (mode or "").lower() == "token" and not (mode is None and address == AUTO):
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    _check_token_file()
    home = os.path.expanduser("~/.ray/auth_token")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home)
    if file.is_file() and (token := file.read_text().strip()):
        return token
    if mode is None:
        return None
    raise InputError(f"RAY_AUTH_MODE=token needs {_TOKEN}, got none")
