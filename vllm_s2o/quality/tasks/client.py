"""Prompts to a server by the OpenAI API, a few at a time, each asked again where the server failed."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
from openai.types import Completion

from .answers import Answer
from .prompt import Prompt, TaskError

TRIES = 3
WAIT_SECONDS = 2.0
REQUEST_SECONDS = 1800
"""A CPU takes minutes for a few long prompts at once."""

_PASSING = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
"""What may go away by itself; APITimeoutError is one of them."""


class Client:
    """A served model.

    Args:
        url: of the API, such as http://127.0.0.1:8000/v1.
        name: what the server calls the model; by default the only one that it serves.
        concurrency: requests at a time.
        tell: takes a sentence about each request that is asked again.

    Raises:
        TaskError: there is no such server, or not one model to choose.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        concurrency: int = 1,
        tell: Callable[[str], None] = lambda said: print(said, file=sys.stderr),
    ):
        self.url, self.concurrency, self.tell = url, concurrency, tell
        # Retries are ours: the client's own ones would leave no trace.
        self.api = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_SECONDS)
        try:
            served = {model.id: model for model in self.api.models.list()}
        except (openai.OpenAIError, ValueError) as error:
            raise TaskError(f"No server with the OpenAI API answers at {url}: {_reason(error)}.") from error
        if name is None and len(served) == 1:
            name = next(iter(served))
        if name not in served:
            known = ", ".join(served) or "none"
            raise TaskError(f"Name one of the models that {url} serves with --name: {known}.")
        self.name = name
        self.longest: int | None = getattr(served[name], "max_model_len", None)
        """Tokens of prompt and answer together, where the server says it, as vLLM does."""

    def ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The greedy answers to prompts, in their order.

        Raises:
            TaskError: the server refuses one, or fails TRIES times.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            pending = [pool.submit(self._ask, prompt) for prompt in prompts]
            try:
                return [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, prompt: Prompt) -> Answer:
        for tried in range(1, TRIES + 1):
            try:
                # `completions.create` looks at each token: a second for 65,536, in which no other thread runs.
                body = {"model": self.name, "prompt": prompt.ids, "max_tokens": prompt.room, "temperature": 0}
                given = self.api.post("/completions", body=body, cast_to=Completion)
            except _PASSING as error:
                failed = f"{_named(prompt)} failed: {_reason(error)}"
                if tried == TRIES:
                    raise TaskError(f"{failed}, {TRIES} times.") from error
                self.tell(f"{failed}; asking again.")
                time.sleep(WAIT_SECONDS)
            except openai.OpenAIError as error:
                raise TaskError(f"{self.url} refuses {_named(prompt)}: {_reason(error)}.") from error
            else:
                break
        if given.usage and given.usage.prompt_tokens != len(prompt.ids):
            raise TaskError(
                f"{self.url} counts {given.usage.prompt_tokens} tokens where {_named(prompt)} has {len(prompt.ids)}: "
                f"does it serve the model whose tokenizer was named?"
            )
        text = given.choices[0].text
        return Answer(text, prompt.score(text), len(prompt.ids), tried)

    def close(self) -> None:
        self.api.close()


def _named(prompt: Prompt) -> str:
    return f"sample {prompt.index} of {prompt.task} at {prompt.length} tokens"


def _reason(error: Exception) -> str:
    """In one line, without the full stop."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(said or error).split()).rstrip(".")
