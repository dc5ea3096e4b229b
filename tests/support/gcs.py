"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and TensorStore use, in
memory.

Requests can be slow (`latency`, seconds), fail (`fail_every`: each n-th answers 503, each 2n-th is
cut off instead), be refused for good (`broken`: a part of a name) or not be answered (`stall`:
likewise), or not be allowed to write (`forbidden`: likewise); what was asked is counted.
"""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class _Objects(dict):
    """{name: bytes}, and how often each was written, for who asks that none has come between."""

    def __init__(self):
        super().__init__()
        self.written = 0
        self.generations: dict[str, int] = {}

    def __setitem__(self, name, data):
        self.written += 1
        self.generations[name] = self.written
        super().__setitem__(name, data)


class Server(ThreadingHTTPServer):
    """`objects`: {name: bytes}. A context: serves within it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, bytes] = _Objects()
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.latency, self.fail_every, self.broken, self.stall = 0.0, 0, "", ""
        self.forbidden = ""
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.reset()

    def reset(self):
        """Forgets what was asked: `media` are names that were downloaded, with the bytes."""
        self.requests, self.failed, self.media = 0, 0, []

    @property
    def sent(self) -> int:
        """Bytes of objects that were downloaded."""
        return sum(size for _, size in self.media)

    def add(self, directory: Path, prefix: str) -> str:
        """Copies a local directory; returns its address."""
        for path in filter(Path.is_file, directory.rglob("*")):
            self.objects[f"{prefix}/{path.relative_to(directory)}"] = path.read_bytes()
        return f"gs://{BUCKET}/{prefix}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle_any(self):
        store = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        with store.lock:
            store.requests += 1
            number = store.requests
        if store.latency:
            time.sleep(store.latency)
        if store.stall and store.stall in unquote(url.path) and asked.get("alt") == "media":
            store.ended.wait(60)
        if store.broken and store.broken in unquote(url.path) and asked.get("alt") == "media":
            return self.answer(503, b"")
        if store.fail_every and number % store.fail_every == 0:
            store.failed += 1
            if number % (2 * store.fail_every) == 0:
                self.close_connection = True
                return self.connection.close()
            return self.answer(503, b"")
        path = url.path.replace("/download/", "/", 1)
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                parts = [unquote(part) for part in match.groups()]
                return getattr(self, action)(asked, body, *parts)
        self.answer(501, f"{self.command} {self.path}".encode())

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def say(self, value: dict):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def resource(self, name: str) -> dict:
        size = str(len(self.server.objects[name]))
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": size,
            "generation": self.generation(name), "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def generation(self, name: str) -> str:
        objects = self.server.objects
        return str(objects.generations[name]) if name in objects else "0"

    def bucket(self, asked, body):
        self.say({"kind": "storage#bucket", "name": BUCKET})

    def listing(self, asked, body):
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        most = int(asked.get("maxResults", 1000))
        after = asked.get("pageToken", "")
        items, prefixes, token = [], set(), None
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or name <= after:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif len(items) == most:
                token = items[-1]["name"]
                break
            else:
                items.append(self.resource(name))
        answer = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        self.say(answer | ({"nextPageToken": token} if token else {}))

    def get(self, asked, body, name):
        data = self.server.objects.get(name)
        if data is None:
            return self.answer(404, b"{}")
        if asked.get("alt") != "media":
            return self.say(self.resource(name))
        about = {"x_goog_generation": self.generation(name)}
        if asked.get("ifGenerationNotMatch") == self.generation(name):
            return self.answer(304, b"", **about)
        wanted, status = self.headers.get("Range"), 200
        if wanted:
            start, stop = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
            if not start:  # the last so many
                start, stop = len(data) - int(stop), ""
            start, stop = int(start), min(int(stop or len(data) - 1), len(data) - 1)
            about["Content_Range"] = f"bytes {start}-{stop}/{len(data)}"
            data, status = data[start : stop + 1], 206
        with self.server.lock:
            self.server.media.append((name, len(data)))
        self.answer(status, data, **about)

    def upload(self, asked, body):
        if asked["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = (part.partition(b"\n\n")[2] for part in body.split(b"--" + boundary)[1:3])
            name = json.loads(about)["name"]
            if self.refuses(name):
                return None
            self.server.objects[name] = data.removesuffix(b"\n")
            return self.say(self.resource(name))
        name = asked.get("name") or json.loads(body)["name"]
        if self.refuses(name):
            return None
        if asked["uploadType"] == "media":
            with self.server.lock:
                if asked.get("ifGenerationMatch", self.generation(name)) != self.generation(name):
                    return self.answer(412, b"{}")
                self.server.objects[name] = body
            return self.say(self.resource(name))
        with self.server.lock:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = (name, bytearray())
        self.answer(200, Location=f"{self.server.url}/resume/{number}")

    def refuses(self, name: str) -> bool:
        """Whether this name may not be written; that is answered then."""
        forbidden = bool(self.server.forbidden and self.server.forbidden in name)
        if forbidden:
            self.answer(403, b'{"error": {"code": 403, "message": "no permission"}}')
        return forbidden

    def resume(self, asked, body, number):
        name, data = self.server.uploads[number]
        data += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.server.objects[name] = bytes(data)
        self.say(self.resource(name))

    def copy(self, asked, body, name, other):
        if name not in self.server.objects:
            return self.answer(404, b"{}")
        self.server.objects[other] = self.server.objects[name]
        self.say({"done": True, "resource": self.resource(other)})

    def move(self, asked, body, name, other):
        if name not in self.server.objects:
            return self.answer(404, b"{}")
        self.server.objects[other] = self.server.objects.pop(name)
        self.say(self.resource(other))

    def delete(self, asked, body, name):
        there = self.server.objects.pop(name, None) is not None
        self.answer(204 if there else 404, b"" if there else b"{}")


_B = f"/storage/v1/b/{BUCKET}"
ROUTES = (
    ("GET", _B, "bucket"),
    ("GET", f"{_B}/o", "listing"),
    ("GET", f"{_B}/o/([^/]+)", "get"),
    ("GET", f"/{BUCKET}/(.+)", "get"),
    ("POST", f"/upload{_B}/o", "upload"),
    ("POST", r"/resume/(\d+)", "resume"),
    ("PUT", r"/resume/(\d+)", "resume"),
    ("POST", f"{_B}/o/([^/]+)/rewriteTo/b/{BUCKET}/o/([^/]+)", "copy"),
    ("POST", f"{_B}/o/([^/]+)/moveTo/o/([^/]+)", "move"),
    ("DELETE", f"{_B}/o/([^/]+)", "delete"),
)
