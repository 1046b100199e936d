"""A Hub of models on loopback, which the real huggingface_hub client pushes to and loads from over real HTTP.

It knows what the client asks for: create, preupload, LFS, commit, branch, tree, resolve, info, pull requests as far as
a commit opens them, collections. No xet, no pages of long listings. A process uses it when HF_ENDPOINT is its url and
HF_HUB_DISABLE_XET is 1 before huggingface_hub is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".png")
RESET = -1


@dataclass(frozen=True)
class File:
    data: bytes
    is_large: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self):
        data = self.data
        if self.is_large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # commit -> title, parent
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch, tree, title):
        parent = self.branches.get(branch)
        text = json.dumps([sorted((k, v.blob) for k, v in tree.items()), title, parent, time.time_ns()])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.log[sha], self.branches[branch] = tree, (title, parent), sha
        return sha

    def resolve(self, revision):
        sha = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision="main"):
        return {name: file.data for name, file in self.commits[self.resolve(revision)].items()}


class Refusal(Exception):
    def __init__(self, status, code="", message="", headers=()):
        self.status, self.code, self.message, self.headers = status, code, message, headers


class HubServer:
    """`with HubServer() as hub`; `before(method, path)` may delay a request, or give a status to refuse it with.

    RESET as a status closes the connection without an answer; `after(method, path)` may do so when all is done.
    """

    def __init__(self, user="tester", token="hf_test", before: Callable[[str, str], int | None] | None = None):
        self.user, self.token, self.before = user, token, before
        self.after: Callable[[str, str], int | None] | None = None
        self.collections: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """Variables of a process that uses this Hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def commit_requests(self):
        return [path for method, path in self.requests if method == "POST" and "/commit/" in path]


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Clients that were killed are no error of the server."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    hub: HubServer
    routes: ClassVar[list[tuple[str, re.Pattern[str], Callable[..., Any]]]] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body: Any = b"", headers=(), kind="application/json"):
        if status == RESET or (self.hub.after and self.hub.after(self.command, urlsplit(self.path).path) == RESET):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            self.connection.close()
            return
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in [("Content-Type", kind), ("Content-Length", str(len(body))), *headers]:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self):
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def dispatch(self):
        url = urlsplit(self.path)
        self.query, body = parse_qs(url.query), self.read_body()
        self.hub.requests.append((self.command, url.path))
        try:
            if self.hub.before and (status := self.hub.before(self.command, url.path)):
                raise Refusal(status, message="refused by the test")
            self.check_token(url.path)
            for method, pattern, handle in self.routes:
                if method == self.command and (match := pattern.fullmatch(url.path)):
                    with self.hub.lock:
                        return handle(self, body, **{k: unquote(v or "") for k, v in match.groupdict().items()})
            raise Refusal(404, message=f"no route {self.command} {url.path}")
        except Refusal as no:
            code = [("X-Error-Code", no.code)] if no.code else []
            return self.answer(no.status, {"error": no.message}, [*code, ("X-Error-Message", no.message), *no.headers])

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = dispatch

    def check_token(self, path):
        knows = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        private = any(repo.private and f"/{name}/" in f"{path}/" for name, repo in self.hub.repos.items())
        is_write = self.command not in ("GET", "HEAD") and not path.startswith("/_lfs/")
        if not knows and private:
            raise Refusal(401, "RepoNotFound", "Repository not found")
        if not knows and (is_write or path == "/api/whoami-v2"):
            raise Refusal(401, message="Invalid credentials in Authorization header")

    def repo(self, name):
        if name not in self.hub.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.hub.repos[name]


def route(method, pattern):
    compiled = re.compile(pattern.replace("{id}", r"(?P<name>[^/]+/[^/]+)").replace("{rev}", r"(?P<revision>[^/]+)"))

    def register(handle):
        Handler.routes.append((method, compiled, handle))
        return handle

    return register


@route("GET", "/api/whoami-v2")
def whoami(h, body):
    access = {"type": "access_token", "accessToken": {"role": "write", "displayName": "test"}}
    h.answer(200, {"type": "user", "id": "0", "name": h.hub.user, "fullname": h.hub.user, "orgs": [], "auth": access})


@route("POST", "/api/validate-yaml")
def validate(h, body):
    text = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.S)
    errors = [] if text and isinstance(yaml.safe_load(text[1]), dict) else [{"message": "no metadata"}]
    h.answer(200 if not errors else 400, {"errors": errors, "warnings": []})


@route("POST", "/api/repos/create")
def create(h, body):
    asked = json.loads(body)
    name = f"{asked.get('organization') or h.hub.user}/{asked['name']}"
    answer = {"url": f"{h.hub.url}/{name}", "name": name, "id": name}
    if name in h.hub.repos:
        return h.answer(409, {**answer, "error": "You already created this model repo"})
    h.hub.repos[name] = Repo(name, asked.get("visibility") == "private")
    return h.answer(200, answer)


