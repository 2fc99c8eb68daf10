"""An S3 server on loopback (moto's), whose requests can be made to fail.

Use the fixture `s3` of conftest: a bucket of its own, the AWS_* variables set, and an
XDG_CACHE_HOME of its own, where copies lie.
"""

import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_BUCKETS = itertools.count()  # moto's buckets outlive its servers
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-0123456789",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@dataclass
class Fault:
    """What is done to the next `times` requests with this method and these words in their path.

    how  a status, such as 503; 'cut': the connection ends in the middle of the body sent or
         asked for; 'hang': no answer while the server lives; 'lost': what is asked for is done,
         and the answer cut off
    """

    how: int | str
    method: str = ""
    path: str = ""
    times: float = float("inf")
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        if self.seen >= self.times or self.method not in ("", method) or self.path not in path:
            return False
        self.seen += 1
        return True


@dataclass
class Server:
    """Answers as long as `serving` is open. requests: (method, path) of all so far."""

    host: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def fail(self, how: int | str, method: str = "", path: str = "", times: float = 1) -> Fault:
        self.faults.append(fault := Fault(how, method, path, times))
        return fault

    def answer(self, app: Callable, environ: dict, start: Callable) -> Iterable[bytes]:
        """`app`'s answer, unless a fault takes this request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        how = next((f.how for f in self.faults if f.takes(method, path)), None)
        if how is None:
            return app(environ, start)
        if how == "hang":
            self.ended.wait()
            _cut(environ)
        if how == "lost":
            list(app(environ, lambda *_: None))
            _cut(environ)
        if how == "cut":
            if method == "PUT":
                environ["wsgi.input"].read(100)
                _cut(environ)
            return _half(b"".join(app(environ, start)), environ)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{how} Injected", [("Content-Type", "application/xml"), ("Content-Length", "0")])
        return []


def _cut(environ: dict) -> NoReturn:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError  # which the server takes for a client that went away


def _half(body: bytes, environ: dict) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _cut(environ)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection per request: a fault hits one

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of loopback."""
    app = DomainDispatcherApplication(create_backend_app)
    server = Server("")
    http = make_server(
        "127.0.0.1",
        0,
        lambda environ, start: server.answer(app, environ, start),
        threaded=True,
        request_handler=_Quiet,
    )
    http.daemon_threads = True
    server.host = f"127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        http.shutdown()
        thread.join()
        http.server_close()


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server."""

    server: Server
    name: str

    def url(self, path: str = "cache", user: str = "") -> str:
        """What to give --cache. user: credentials to carry, 'key:secret@'"""
        return f"s3://{user}{self.name}/{path}?scheme=http&endpoint_override={self.server.host}"

    def client(self) -> Any:
        """boto3's, which the project itself never uses."""
        import boto3

        return boto3.client("s3", endpoint_url=f"http://{self.server.host}")

    def objects(self) -> dict[str, int]:
        """Bytes of every object by its name, but folders' marks (which end in a slash)."""
        found = self.client().list_objects_v2(Bucket=self.name).get("Contents", [])
        return {o["Key"]: o["Size"] for o in found if not o["Key"].endswith("/")}

    def uploads(self) -> list[str]:
        """Names of uploads that were begun and are neither complete nor abandoned."""
        found = self.client().list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [upload["Key"] for upload in found]

    def get(self, name: str) -> bytes:
        return self.client().get_object(Bucket=self.name, Key=name)["Body"].read()

    def put(self, name: str, data: bytes) -> None:
        self.client().put_object(Bucket=self.name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self.client().delete_object(Bucket=self.name, Key=name)


@contextmanager
def bucket(home: Any) -> Iterator[Bucket]:
    """A server with an empty bucket, and the environment that leads to it. home: for copies."""
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {**VARIABLES, "XDG_CACHE_HOME": str(home)}.items():
            patch.setenv(name, value)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        made = Bucket(server, f"team-caches-{next(_BUCKETS)}")
        made.client().create_bucket(Bucket=made.name)
        yield made
