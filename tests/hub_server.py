"""A small Hub on 127.0.0.1: enough of the Hub's protocol for the real huggingface_hub client, with faults on demand.

Models only, in memory, without Xet. Blob ids are git's sha1, large files are LFS objects named by their sha256.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path (with query) match."""

    method: str
    path_regex: str
    status: int | None = None  # answer this, with `headers` and `message`, and do nothing
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "fault on demand"
    times: int = 1
    cut: bool = False  # drop the connection when half of the request's body has been read
    after_commit: bool = False  # do the work, then drop the connection instead of answering
    empty: bool = False  # do the work, then answer without a body
    hang: float = 0.0  # seconds without a sign of life


TOKEN = "hf_test0123456789abcdefghijklmnopqrst"
LFS_FILE = re.compile(r".*\.(safetensors|bin|png)$")
LFS_MINIMUM_BYTES = 512
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Blob(NamedTuple):
    data: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.git_oid


class Commit(NamedTuple):
    oid: str
    summary: str
    files: dict[str, Blob]


class Repo:
    """Branches are lists of commits, oldest first; each commit holds all its files. The Hub makes the first one."""

    def __init__(self, private: bool = False):
        self.private = private
        self.branches: dict[str, list[Commit]] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.add_commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES, False)})

    def add_commit(self, branch: str, summary: str, files: dict[str, Blob]) -> Commit:
        history = self.branches.setdefault(branch, [])
        listing = [history[-1].oid if history else "", summary, *sorted(f"{p} {b.oid}" for p, b in files.items())]
        history.append(Commit(hashlib.sha1("\n".join(listing).encode()).hexdigest(), summary, files))
        return history[-1]

    def find(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for history in self.branches.values() for commit in history):
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.find(revision).files.items()}


def is_ignored(path: str, gitignore: str) -> bool:
    """By the simpler rules of gitignore: `*`, a slash in front for the top level, a slash behind for folders."""
    parts = path.split("/")
    for pattern in gitignore.splitlines():
        names = parts[:-1] if pattern.endswith("/") else parts
        names = names[:1] if pattern.startswith("/") else names
        if any(fnmatch.fnmatchcase(name, pattern.strip("/")) for name in names):
            return True
    return False