@route("GET", "/api/models/{id}")
@route("GET", "/api/models/{id}/revision/{rev}")
def info(h, body, name, revision="main"):
    repo = h.repo(name)
    sha = repo.resolve(revision)
    siblings = [{"rfilename": path, "size": len(f.data), "blobId": f.blob} for path, f in repo.commits[sha].items()]
    facts = {"_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha, "siblings": siblings}
    h.answer(200, {**facts, "private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0})


@route("GET", "/api/models/{id}/tree/{rev}")
def tree(h, body, name, revision):
    repo = h.repo(name)
    files = repo.commits[repo.resolve(revision)]
    folders = {"/".join(path.split("/")[: i + 1]) for path in files for i in range(path.count("/"))}
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
    for path, file in sorted(files.items()):
        lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.is_large else {}
        entries.append({"type": "file", "oid": file.blob, "size": len(file.data), "path": path, **lfs})
    is_recursive = h.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    h.answer(200, [e for e in entries if is_recursive or "/" not in e["path"]])


@route("GET", "/api/models/{id}/refs")
def refs(h, body, name):
    heads = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in h.repo(name).branches.items()]
    h.answer(200, {"branches": heads, "tags": [], "converts": [], "pullRequests": []})


@route("GET", "/api/models/{id}/commits/{rev}")
def commits(h, body, name, revision):
    repo, found = h.repo(name), []
    sha = repo.resolve(revision)
    while sha:
        title, parent = repo.log[sha]
        found.append({"id": sha, "title": title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []})
        sha = parent
    h.answer(200, found)


@route("POST", "/api/models/{id}/branch/(?P<branch>[^/]+)")
def create_branch(h, body, name, branch):
    repo = h.repo(name)
    if branch in repo.branches:
        raise Refusal(409, message="Reference already exists")
    repo.branches[branch] = repo.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
    h.answer(200, {})


@route("POST", "/api/models/{id}/preupload/{rev}")
def preupload(h, body, name, revision):
    repo = h.repo(name)
    there = repo.commits[repo.resolve(revision)]
    answers = []
    for asked in json.loads(body)["files"]:
        path = asked["path"]
        old = there.get(path)
        oid = (old.sha256 if old.is_large else old.blob) if old else None
        mode = "lfs" if path.endswith(LARGE) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    h.answer(200, {"files": answers})


@route("POST", r"/{id}\.git/info/lfs/objects/batch")
def lfs_batch(h, body, name):
    h.repo(name)
    objects = []
    for asked in json.loads(body)["objects"]:
        href = f"{h.hub.url}/_lfs/{asked['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        new = {} if asked["oid"] in h.hub.blobs else {"actions": actions}
        objects.append({"oid": asked["oid"], "size": asked["size"], **new})
    h.answer(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")


@route("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(h, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, message="sha256 mismatch")
    h.hub.blobs[oid] = body
    h.answer(200)


@route("POST", "/_lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(h, body, oid):
    h.answer(200 if len(h.hub.blobs.get(oid, b"")) == json.loads(body)["size"] else 404, {})


@route("POST", "/api/models/{id}/commit/{rev}")
def commit(h, body, name, revision):
    repo = h.repo(name)
    if revision not in repo.branches:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    is_pull_request = h.query.get("create_pr", ["0"])[0] == "1"
    head, title = repo.branches[revision], ""
    files = dict(repo.commits[head])
    for line in body.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "header":
            title = value["summary"]
            if not head.startswith(value.get("parentCommit") or ""):
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in h.hub.blobs:
                raise Refusal(400, message=f"LFS object {value['oid']} not uploaded")
            files[value["path"]] = File(h.hub.blobs[value["oid"]], True)
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(400, message=f"unknown operation {key}")
    number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
    if is_pull_request:
        repo.branches[f"refs/pr/{number}"] = head
        revision = f"refs/pr/{number}"
    sha = repo.commit(revision, files, title)
    url = f"{h.hub.url}/{name}/commit/{sha}"
    request = {"pullRequestUrl": f"{h.hub.url}/{name}/discussions/{number}"} if is_pull_request else {}
    h.answer(200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": "", **request})


def collection_of(h, slug):
    own = h.hub.collections[slug]
    items = [{"_id": str(i), "id": item, "type": "model", "position": i} for i, item in enumerate(own["items"])]
    owner = {"_id": "0", "avatarUrl": "", "fullname": own["owner"], "name": own["owner"], "type": "user"}
    facts = {"slug": slug, "title": own["title"], "owner": owner, "items": items, "private": own["private"]}
    return {**facts, "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}


@route("POST", "/api/collections")
def create_collection(h, body):
    asked = json.loads(body)
    slug = f"{asked['namespace']}/{asked['title']}-0123456789abcdef01234567"
    is_new = slug not in h.hub.collections
    own = {"title": asked["title"], "owner": asked["namespace"], "private": asked["private"], "items": []}
    h.hub.collections.setdefault(slug, own)
    h.answer(200 if is_new else 409, collection_of(h, slug))


@route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def get_collection(h, body, slug):
    h.answer(200, collection_of(h, slug))


@route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
def add_item(h, body, slug):
    item, items = json.loads(body)["item"]["id"], h.hub.collections[slug]["items"]
    is_new = item not in items
    items.extend([item] * is_new)
    h.answer(200 if is_new else 409, collection_of(h, slug))


@route("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
@route("HEAD", "/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(h, body, name, revision, path):
    repo = h.repo(name)
    sha = repo.resolve(revision)
    file = repo.commits[sha].get(path)
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found", [("X-Repo-Commit", sha)])
    etag = f'"{file.sha256 if file.is_large else file.blob}"'
    headers = [("X-Repo-Commit", sha), ("ETag", etag), ("Accept-Ranges", "bytes")]
    if file.is_large:
        headers += [("X-Linked-Etag", etag), ("X-Linked-Size", str(len(file.data)))]
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or "")
    if part:
        first, last = int(part[1]), min(int(part[2] or len(file.data) - 1), len(file.data) - 1)
        headers.append(("Content-Range", f"bytes {first}-{last}/{len(file.data)}"))
        return h.answer(206, file.data[first : last + 1], headers, "application/octet-stream")
    return h.answer(200, file.data, headers, "application/octet-stream")
