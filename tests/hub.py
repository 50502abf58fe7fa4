"""A hub on this machine: the few endpoints that an upload needs, and what was pushed to it."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Small files come inside the commit, weights through the LFS endpoint."""

    def log_message(self, *_):
        pass

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        state = self.server.state
        state["asked"].append(self.path)
        if self.headers.get("Authorization") != "Bearer right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "ada", "type": "user"})
        else:
            self.answer({"id": "x", "sha": "0" * 40, "siblings": [], "tags": [], "private": True})

    def do_PUT(self):
        content = self.read()
        self.server.state["lfs"][hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        body, state = self.read(), self.server.state
        if self.path == "/api/repos/create":
            state["created"] = json.loads(body)
            owner = state["created"].get("organization") or "ada"
            self.answer({"url": f"{self.address}/{owner}/{state['created']['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "shouldIgnore": False,
                                    "uploadMode": "lfs" if path.endswith(".safetensors") else "regular"}
                                   for path in files]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.address}/lfs"}}
            objects = [{**item, "actions": upload} for item in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in filter(None, body.splitlines()):
                item = json.loads(line)
                if item["key"] == "file":
                    state["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    state["files"][item["value"]["path"]] = state["lfs"][item["value"]["oid"]]
            state["repository"] = self.path.split("/commit/")[0].removeprefix("/api/models/")
            address = f"{self.address}/{state['repository']}/commit/{'1' * 40}"
            self.answer({"success": True, "commitUrl": address, "commitOid": "1" * 40})
        else:
            self.answer({"error": f"no endpoint {self.path}"}, 404)


@contextmanager
def fake_hub():
    """(address, state) of a hub that takes the token `right`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"files": {}, "lfs": {}, "asked": []}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.state
    finally:
        server.shutdown()
        server.server_close()