def metadata_errors(card: str) -> list[str]:
    """What the Hub would find wrong with a card's metadata: the types of the keys used here, and the model-index."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    texts = ("license", "library_name", "pipeline_tag", "base_model", "base_model_relation")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(metadata.get(key, ""), str)]
    for key in ("tags", "datasets"):
        values = metadata.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a list of strings')
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(metadata.get("base_model", "x"))):
        errors.append('"base_model" must be a model id')
    if metadata.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        errors.append('"base_model_relation" is unknown')
    for entry in metadata.get("model-index", []):
        for result in entry.get("results", []):
            for key, names in {"task": ["type"], "dataset": ["type", "name"]}.items():
                missing = [name for name in names if not isinstance(result.get(key, {}).get(name), str)]
                errors += [f'"model-index" lacks {key}.{name}' for name in missing]
            if not all("type" in metric and "value" in metric for metric in result.get("metrics", [{}])):
                errors.append('"model-index" has metrics without type or value')
    return errors


class HubError(Exception):
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, **body):
        super().__init__(message)
        self.answer = status, {"error": message, **body}, {"X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    """One connection. The methods named in `_ROUTES` answer with status, body and headers; `self.repo` is set."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *args):
        pass

    def _serve(self):
        self.hub = self.server.hub
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            fault = self.hub.take_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.cut:
            self.rfile.read(length // 2)
            return self._drop()
        self.body = self.rfile.read(length)
        if fault and fault.hang:
            time.sleep(fault.hang)
            return self._drop()
        try:
            if fault and fault.status:
                raise HubError(fault.status, fault.message, fault.headers)
            with self.hub.lock:
                status, body, *headers = self._route()
                headers = headers[0] if headers else {}
        except HubError as error:
            status, body, headers = error.answer
        if fault and fault.after_commit:
            return self._drop()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = b"" if fault and fault.empty else data
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _drop(self):
        # Linger 0 and shutdown: the client sees the end at once, as when a proxy or a router gives up.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _route(self):
        parts = urlsplit(self.path)
        for methods, pattern, name, needs_token in _ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if not match or self.command not in methods.split():
                continue
            self.user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if self.user is None and (needs_token or "Authorization" in self.headers):
                raise HubError(401, "Invalid credentials in Authorization header")
            arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            self.repo_id = arguments.pop("id", None)
            self.repo = self.hub.repos.get(self.repo_id)
            # Upload links are signed: whoever has one needs no token.
            hidden = self.repo is None or (self.repo.private and self.user is None and name != "lfs_put")
            if self.repo_id and hidden:
                raise HubError(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            self.create_pr = parse_qs(parts.query).get("create_pr") == ["1"]
            return getattr(self, name)(**arguments)
        raise HubError(404, f"No such path here: {self.command} {parts.path}")

    def whoami(self):
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.user["role"]}}
        name = self.user["name"]
        return 200, {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": token}

    def create_or_delete_repo(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.user['name']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if self.command == "DELETE":
            if self.hub.repos.pop(repo_id, None) is None:
                raise HubError(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        elif repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", **answer)
        else:
            self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return 200, answer

    def validate_yaml(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        return 400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []}

    def preupload(self, revision):
        stored, files, asked = self.repo.find(revision).files, [], json.loads(self.body)
        hosted = stored[".gitignore"].data.decode() if ".gitignore" in stored else ""
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if LFS_FILE.match(path) and file["size"] > LFS_MINIMUM_BYTES else "regular"
            oid = stored[path].oid if path in stored else None
            ignored = is_ignored(path, asked.get("gitIgnore", hosted))
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return 200, {"files": files}

    def lfs_batch(self):
        verify = {"href": f"{self.hub.url}/{self.repo_id}.git/info/lfs/objects/verify", "header": {}}
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.repo.lfs_objects:
                upload = {"href": f"{self.hub.url}/lfs/{self.repo_id}/{wanted['oid']}", "header": {}}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.repo.lfs_objects[oid] = self.body
        return 200, b""

    def lfs_verify(self):
        wanted = json.loads(self.body)
        if len(self.repo.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object does not exist")
        return 200, {}

    def commit(self, revision):
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        header, head = header["value"], self.repo.find(revision)
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.repo.lfs_objects:
                    raise HubError(400, f"The LFS object of {value['path']} was not uploaded")
                files[value["path"]] = Blob(self.repo.lfs_objects[value["oid"]], is_lfs=True)
            else:
                folder = value["path"].rstrip("/") + "/"
                files = {path: blob for path, blob in files.items() if not f"{path}/".startswith(folder)}
        answer = {}
        if self.create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.repo.branches)
            self.repo.branches[f"refs/pr/{number}"] = list(self.repo.branches[revision])
            revision = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.hub.url}/{self.repo_id}/discussions/{number}"}
        elif revision not in self.repo.branches:
            raise HubError(400, f"{revision} is not a branch")
        oid = self.repo.add_commit(revision, header["summary"], files).oid
        return 200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{self.repo_id}/commit/{oid}", **answer}

    def create_branch(self, branch):
        if branch in self.repo.branches:
            raise HubError(409, "Reference already exists")
        self.repo.branches[branch] = [self.repo.find(json.loads(self.body or b"{}").get("startingPoint", "main"))]
        return 200, {}

    def repo_info(self, revision="main"):
        commit = self.repo.find(revision)
        facts = {"private": self.repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return 200, {"_id": "0" * 24, "id": self.repo_id, "sha": commit.oid, "tags": [], "siblings": siblings, **facts}

    def tree(self, revision):
        entries = []
        for path, blob in sorted(self.repo.find(revision).files.items()):
            entries.append({"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path})
            if blob.is_lfs:
                entries[-1]["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
        return 200, entries

    def resolve(self, revision, path):
        commit = self.repo.find(revision)
        if path not in commit.files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            raise HubError(404, "Entry not found", missing)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, blob.data, headers
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob.data)), len(blob.data) - 1)
        return 206, blob.data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(blob.data)}"}


for _method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._serve)
_ID, _REVISION = r"(?P<id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = [  # methods, path, method of _Handler, whether a token is needed
    ("GET", r"/api/whoami-v2", "whoami", True),
    ("POST", r"/api/repos/create", "create_or_delete_repo", True),
    ("DELETE", r"/api/repos/delete", "create_or_delete_repo", True),
    ("POST", r"/api/validate-yaml", "validate_yaml", False),
    ("POST", rf"/api/models/{_ID}/preupload/{_REVISION}", "preupload", True),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch", True),
    ("PUT", rf"/lfs/{_ID}/(?P<oid>[0-9a-f]+)", "lfs_put", False),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", "lfs_verify", True),
    ("POST", rf"/api/models/{_ID}/commit/{_REVISION}", "commit", True),
    ("POST", rf"/api/models/{_ID}/branch/(?P<branch>[^/]+)", "create_branch", True),
    ("GET", rf"/api/models/{_ID}(/revision/{_REVISION})?", "repo_info", False),
    ("GET", rf"/api/models/{_ID}/tree/{_REVISION}", "tree", False),
    ("GET HEAD", rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", "resolve", False),
]


class HubServer:
    """The server, in threads, while in a `with` block. `url` is for `HF_ENDPOINT`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}  # by id
        self.tokens = {TOKEN: {"name": "tester", "role": "write"}}  # or "read"
        self.faults: list[Fault] = []  # the first that matches is used
        self.requests: list[tuple[str, str]] = []  # method and path, in order
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path_regex, path):
                fault.times -= 1
                return fault
        return None

    def count(self, method: str, path_regex: str) -> int:
        """How many requests matched so far."""
        return sum(verb == method and bool(re.search(path_regex, path)) for verb, path in self.requests)
