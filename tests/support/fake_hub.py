"""A stand-in for the Hugging Face hub: the requests by which huggingface_hub reads one file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAIN = "a" * 40


class Hub(ThreadingHTTPServer):
    """repos: {ORG/NAME: {commit: {file: bytes}}}; `main` is MAIN. gated: names of repositories.
    A context: serves within it. `read`: (commit, file) of every download."""

    daemon_threads = True

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.gated, self.read = repos, set(), []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        org, name, _, revision, file = self.path.lstrip("/").split("?")[0].split("/", 4)
        repo = self.server.repos.get(f"{org}/{name}")
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if f"{org}/{name}" in self.server.gated:
            return self._refuse(403, "GatedRepo")
        commit = MAIN if revision == "main" else revision
        if commit not in repo:
            return self._refuse(404, "RevisionNotFound")
        if file not in repo[commit]:
            return self._refuse(404, "EntryNotFound", commit)
        data = repo[commit][file]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.server.read.append((commit, file))
            self.wfile.write(data)

    def _refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass
