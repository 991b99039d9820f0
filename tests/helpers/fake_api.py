"""A server with the part of the OpenAI API that the tasks use, on a thread of its own."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeApi:
    """A context manager; `url` is the API's.

    Args:
        answer: the text of a completion, by the tokens of its prompt. It may return (status, message) to refuse, or
            raise ConnectionError to hang up.
        longest: tokens of prompt and answer together, as the server says of itself.
        models: that it serves.
    """

    def __init__(self, answer: Callable[[list[int]], str | tuple[int, str]], longest: int = 8192, models=("model",)):
        self.answer, self.longest, self.models = answer, longest, models
        self.requests: list[dict] = []
        self.counted: int | None = None
        """What it says of a prompt's length; None: the truth."""
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "FakeApi":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._send(200, {"object": "list", "data": [fake._model(name) for name in fake.models]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append(request)
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    given = fake.answer(request["prompt"])
                except ConnectionError:
                    return
                finally:
                    with fake._lock:
                        fake.at_once -= 1
                if isinstance(given, tuple):
                    self._send(given[0], {"error": {"message": given[1], "type": "BadRequestError", "code": given[0]}})
                    return
                tokens = len(request["prompt"]) if fake.counted is None else fake.counted
                self._send(
                    200,
                    {
                        "id": "1", "object": "text_completion", "created": 0, "model": request["model"],
                        "choices": [{"index": 0, "text": given, "finish_reason": "stop", "logprobs": None}],
                        "usage": {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1},
                    },
                )  # fmt: skip

            def _send(self, status: int, document: dict) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _model(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": 0, "owned_by": "nobody", "max_model_len": self.longest}
