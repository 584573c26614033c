"""A server in this process, on a port of its own, and what tests ask of it."""

import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from gshardx.infer.server.app import build_app
from gshardx.infer.server.chat import load_template
from gshardx.infer.server.limits import Limits
from gshardx.infer.server.serve import listening
from gshardx.infer.server.state import Server
from gshardx.infer.server.transport import Connection


@dataclasses.dataclass
class Running:
    url: str
    server: Server

    def post(self, path, json=None, **more):
        return httpx.post(f"{self.url}{path}", json=json, timeout=60, **more)

    def get(self, path, **more):
        return httpx.get(f"{self.url}{path}", timeout=60, **more)

    def until_idle(self, seconds=20):
        """Wait until the engine has nothing left, then check that everything is back."""
        ends = time.monotonic() + seconds
        worker = self.server.worker
        while worker.open or worker.seen.running or worker.seen.waiting:
            assert time.monotonic() < ends, (worker.open, worker.seen)
            time.sleep(0.01)
        assert worker.seen.held == 0


@contextlib.contextmanager
def serving(engine, keys=None, template=None, **limits):
    """Until the block ends."""
    server = Server(engine, "tiny", template or load_template(Path("nowhere"), None), keys, Limits(**limits))
    front = uvicorn.Server(uvicorn.Config(build_app(server), http=Connection, log_level="warning"))
    with listening("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=front.run, args=([sock],), daemon=True)
        thread.start()
        while not front.started:
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", server)
        finally:
            front.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
