"""A minimal Hub on loopback, standard library only: what huggingface_hub 2.4 asks of one for model repositories.

Repositories are dictionaries of path to bytes, one commit after the other; large files go through LFS (the client's
Xet switched off). `tokens` gives each token its user; a user may write to its own name only. `die_at`: the server
closes its connections without an answer from the first request on whose path holds this string.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repos: dict[str, dict] = {}  # id -> {"private": bool, "commits": [(oid, {path: bytes})]}
        self.large: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self.die_at: str | None = None
        self.dead = False
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo]["commits"][-1][1]


def commit_oid(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=None, headers=None, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, message, code=None):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, {"error": message}, headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        data = self.body()
        server = self.server
        with server.lock:
            server.requests.append(f"{self.command} {path}")
            if server.dead or (server.die_at and server.die_at in path):
                server.dead = True
                self.close_connection = True
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in server.tokens:
                return self.fail(401, "Invalid user token.")
            self.user = server.tokens.get(token)
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return method(self, *match.groups(), data=data)
            self.fail(404, f"no such endpoint: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def repo(self, name: str, write=False):
        """The repository, or `None` once the refusal is sent; what one may not see does not exist."""
        repo = self.server.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or (repo["private"] and self.user != owner):
            self.fail(404, "Repository not found", "RepoNotFound")
        elif write and self.user != owner:
            self.fail(403, "You don't have the rights to write here.")
        else:
            return repo

    def at(self, name: str, revision: str):
        """`(oid, files)` at a revision."""
        if repo := self.repo(name):
            for oid, files in reversed(repo["commits"]):
                if revision in ("main", oid, *repo.get("branches", [])):
                    return oid, files
            self.fail(404, "Revision not found", "RevisionNotFound")

    def whoami(self, data):
        if self.user is None:
            return self.fail(401, "Invalid username or password.")
        self.answer(body={"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, data):
        asked = json.loads(data)
        if self.user is None:
            return self.fail(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name in self.server.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        if name.split("/")[0] != self.user:
            return self.fail(403, "You don't have the rights to create a model under this namespace.")
        first = commit_oid(name, 0), {}
        self.server.repos[name] = {"private": asked.get("visibility") == "private", "commits": [first]}
        self.answer(body={"url": f"{self.server.url}/{name}", "name": name})

    def may_write(self, name, data):
        if self.repo(name, write=True):
            self.answer()

    def validate_yaml(self, data):
        self.answer(body={"errors": [], "warnings": []})

    def preupload(self, name, revision, data):
        if self.repo(name, write=True):
            files = json.loads(data)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in files
            ]
            self.answer(body={"files": modes})

    def lfs_batch(self, name, data):
        objects = []
        for each in json.loads(data)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{each['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/{each['oid']}/verify"},
            }
            known = each["oid"] in self.server.large
            objects.append(each | ({} if known else {"actions": actions}))
        self.answer(body={"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_put(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            return self.fail(400, "wrong checksum")
        self.server.large[oid] = data
        self.answer()

    def lfs_verify(self, oid, data):
        self.answer() if oid in self.server.large else self.fail(404, "no such object")

    def branch(self, name, revision, data):
        if repo := self.repo(name, write=True):
            repo.setdefault("branches", []).append(revision)  # of one history here
            self.answer()

    def commit(self, name, revision, data):
        repo = self.repo(name, write=True)
        if repo is None:
            return
        files = dict(repo["commits"][-1][1])
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = commit_oid(name, len(repo["commits"]))
        repo["commits"].append((oid, files))
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.answer(body={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, name, revision="main", data=None):
        if found := self.at(name, revision or "main"):
            oid, files = found
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            private = self.server.repos[name]["private"]
            body = {"_id": "1", "id": name, "modelId": name, "sha": oid, "private": private, "siblings": siblings}
            self.answer(body=body | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, name, revision, data):
        if found := self.at(name, revision):
            self.answer(
                body=[
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in found[1].items()
                ]
            )

    def resolve(self, name, revision, path, data):
        if found := self.at(name, revision):
            oid, files = found
            if path not in files:
                return self.fail(404, "Entry not found", "EntryNotFound")
            content = files[path]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": oid, "Content-Length": str(len(content))}
            self.answer(body=content, headers=headers, kind="application/octet-stream")


ID = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (rf"GET /api/models/{ID}/auth-check/write", Handler.may_write),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (r"POST /lfs/(\w+)/verify", Handler.lfs_verify),
    (rf"POST /api/models/{ID}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models/{ID}/commit/([^/]+)", Handler.commit),
    (rf"GET /api/models/{ID}", Handler.info),
    (rf"GET /api/models/{ID}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{ID}/tree/([^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]
