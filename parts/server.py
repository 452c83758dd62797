"""A server of pages for this machine only, which evaluation/rate.py and parts/play.py share.

    class Handler(LocalHandler): ...    # do_GET, do_POST, refuse
    server = listen(Handler, 8000)      # server.serve_forever() answers
"""

import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from parts import cli
from parts.cli import UserError, say

LIMIT = 100_000  # bytes of what a page may send
FOREIGN = "These pages are for this machine only"


def add_port(parser):
    """Add the flag of the port that `listen` takes."""
    parser.add_argument("--port", type=cli.integer(0, 65535), default=8000,
                        help="of the page; 0 takes any that is free (default: %(default)s)")


def listen(handler, port):
    """A server on this machine's own address, with a thread for each request. Raises UserError."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error}; give a free one, or 0 for any") from error
    server.handle_error = lambda *_: say(f"error: a request broke off: {sys.exc_info()[1]}")
    return server


def address(server):
    return f"http://127.0.0.1:{server.server_port}/"


class LocalHandler(BaseHTTPRequestHandler):
    """What the requests of all pages share. A subclass has `policy` and refuse(status, why)."""
    timeout = 60  # seconds that a browser may take to send a request
    policy = "default-src 'none'"  # what a page may load, run and send to

    def log_message(self, *_):
        return  # the programs say what matters; not every request

    def send_error(self, code, message=None, explain=None):
        """The library's own answer to what is no request, and to other methods."""
        self.refuse(code, message or HTTPStatus(code).phrase)

    def foreign(self):
        """Whether another site may be behind it, by a name that leads here or a form of its own."""
        port = "" if self.server.server_port == 80 else f":{self.server.server_port}"
        hosts = [f"127.0.0.1{port}", f"localhost{port}"]
        origin = self.headers.get("Origin") if self.command == "POST" else None  # of the form
        ours = [None, *(f"http://{host}" for host in hosts)]
        return self.headers.get("Host") not in hosts or origin not in ours

    def read_body(self):
        """What a POST sends, as bytes; None if that was refused."""
        length = self.headers.get("Content-Length", "")  # which anyone can send
        if not re.fullmatch("[0-9]+", length):
            self.refuse(411, "A request needs its length")
        elif len(length) > 9 or int(length) > LIMIT:
            self.refuse(413, f"This is too long: expected at most {LIMIT:,} bytes")
            # Who is still sending when the connection closes never reads the answer.
            self.rfile.read(min(int(length[:9]), 100 * LIMIT))
        else:
            return self.rfile.read(int(length))
        return None

    def send_head(self, status, kind, **headers):
        """Everything before the content; its length, too, if that is among the headers."""
        headers |= {"Content-Type": kind, "Cache-Control": "no-store",
                    "Content-Security-Policy": self.policy, "X-Content-Type-Options": "nosniff"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status, content, kind="text/html; charset=utf-8", **headers):
        content = content if isinstance(content, bytes) else content.encode()
        self.send_head(status, kind, **headers, **{"Content-Length": str(len(content))})
        self.wfile.write(content)
