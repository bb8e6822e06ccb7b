"""What the start of Ray needs is checked first: its folder, its token, the cluster's address."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
import ray

from study.display import Display
from study.errors import InputError
from study.launch import ray_start
from study.launch.ray_start import (
    LOCAL,
    can_keep_token,
    check_ray_start,
    parse_address,
    ray_address,
    ray_started,
)

VARIABLES = (
    "HOME",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TMPDIR",
    "RAY_USE_TLS",
    "TMPDIR",
)
HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without Ray's variables, and no running Ray."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "")  # the start extends it; restored after the test
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def silent() -> Iterator[int]:
    """Port of a server that accepts connections and answers none."""
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def start_grpc(method: str, token: str | None = None) -> tuple[grpc.Server, int]:
    """Start a server that answers this method alone; return it and its port.

    Args:
        token: if given, calls without it are refused.
    """

    def reply(request: bytes, context: grpc.ServicerContext) -> bytes:
        if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "")
        return b""

    answer = grpc.unary_unary_rpc_method_handler(reply)
    service, name = method.strip("/").split("/")
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: answer}),)
    )
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    return server, port


@pytest.mark.parametrize("value", [None, "", "  ", "local"])
def test_empty_address_starts_ray_on_this_machine(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert ray_address() == LOCAL
    assert ray_start.will_start_ray()
    check_ray_start()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head.example:1", ("head.example", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_address_has_a_host_and_a_port(address: str, expected: tuple[str, int]) -> None:
    assert parse_address(address) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.1:8265", "the address of a dashboard"),
        ("https://dashboard.example", "the address of a dashboard"),
        ("ray://10.0.0.1:10001", "on a machine of the cluster .* got RAY_ADDRESS=ray://"),
        ("redis://10.0.0.1:6379", "must be host:port"),
        ("10.0.0.1", "must be host:port"),
        ("10.0.0.1:", "must be host:port"),
        (":6379", "must be host:port"),
        ("10.0.0.1:head", "must be host:port"),
        ("10.0.0.1:65536", "must be host:port"),
        ("10.0.0.1:0", "must be host:port"),
        ("::1:6379", "must be host:port"),
        ("no-such-host.invalid:6379", "whose host is unknown"),
        (f"{'a' * 64}.example:6379", "whose host is unknown"),
    ],
)
def test_other_addresses_are_refused(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=message) as caught:
        check_ray_start()
    assert f"got RAY_ADDRESS={address}" in str(caught.value)


def test_cluster_that_is_gone_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"{HOST}:{port}")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"nothing answers \(connection refused\)"):
        check_ray_start()
    assert time.monotonic() - started < 2


def test_server_that_is_no_ray_head_is_refused(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_start, "CONNECT_S", 0.3)
    other, port = start_grpc("/ray.rpc.RayletDriver/Init")  # port of Ray's client
    try:
        for each in (silent, port):
            monkeypatch.setenv("RAY_ADDRESS", f"{HOST}:{each}")
            with pytest.raises(InputError, match="no Ray head answers"):
                check_ray_start()
    finally:
        other.stop(None)


def test_ray_head_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    head, port = start_grpc(ray_start.ALIVE)
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"{HOST}:{port}")
        check_ray_start()
    finally:
        head.stop(None)


def test_cluster_that_wants_a_token_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("HOME", str(tmp_path))
    head, port = start_grpc(ray_start.ALIVE, token="secret")
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"{HOST}:{port}")
        with pytest.raises(InputError, match="wants its token, got no token"):
            check_ray_start()
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(InputError, match=r"RAY_AUTH_MODE=token needs .*, got none"):
            check_ray_start()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
        with pytest.raises(InputError, match="wants its token, got another token"):
            check_ray_start()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "")
        file.parent.mkdir()
        file.write_text("secret\n")
        check_ray_start()
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file.rename(tmp_path / "token")))
        check_ray_start()
    finally:
        head.stop(None)


def test_cluster_that_can_not_be_joined_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**options: object) -> None:
        try:
            raise RuntimeError("Version mismatch:\n    Ray: 2.60.0\n    Python: 3.12.1")
        except RuntimeError as cause:
            raise ConnectionError("Failed to connect") from cause

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(
            InputError,
            match=r"RAY_ADDRESS=10\.0.* its nodes: Version mismatch: Ray: 2.60.0 Python: 3.12.1$",
        ),
        ray_started(Display("none")),
    ):
        pass


def test_auto_without_a_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray._private.services, "find_gcs_addresses", set)
    with pytest.raises(InputError, match=r"RAY_ADDRESS=auto .* but there is none"):
        check_ray_start()


def test_auto_with_the_address_of_a_dead_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)  # as ray start leaves it
    monkeypatch.setattr(ray._private.services, "find_gcs_addresses", set)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(InputError, match=f"RAY_ADDRESS=auto, which is {address}, where nothing"):
        check_ray_start()
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_ray_start()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_temporary_folder_is_as_long_as_ray_accepts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / ("a" * 80)))
    with pytest.raises(InputError, match=rf"at most \d+ bytes.*{name}=.*set RAY_TMPDIR") as caught:
        check_ray_start()
    longest = int(str(caught.value).partition("at most ")[2].split()[0])
    assert not list(tmp_path.iterdir())
    folder = "/tmp/" + "a" * (longest - len("/tmp/"))
    session = f"session_2026-11-30_10-00-00_123456_{os.getpid()}"
    assert len(f"{folder}/ray/{session}/sockets/plasma_store") == 107  # Ray's own limit
    monkeypatch.setenv(name, folder + "a")
    with pytest.raises(InputError, match=f"at most {longest} bytes"):
        check_ray_start()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("jobs", "absolute path"),
        ("/tmp/b\u00fcro", "ASCII"),
        ("/dev/null", "can be written to"),
        ("/proc/1/x", "written to"),
    ],
)
def test_unusable_temporary_folder_is_refused(
    folder: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    with pytest.raises(InputError, match=f"{message}.*got TMPDIR={folder}"):
        check_ray_start()


def test_full_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"got the default, /tmp \(No space left on device\)"):
        check_ray_start()


def test_nearly_full_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=49_000_000))
    with pytest.raises(InputError, match=r"needs 50 MB, got the default, /tmp, which has 49 MB"):
        check_ray_start()


def test_missing_temporary_folder_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(f"/tmp/test-{os.getpid()}")
    monkeypatch.setenv("TMPDIR", str(folder))
    check_ray_start()
    folder.rmdir()  # nothing is left in it


def test_token_is_kept_in_a_home_that_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not can_keep_token()  # without HOME
    for home in ("/dev/null", "/proc/1"):
        monkeypatch.setenv("HOME", home)
        assert not can_keep_token()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert can_keep_token()
    assert not list((tmp_path / ".ray").iterdir())
    (tmp_path / ".ray" / "auth_token").write_text("secret\n")
    assert can_keep_token()


def test_ray_gets_a_token_where_none_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # restored after the test
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", "")
    monkeypatch.setattr(ray, "init", lambda **options: tokens.append(os.environ["RAY_AUTH_TOKEN"]))
    for _ in range(2):
        with ray_started(Display("none")):
            assert "TMPDIR" not in os.environ
        os.environ["RAY_AUTH_TOKEN"] = ""
    assert len(tokens) == len(set(tokens)) == 2
    assert min(map(len, tokens)) >= 32


def test_user_without_a_home_gets_one_before_ray_is_imported() -> None:
    code = """
import os, pwd
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown  # a user of a container who is in no list
import study
print(os.path.expanduser("~"))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "/\n"


def test_named_token_file_must_hold_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for text in (None, "\n"):
        if text is not None:
            token.write_text(text)
        with pytest.raises(InputError, match=f"RAY_AUTH_TOKEN_PATH .* got {token}"):
            check_ray_start()
    token.write_text("secret")
    check_ray_start()


def test_ray_that_fails_to_start_ends_in_one_sentence_with_the_place_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("The node has no memory.\nTraceback:\n  File x")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    log = r"\(its logs are in /tmp/short/ray/session_latest/logs\)"
    with (
        pytest.raises(InputError, match=rf"could not be started: The node has no memory\. {log}"),
        ray_started(Display("none")),
    ):
        pass


def test_start_of_ray_keeps_the_handler_of_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_handler(**options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", replace_handler)
    handler = signal.getsignal(signal.SIGTERM)
    with ray_started(Display("none")):
        assert signal.getsignal(signal.SIGTERM) is handler
