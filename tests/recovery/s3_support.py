"""Object stores on this machine: rclone's for bytes, moto's where conditions and locks matter."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from llm_orchestrator.recovery.s3_client import S3Options

BUCKET = "backups"
KEY = "KEYIDKEYID"
SECRET = "wJalrXUtnFEMIsecretsecret"
_START_S = 30.0


def connect(port: int) -> Any:
    """A plain client, to look at what is there and to spoil it."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def options(port: int, **more: object) -> S3Options:
    """Of the bucket that the servers here have."""
    base = S3Options(
        BUCKET,
        "some/where",
        endpoint_url=f"http://127.0.0.1:{port}",
        region="us-east-1",
        access_key=KEY,
        secret_key=SECRET,
    )
    return replace(base, **more)  # type: ignore[arg-type]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _binary(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[int]:
    """A server that checks signatures, keeps bytes in `folder`, and ignores conditions."""
    data, home = folder / "data", folder / "home"
    (data / BUCKET).mkdir(parents=True)
    home.mkdir()
    port = _free_port()
    arguments = ["serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    arguments += ["--vfs-cache-mode", "writes", "--config", str(home / "none"), str(data)]
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PATH": os.environ["PATH"]}
    with _running([_binary("rclone"), *arguments], port, environment):
        yield port


@contextlib.contextmanager
def moto(*, has_lock: bool = False) -> Iterator[int]:
    """A server in memory that keeps conditions, and with `has_lock` versions and locks."""
    port = _free_port()
    with _running([_binary("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port):
        connect(port).create_bucket(Bucket=BUCKET, ObjectLockEnabledForBucket=has_lock)
        yield port


@contextlib.contextmanager
def _running(
    command: list[str], port: int, environment: dict[str, str] | None = None
) -> Iterator[None]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        end = time.monotonic() + _START_S
        while not _answers(port):
            assert process.poll() is None, f"{command[0]} did not start"
            assert time.monotonic() < end, f"{command[0]} does not answer"
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
