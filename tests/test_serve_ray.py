"""``examples/serve_ray.py`` as a program of its own: two replicas on this machine, asked over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("httpx")
pytest.importorskip("openai")

import httpx
import openai
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from serve_models import llama, make_tokenizer, oracle, save_all
from service.asgi import Head
from service.ingress import Ingress
from starlette.requests import Request

from fastpeft.files import CONFIG, TENSORS

TOKEN = "s3cret"
STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
SCRIPT = Path(__file__).parents[1] / "examples" / "serve_ray.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[..., str]:
    alone, tokenizer = oracle(folders), make_tokenizer()

    def answer(prompt: str, count: int, adapter: str | None) -> str:
        tokens = alone(tokenizer(prompt)["input_ids"], count, adapter)
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return answer


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory) -> Iterator[SimpleNamespace]:
    model = tmp_path_factory.mktemp("model") / "tiny"
    llama().float().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    ours = Path(tempfile.mkdtemp(prefix="ray-"))  # all that Ray writes; its sockets' paths must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, "--replicas", "2", "--port", str(port), "--model", model, "--max-rank", "8"]
    command += [f"--adapter={name}={folders[name]}" for name in ("lora", "mos")] + ["--rows", "4", "--length", "128"]
    env = {**os.environ, "RAY_TMPDIR": str(ours), "TMPDIR": str(ours), "FASTPEFT_TOKEN": TOKEN}
    env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or Ray writes one to the home folder
    with open(ours / "log", "w", encoding="utf-8") as log:
        program = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        wait_for(lambda: program.poll() is not None or "models: tiny" in (ours / "log").read_text("utf-8"), 120)
        assert program.poll() is None, (ours / "log").read_text("utf-8")
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)
        with httpx.Client(base_url=url, timeout=60) as http, client:
            yield SimpleNamespace(http=http, client=client, ours=ours, program=program)
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0, (ours / "log").read_text("utf-8")
        assert processes(ours) == {}
        assert not list(ours.glob("fastpeft-adapters-*"))
    finally:
        program.kill()
        for process in processes(ours):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(ours, ignore_errors=True)


def processes(ours: Path) -> dict[int, str]:
    """Those that Ray has started for this service, and what they call themselves."""
    found = {}
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdigit() and f"RAY_TMPDIR={ours}".encode() in (each / "environ").read_bytes().split(b"\0"):
                found[int(each.name)] = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait_for(true: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def ask(served: SimpleNamespace, model: str, prompt: str = "Hello", count: int = 4) -> tuple[str, str]:
    """The answer, and which replica gave it."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
    response = served.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], response.headers["x-replica"]


def numbers(served: SimpleNamespace, name: str) -> dict[str, float]:
    """A metric, by replica."""
    found = {}
    for line in served.http.get("/metrics").text.splitlines():
        if line.startswith(f'fastpeft_{name}{{replica="'):
            found[line.split('"')[1]] = float(line.rsplit(" ", 1)[1])
    return found


def models(served: SimpleNamespace) -> dict[str, list[str]]:
    """What each replica says that there is."""
    found: dict[str, list[str]] = {}

    def both() -> dict[str, list[str]] | None:
        response = served.http.get("/v1/models")
        found[response.headers["x-replica"]] = [model["id"] for model in response.json()["data"]]
        there = numbers(served, "adapters_registered")  # not one that answered and was replaced since
        return {name: found[name] for name in there} if len(there) == 2 and there.keys() <= found.keys() else None

    return wait_for(both)


def upload(served: SimpleNamespace, name: str, folder: Path, token: str = TOKEN) -> httpx.Response:
    files = {"config": (folder / CONFIG).read_bytes(), "tensors": (folder / TENSORS).read_bytes()}
    headers = {"Authorization": f"Bearer {token}"}
    return served.http.post("/v1/adapters", data={"name": name}, files=files, headers=headers)


def remove(served: SimpleNamespace, name: str, query: str = "") -> httpx.Response:
    return served.http.delete(f"/v1/adapters/{name}{query}", headers={"Authorization": f"Bearer {TOKEN}"})


def test_requests_go_where_their_adapter_is(served, expected):
    assert numbers(served, "adapters_resident") == dict.fromkeys(numbers(served, "adapters_registered"), 0)
    home = {}
    for name in ("lora", "mos"):
        text, home[name] = ask(served, name)
        assert text == expected("Hello", 4, name)
        time.sleep(2)  # until the routers have heard of it
    assert home["lora"] != home["mos"]  # a new one goes to the replica that has the fewest
    for i in range(10):
        for name in home:
            assert ask(served, name, f"Hello {i}") == (expected(f"Hello {i}", 4, name), home[name])
    assert set(numbers(served, "bank_misses_total").values()) == {1}  # each was loaded once, on one replica
    assert set(numbers(served, "adapters_resident").values()) == {1}


def test_both_replicas_answer(served, expected):
    jobs = [("tiny", f"Hello {i}") for i in range(20)] + [(name, "many") for name in ("lora", "mos") * 5]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: ask(served, *job), jobs))
    for (name, prompt), (text, _) in zip(jobs, answers, strict=True):
        assert text == expected(prompt, 4, None if name == "tiny" else name)
    by = Counter(replica for (name, _), (_, replica) in zip(jobs, answers, strict=True) if name == "tiny")
    assert set(by) == set(numbers(served, "engine_requests_total"))


