"""A judge behind an address, in the place of a QwenVL: any server that speaks OpenAI's protocol.

    python sample.py --v 7 --a 3 --rounds 3 --judge http://localhost:8000/v1
    python train_gen.py --judge http://localhost:8000/v1#name-of-the-model

vLLM, SGLang and `transformers serve` are such servers. The name of the model stands behind #;
without one it is the first that the server lists. A server that wants a key gets the one in the
environment variable OPENAI_API_KEY. A picture is sent within its message, as a PNG, and the server
scales it as its own settings say. Only texts come back: an answer that was cut off, or is none, is
an unreadable one, as with a judge of this process.

This is urllib and not huggingface_hub's InferenceClient, which sends the user's hub token to an
address that is given no key, and none of whose requests leave where HF_HUB_OFFLINE is set.
"""

import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import HTTPError

from parts.chat import parts_of
from parts.cli import UserError, plain_text
from parts.files import data_url, png, to_rgb

AT_ONCE = 16  # requests; a server puts them into one batch
TRIES = 5  # of a request
WAIT = 1.0  # seconds before the second try, and twice as long before each further one
PATIENCE = 300.0  # seconds in which nothing comes back
BUSY = (408, 429)  # errors of a request that are not its fault: too slow, too many
# what a connection raises, and what the reading of an answer in another form does
ERRORS = (OSError, HTTPException, ValueError, TypeError, LookupError, AttributeError)


def is_address(source):
    return str(source).startswith(("http://", "https://"))


@dataclass(frozen=True)
class Answer:
    """What is left of a qwen_vl.Completion."""
    text: str


class JudgeServer:
    """Answers conversations like a QwenVL. address: http://host:port/v1, or with #model."""

    def __init__(self, address):
        url, _, self.model = address.partition("#")
        self.url = url.rstrip("/")
        self.lost = None  # why the server is given up
        if not self.model:
            models = self.insist("models", lambda reply: [each["id"] for each in reply["data"]])
            if not models:
                raise UserError(f"{self.url} lists no model; give the name of one, as in "
                                f"{self.url}#name")
            self.model = models[0]

    def generate(self, messages, n=1, max_new_tokens=512, temperature=1.0, generator=None,
                 progress=iter):
        """n answers to each of P conversations -> list of P lists of n Answer, see QwenVL.generate.

        temperature 0 takes the likeliest tokens. generator: one, or one for each conversation; the
        seed is sent, and whether the answers then are the same again is for the server to say.
        Raises UserError.
        """
        self.lost = None
        generators = generator if isinstance(generator, list) else [generator] * len(messages)
        requests = []
        for conversation, own in zip(messages, generators, strict=True):
            seed = 0 if own is None else own.initial_seed()
            sent = {
                "model": self.model, "messages": [as_sent(message) for message in conversation],
                "max_tokens": max_new_tokens, "temperature": temperature,
                "top_p": 1.0}  # else a server may have a default of its own
            # n requests, as not every server gives several answers to one
            seeds = [{"seed": seed * 10_000 + i} if temperature else {} for i in range(n)]
            requests += [sent | chosen for chosen in seeds]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(self.insist, "chat/completions", text_of, sent)
                       for sent in requests]
            try:
                answers = [Answer(future.result()) for future in progress(futures)]
            except BaseException:  # Ctrl-C, too: no thread shall ask again
                self.lost = self.lost or "stopped"
                raise
            finally:  # after an error or Ctrl-C no further request is begun
                pool.shutdown(cancel_futures=True)
        return [answers[i:i + n] for i in range(0, len(answers), n)]

    @property
    def processor(self):
        """What a reading of probabilities asks of a QwenVL first."""
        raise UserError(f"{self.url} gives answers but no probabilities of tokens; take --readings "
                        f"1 or more of its answers, or give a folder or hub id as --judge")

    def insist(self, path, read, content=None):
        """read(reply) of a request, which is made again while the server fails. Raises UserError.

        content: of a POST; without it a GET. read: takes the JSON of the reply.
        """
        for attempt in range(TRIES):
            time.sleep(WAIT * 2 ** (attempt - 1) if attempt else 0)
            if self.lost:  # another thread has waited long enough
                break
            try:
                return read(self.request(path, content))
            except ERRORS as error:
                reason = reason_of(error)
                status = error.code if isinstance(error, HTTPError) else 500
            if status < 500 and status not in BUSY:  # the same request would fail again
                self.lost = (f"{self.url} refuses /{path} for model {self.model!r} ({reason}); "
                             f"check the address, the model behind # and OPENAI_API_KEY")
                break
        else:
            self.lost = (f"{self.url} does not answer ({reason}): start it, then the same command "
                         f"goes on")
        raise UserError(self.lost)

    def request(self, path, content):
        """The JSON of one reply."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if content is None else json.dumps(content).encode()
        asked = urllib.request.Request(f"{self.url}/{path}", data, headers)
        with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
            return json.loads(reply.read())


def as_sent(message):
    """A message of parts/chat.py in the form of the protocol."""
    parts = []
    for part in parts_of(message):
        if part["type"] == "image":
            url = data_url(png(to_rgb(part["image"])))
            part = {"type": "image_url", "image_url": {"url": url}}
        parts.append(part)
    return {"role": message["role"], "content": parts}


def text_of(reply):
    """The text of a reply, "" if it has none, which nobody can read as an answer."""
    message = reply["choices"][0]["message"]
    text = message.get("content")
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(text, str):
        return ""
    # Servers take the thought out of an answer, but without it the answer has not the form asked
    # for, and a reader as strict as that of rewards would refuse it.
    return f"<think>{thought}</think>{text}" if isinstance(thought, str) else text


def reason_of(error):
    """A short line about an error of a request."""
    if isinstance(error, HTTPError):
        said = plain_text(error.read(1000).decode("utf-8", "replace"))
        return f"{error.code} {error.reason}: {said[:200]}".removesuffix(": ")
    if isinstance(error, (OSError, HTTPException)):
        return plain_text(str(getattr(error, "reason", error)))[:200] or type(error).__name__
    return "its reply is not in the form of the protocol"
