"""A small hub on the loopback address: the endpoints that the `huggingface_hub` client needs, on files in a folder.

`running_hub(folder)` starts it and gives the environment variables for a client process; they must be set before the
client imports `huggingface_hub`.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
DATE = "2024-01-01T00:00:00.000Z"


class Repository:
    """Files by path for each commit, and the commit that each branch stands at."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}

    def commit_of(self, revision: str) -> str | None:
        """The commit of a branch, or the one of this id; None if the revision is unknown."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
        self.branches[branch] = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[self.branches[branch]] = files
        return self.branches[branch]

    def describe(self, name: str, commit: str) -> dict:
        return {
            "_id": name,
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": DATE,
            "createdAt": DATE,
            "siblings": [{"rfilename": path} for path in sorted(self.commits[commit])],
        }


def etag(path: str, data: bytes) -> str:
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server, with its repositories and uploaded blobs (also written below `folder`, to be looked at)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def write(self, name: str, branch: str) -> None:
        """Writes the files of a branch to the repository's folder; those of other branches than main beside it."""
        repository = self.repositories[name]
        folder = self.folder / (name if branch == "main" else f"{name}@{branch}")
        for path, data in repository.commits[repository.branches[branch]].items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, data: object = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.reply({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def do_POST(self) -> None:
        path, data = urlsplit(self.path).path, self.body()
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/repos/create":
            self.create(json.loads(data))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.lfs_batch(json.loads(data))
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
            self.preupload("/".join(parts[2:4]), parts[5], json.loads(data))
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
            self.commit("/".join(parts[2:4]), parts[5], data)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["branch"]:
            self.create_branch("/".join(parts[2:4]), parts[5])
        else:
            self.refuse("EntryNotFound")

    def do_PUT(self) -> None:
        data = self.body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.reply()

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            token = {"type": "access_token", "accessToken": {"role": "write"}}
            self.reply({"type": "user", "name": "user", "orgs": [], "auth": token})
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.model_info("/".join(parts[2:4]), parts[4:], parse_qs(split.query))
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def create(self, request: dict) -> None:
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        if name in self.server.repositories:
            self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name}, 409)
            return
        self.server.repositories[name] = Repository()
        self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def create_branch(self, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        if branch in repository.branches:
            self.reply({"error": "Reference already exists"}, 409)
            return
        repository.branches[branch] = repository.branches["main"]
        self.reply()

    def preupload(self, name: str, branch: str, request: dict) -> None:
        if branch not in self.server.repositories[name].branches:
            self.refuse("RevisionNotFound")
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in request["files"]
        ]
        self.reply({"files": files})

    def lfs_batch(self, request: dict) -> None:
        objects = []
        for item in request["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/blob/{item['oid']}"}}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, name: str, branch: str, data: bytes) -> None:
        repository = self.server.repositories[name]
        if branch not in repository.branches:
            self.refuse("RevisionNotFound")
            return
        files = dict(repository.commits[repository.branches[branch]])
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(branch, files)
        self.server.write(name, branch)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def model_info(self, name: str, rest: list[str], query: dict) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.refuse("RepoNotFound")
            return
        commit = repository.commit_of(rest[1] if rest else "main")
        if commit is None:
            self.refuse("RevisionNotFound")
        elif not rest or rest[0] == "revision":
            self.reply(repository.describe(name, commit))
        elif rest[0] == "tree":
            self.tree(repository.commits[commit], "/".join(rest[2:]))
        else:
            self.refuse("EntryNotFound")

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        files = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not files:
            self.refuse("EntryNotFound")
            return
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "oid": etag(path, data), "size": len(data), "path": path}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 128}
            entries.append(entry)
        self.reply(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.refuse("RepoNotFound")
            return
        commit = repository.commit_of(revision)
        if commit is None:
            self.refuse("RevisionNotFound")
        elif path not in repository.commits[commit]:
            self.refuse("EntryNotFound", {"X-Repo-Commit": commit})
        else:
            data = repository.commits[commit][path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(path, data)}"', "Content-Length": str(len(data))}
            if path.endswith(LFS_SUFFIXES):
                headers |= {"X-Linked-Etag": f'"{etag(path, data)}"', "X-Linked-Size": str(len(data))}
            self.reply(data, headers=headers)


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[dict[str, str]]:
    """Runs a hub while the context lasts and yields a client's environment: endpoint, token, an empty cache."""
    hub = Hub(Path(folder))
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(Path(folder) / "client-cache"),
        }
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