def test_streams(served, expected):
    messages = [{"role": "user", "content": "Hi"}]
    options = {"model": "mos", "messages": messages, "temperature": 0, "max_tokens": 11}
    chunks = list(served.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = expected("u:Hi\na:", 11, "mos")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 11 and len(chunks) > 5
    assert served.client.chat.completions.create(**options).choices[0].message.content == text


def test_a_client_that_goes_away(served):
    body = {"model": "lora", "prompt": "Hello", "max_tokens": 50, "stream": True, "temperature": 1.9}
    before = sum(numbers(served, "engine_cancelled_total").values())

    def cancelled() -> bool:
        with served.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        return sum(numbers(served, "engine_cancelled_total").values()) > before

    wait_for(cancelled)  # a stream may have ended before its client was seen to leave
    wait_for(lambda: set(numbers(served, "requests_running").values()) == {0})


def test_errors(served, folders):
    with pytest.raises(openai.NotFoundError, match="no model is named 'nobody'") as caught:
        served.client.completions.create(model="nobody", prompt="Hello")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        served.client.completions.create(model="lora", prompt="Hello", n=2)
    for content, status in ((b"{", 400), (b'{"model": 1}', 400), (b"[" * 9999, 400), (b" " * (1 << 19), 413)):
        response = served.http.post("/v1/completions", content=content)
        assert response.status_code == status and response.json()["error"]["message"]
    assert served.http.get("/v1/nothing").status_code == 404
    assert served.http.get("/health").json() == {"status": "ok"}
    assert upload(served, "x", folders["boft"], token="wrong").status_code == 401
    assert upload(served, "../x", folders["boft"]).json()["error"]["type"] == "invalid_request_error"
    assert remove(served, "lora", "?even_in_use=false").status_code == 400


def test_adapters_come_and_go_everywhere(served, folders, expected):
    for method in ("boft", "fourierft"):  # the second takes the name of the first
        assert upload(served, "team/alice", folders[method]).status_code == 200
        with ThreadPoolExecutor(8) as pool:
            answers = set(pool.map(lambda i: ask(served, "team/alice", "Hello", 4)[0], range(16)))
        assert answers == {expected("Hello", 4, method)}
    listed = models(served)
    assert all(each[0] == "tiny" and set(each[1:]) == {"lora", "mos", "team/alice"} for each in listed.values())
    assert remove(served, "team/alice").json()["deleted"]
    for _ in range(5):
        with pytest.raises(openai.NotFoundError):
            served.client.completions.create(model="team/alice", prompt="Hello")
    assert all("team/alice" not in each for each in models(served).values())


def test_a_replica_that_dies_comes_back_with_all_adapters(served, folders, expected):
    assert upload(served, "kept", folders["boft"]).status_code == 200
    before = set(models(served))
    replica = next(pid for pid, name in processes(served.ours).items() if name.startswith("ray::ServeReplica") and
                   name.rstrip().endswith("Replica"))  # fmt: skip
    os.kill(replica, signal.SIGKILL)
    body = {"model": "kept", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    for _ in range(5):
        response = served.http.post("/v1/completions", json=body)
        assert response.status_code == 200 or response.json()["error"]["code"] == "replica_lost"
    wait_for(lambda: len(numbers(served, "engine_requests_total")) == 2 and
             set(numbers(served, "engine_requests_total")) != before)  # fmt: skip
    assert all("kept" in each for each in models(served).values())
    assert ask(served, "kept")[0] == expected("Hello", 4, "boft")


def test_shutdown_lets_a_stream_finish(served, expected):
    """The last test: nothing is served afterwards. Eight prompts, four at a time, are enough for some time."""
    prompts = [f"Hello {i}" for i in range(8)]
    body = {"model": "mos", "prompt": prompts, "max_tokens": 100, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        texts = dict.fromkeys(range(8), "")
        for line in lines:
            if line == "data: [DONE]":
                break
            if line:
                if not any(texts.values()):
                    served.program.send_signal(signal.SIGTERM)
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                texts[choice["index"]] += choice["text"]
        else:
            raise AssertionError("the stream has no end")
    for i in (0, 7):
        assert texts[i] == expected(prompts[i], 100, "mos")
    assert served.program.wait(60) == 0


@pytest.mark.parametrize(
    "path, pieces, status, told",
    [
        (
            "/v1/completions",
            [BackPressureError(num_queued_requests=5, max_queued_requests=5)],
            429,
            "rate_limit_exceeded",
        ),
        ("/v1/completions", [RayActorError()], 503, "replica_lost"),
        ("/v1/models", [RuntimeError("secret")], 500, "internal_error"),
        ("/v1/completions", [Head(200, [STREAM]), b"data: 1\n\n", RayActorError()], 200, "replica_lost"),
        ("/v1/completions", [Head(200, [STREAM]), b"data: 1\n\n", b"data: [DONE]\n\n"], 200, "data: 1"),
    ],
)
def test_what_the_ingress_says_of_a_failure(path: str, pieces: list[Any], status: int, told: str):
    async def respond(scope: dict[str, Any], body: bytes):
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def run() -> tuple[int, bytes]:
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(respond=SimpleNamespace(remote=respond)))

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"model": "x"}', "more_body": False}

        http = Request({"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}, receive)
        response = await Ingress(handle, "base", 100, 100)(http)
        if hasattr(response, "body_iterator"):
            return response.status_code, b"".join([piece async for piece in response.body_iterator])
        return response.status_code, response.body

    given, body = asyncio.run(run())
    assert given == status and told.encode() in body and b"secret" not in body
    assert status != 200 or body.endswith(b"data: [DONE]\n\n")
