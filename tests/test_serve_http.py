"""The example that ``make serve`` runs, over a real port, on a small random Llama; and OpenAI's own client with it."""

from __future__ import annotations

import io
import json
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import httpx
import openai
import serve
import torch
from helpers import LORA
from safetensors.torch import load_file, save
from serve_models import CONFIGS, listening, llama, make_tokenizer, oracle, running, save_all
from service.api import Limits, Service
from service.catalog import Catalog
from service.engine import Request

from fastpeft.files import CONFIG, TENSORS

TOKEN = "s3cret"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory) -> Iterator[SimpleNamespace]:
    with running({}, max_rows=4, max_waiting=12) as engine:
        catalog = Catalog(engine.bank, "base", tmp_path_factory.mktemp("uploads"), max_adapters=6)
        for name, folder in folders.items():
            catalog.add(name, folder)
        limits = Limits(body_bytes=4096, upload_bytes=1 << 20, prompts=3, default_tokens=16)
        service = Service(engine, catalog, make_tokenizer(), TOKEN, limits)
        with listening(service) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)
            with httpx.Client(base_url=url, timeout=20) as http, client:
                yield SimpleNamespace(service=service, url=url, client=client, http=http)
    assert not engine.alive


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]):
    """The text of a greedy answer to a prompt."""
    alone, tokenizer = oracle(folders), make_tokenizer()

    def answer(prompt: str, count: int, adapter: str | None) -> str:
        tokens = alone(tokenizer(prompt)["input_ids"], count, adapter)
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return answer


def upload(served: SimpleNamespace, name: str, config: bytes, tensors: bytes, token: str | None = TOKEN):
    return served.http.post(
        "/v1/adapters",
        data={"name": name},
        files={"config": ("../../config", config), "tensors": ("/etc/passwd", tensors)},
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
    )


def remove(served: SimpleNamespace, name: str, token: str = TOKEN):
    return served.http.delete(f"/v1/adapters/{name}", headers={"Authorization": f"Bearer {token}"})


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_models(served):
    assert [model.id for model in served.client.models.list()] == ["base", *CONFIGS]
    assert served.client.models.retrieve("mos").model_extra == {"parent": "base"}
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("nobody")


def test_completions_of_many_clients_at_once(served, expected):
    jobs = [(name, f"Hello {i}, {'how are you? ' * (i % 3)}", 3 + i) for i, name in enumerate(["base", *CONFIGS] * 2)]

    def ask(job: tuple[str, str, int]):
        name, prompt, count = job
        return served.client.completions.create(model=name, prompt=prompt, max_tokens=count, temperature=0)

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    for (name, prompt, count), answer in zip(jobs, answers, strict=True):
        assert answer.choices[0].text == expected(prompt, count, None if name == "base" else name)
        assert answer.model == name and answer.usage.prompt_tokens == len(prompt)


def test_completions_of_several_prompts_and_of_tokens(served, expected):
    tokens = make_tokenizer()("second")["input_ids"]
    answer = served.client.completions.create(model="lora", prompt=["first", "2nd"], max_tokens=5, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [expected(prompt, 5, "lora") for prompt in ("first", "2nd")]
    answer = served.client.completions.create(model="lora", prompt=tokens, max_tokens=5, temperature=0)
    assert answer.choices[0].text == expected("second", 5, "lora")


def test_chat_whole_and_streamed(served, expected):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    whole = served.client.chat.completions.create(model="boft", messages=messages, temperature=0, max_tokens=11)
    text = expected("s:Be brief.\nu:Hi\na:", 11, "boft")
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "length"
    chunks = list(
        served.client.chat.completions.create(
            model="boft", messages=messages, temperature=0, max_completion_tokens=11, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 11
    assert len(chunks) > 5


def test_seeds_and_stop_strings(served, expected):
    def ask(**options: Any) -> str:
        return served.client.completions.create(model="mos", prompt="Once", max_tokens=12, **options).choices[0].text

    assert ask(seed=5, top_p=0.9) == ask(seed=5, top_p=0.9) != ask(seed=6, top_p=0.9)
    whole = expected("Once", 12, "mos")
    stop = next(letter for letter in whole[3:] if letter not in whole[:3] and letter != "\ufffd")
    assert ask(temperature=0, stop=[stop, "never"]) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": ""}, "at least 1 token"),
        ({"prompt": "x" * 70}, "at most 64 together"),
        ({"max_tokens": 100}, "at most 64 together"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"made_up": True}, "made_up is not supported"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"prompt": ["a"] * 4}, "3 prompts"),
        ({"prompt": [5, 300]}, "vocabulary of 300"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_requests_that_are_wrong(served, change: dict[str, Any], message: str):
    body = {"model": "lora", "prompt": "Hello", "max_tokens": 4, **change}
    assert message in error_of(served.http.post("/v1/completions", json=body), 400)["message"]


def test_what_is_not_there(served):
    with pytest.raises(openai.NotFoundError, match="no model is named 'nobody'") as caught:
        served.client.completions.create(model="nobody", prompt="Hello")
    assert caught.value.code == "model_not_found"
    error_of(served.http.get("/v1/nothing"), 404)
    error_of(served.http.get("/v1/completions"), 405)
    error_of(served.http.post("/v1/completions", content=b"{"), 400)
    error_of(served.http.post("/v1/completions", content=b'{"model": "lora", "prompt": "' + b"x" * 5000), 413)
    error_of(served.http.post("/v1/completions", content=(b"x" * 1000 for _ in range(9))), 413)


def test_too_many_requests(served):
    """Those that came before go on; when they have ended there is room again."""

    def ask(_: int) -> int:
        body = {"model": "lora", "prompt": "Hello", "max_tokens": 50}
        return served.http.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(ask, range(40)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 12
    assert ask(0) == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(served, stream: bool):
    engine = served.service.engine
    cancelled = engine.counts["cancelled"]
    hold = threading.Event()
    whole = engine._step

    def slowly(running: list[Request]) -> None:
        hold.wait(0.05)
        whole(running)

    engine._step = slowly
    try:
        body = {"model": "lora", "prompt": "Hello", "max_tokens": 58, "stream": stream, "temperature": 0}
        with httpx.Client(base_url=served.url, timeout=0.3) as http:
            if stream:
                with http.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json=body)
        deadline = time.monotonic() + 10
        while engine.counts["cancelled"] == cancelled:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        hold.set()
        del engine._step
    assert served.http.post("/v1/completions", json={**body, "max_tokens": 2, "stream": False}).status_code == 200


def test_an_adapter_comes_and_goes(served, folders, expected):
    files = [(folders["fourierft"] / name).read_bytes() for name in (CONFIG, TENSORS)]
    created = upload(served, "team/alice-1.5", *files)
    assert created.status_code == 200 and created.json()["id"] == "team/alice-1.5"
    answer = served.client.completions.create(model="team/alice-1.5", prompt="Hey", max_tokens=9, temperature=0)
    assert answer.choices[0].text == expected("Hey", 9, "fourierft")
    assert remove(served, "team/alice-1.5").json()["deleted"] is True
    error_of(remove(served, "team/alice-1.5"), 404)
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="team/alice-1.5", prompt="Hey")
    error_of(remove(served, "base"), 400)


def test_who_may(served, folders):
    files = [(folders["lora"] / name).read_bytes() for name in (CONFIG, TENSORS)]
    assert error_of(upload(served, "x", *files, token=None), 401)["code"] == "invalid_token"
    error_of(upload(served, "x", *files, token="guess"), 401)
    error_of(remove(served, "lora", token="guess"), 401)
    served.service._token, token = None, served.service._token
    try:
        error_of(upload(served, "x", *files), 403)
    finally:
        served.service._token = token


def hostile(folders: dict[str, Path], case: str) -> tuple[str, bytes, bytes]:
    """The name and the files of an upload that must be refused."""
    folder = folders["mos" if "index" in case else "lora"]
    config, tensors = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
    state = load_file(folder / TENSORS)
    first = next(key for key, tensor in state.items() if tensor.is_floating_point() or "index" in case)

    def changed(**changes: Any) -> bytes:
        return json.dumps({**json.loads(config), **changes}).encode()

    def of_rank(rank: int, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros([rank if size == LORA.config().r else size for size in tensor.shape])

    files = {
        "pickle": (config, pickle.dumps({"a": 1})),
        "not JSON": (b"\x80\x04.", tensors),
        "deep JSON": (b"[" * 100_000, tensors),
        "no adapter": (b"{}", tensors),
        "empty": (config, b""),
        "truncated": (config, tensors[:-5]),
        "huge header": (config, (1 << 60).to_bytes(8, "little") + tensors[8:]),
        "NaN": (config, save({**state, first: torch.full_like(state[first].double(), float("nan"))})),
        "an index out of range": (config, save({**state, first: state[first] + (1 << 40)})),
        "another base": (config, save({key: torch.zeros(7, 7) for key in state})),
        "missing tensors": (config, save({first: state[first]})),
        "rank over the limit": (changed(r=9), save({key: of_rank(9, tensor) for key, tensor in state.items()})),
        "no target": (changed(target_modules=["nothing"]), tensors),
        "hostile pattern": (changed(target_modules="(a+)+$"), tensors),
        "too large": (config, bytes(1 << 20)),
    }
    names = {
        "path": "../../etc",
        "absolute path": "/etc/passwd",
        "odd name": "a\nb",
        "long name": "x" * 201,
        "no name": "",
        "the base's name": "base",
    }
    return names.get(case, "x"), *files.get(case, (config, tensors))


HOSTILE = {
    "pickle": "not a safetensors file",
    "not JSON": "not JSON",
    "deep JSON": "not JSON",
    "no adapter": "peft_type must be one of",
    "empty": "not a safetensors file",
    "truncated": "is truncated",
    "huge header": "is truncated",
    "NaN": "not finite",
    "an index out of range": "index_A must hold shard numbers",
    "another base": "does not fit the bank's layers",
    "missing tensors": "is missing",
    "rank over the limit": "has rank 9, and the bank's max_rank is 8",
    "no target": "matches no layer",
    "hostile pattern": "regular expression",
    "too large": "1048576 bytes",
    "path": "name must be",
    "absolute path": "name must be",
    "odd name": "name must be",
    "long name": "at most 200 characters",
    "no name": "name must be",
    "the base's name": "is the base model's",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_uploads_that_are_refused(served, folders, case: str):
    """An error to that request, no trace of a path of the server's, and everything as it was."""
    catalog = served.service.catalog
    before = served.http.get("/v1/models").json(), catalog.bank.names(), list(catalog._uploads.iterdir())
    answer = upload(served, *hostile(folders, case))
    message = error_of(answer, 413 if case == "too large" else 400)["message"]
    assert HOSTILE[case] in message
    assert str(catalog._uploads) not in message and "@" not in message.replace("_.:@+-", "")
    assert before == (served.http.get("/v1/models").json(), catalog.bank.names(), list(catalog._uploads.iterdir()))


def test_uploads_of_another_form(served):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    error_of(served.http.post("/v1/adapters", json={"name": "x"}, headers=headers), 400)
    error_of(served.http.post("/v1/adapters", data={"name": "x", "config": "{}"}, headers=headers), 400)
    many = [("tensors", (f"{i}", io.BytesIO(b"x"))) for i in range(5)]
    error_of(served.http.post("/v1/adapters", data={"name": "x"}, files=many, headers=headers), 400)


def test_one_too_many(served, folders):
    files = [(folders["lora"] / name).read_bytes() for name in (CONFIG, TENSORS)]
    for name in ("one", "two"):
        assert upload(served, name, *files).status_code == 200
    assert error_of(upload(served, "three", *files), 409)["code"] == "too_many_adapters"
    assert upload(served, "two", *files).status_code == 200  # in place of another one
    for name in ("one", "two"):
        remove(served, name)


def test_health_and_metrics(served):
    assert served.http.get("/health").json() == {"status": "ok"}
    served.http.post("/v1/completions", json={"model": "base", "prompt": "Hello", "max_tokens": 2}).raise_for_status()
    page = served.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["fastpeft_engine_tokens_total"]) > 0 and float(values["fastpeft_adapters_registered"]) >= 4
    assert float(values['fastpeft_first_token_seconds_bucket{le="+Inf"}']) == float(
        values["fastpeft_first_token_seconds_count"]
    )
    assert 'fastpeft_http_responses_total{endpoint="/health",status="200"}' in values
    assert len(values) == len([line for line in lines if not line.startswith("#")])


def test_shutdown_lets_a_stream_finish(folders, expected, tmp_path: Path):
    with running({}) as engine:
        catalog = Catalog(engine.bank, "base", tmp_path)
        service = Service(engine, catalog, make_tokenizer(), None, Limits(shutdown_seconds=5))
        server = listening(service)
        url = server.__enter__()
        body = {"model": "base", "prompt": "Hello", "max_tokens": 50, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            first = next(lines)
            closing = threading.Thread(target=server.__exit__, args=(None, None, None))
            closing.start()
            rest = [line for line in lines if line]
            closing.join()
        assert rest[-1] == "data: [DONE]" and not engine.alive
        chunks = [json.loads(line.removeprefix("data: ")) for line in [first, *rest[:-1]]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected("Hello", 50, None)


def test_from_the_command_line(folders, tmp_path: Path, monkeypatch):
    """The program's own parts, put together as it does, on a model in a folder."""
    llama().float().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv(serve.TOKEN, TOKEN)
    options = serve.parse(["--model", str(tmp_path / "tiny"), "--adapter", f"a={folders['mos']}", "--max-rank", "8"])
    service = serve.make_service(options, tmp_path / "uploads")
    with listening(service) as url, httpx.Client(base_url=url, timeout=20) as http:
        for name in ("tiny", "a"):
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] <= 3
        assert http.delete("/v1/adapters/a", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    with pytest.raises(SystemExit):
        serve.parse(["--adapter", "a=nowhere"])
    with pytest.raises(SystemExit):
        serve.parse(["--rows", "8", "--max-resident", "4"])
