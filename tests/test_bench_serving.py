"""bench/serving.py on tiny layers and models: all that it measures, and that what is wrong gets no figures."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import serving
import serving_http
import serving_layers
import tax

from fastpeft.serving import AdapterBank

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hurried(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(tax, "PAIR_SECONDS", 0.0)
    monkeypatch.setattr(tax, "ROUNDS", 3)
    monkeypatch.setattr(serving_layers, "BANK_BYTES", 1 << 25)
    monkeypatch.setattr(serving_http, "LOADS", 3)
    monkeypatch.setattr(serving_http, "ROUNDS", 3)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7}
    monkeypatch.setattr(serving_http, "RANDOM", {**serving_http.RANDOM, **small})
    monkeypatch.setattr(serving.warnings, "filterwarnings", lambda *_, **__: None)
    monkeypatch.setattr(serving.logging, "disable", lambda *_: None)


COMMAND = ["--sizes", "128x64", "--rows", "4", "6", "--adapters", "1", "4", "--tokens", "1", "3", "--threads", "1"]


def run(out: Path, *arguments: str) -> tuple[int, dict, str]:
    code = serving.main([*arguments, "--out", str(out)])
    table = (out / "serving.md").read_text(encoding="utf-8")
    return code, json.loads((out / "serving.json").read_text()), table


def test_layers_and_registered(tmp_path: Path, hurried):
    given = [*COMMAND, "--no-peft", "--registered", "10", "40", "--resident", "20"]
    code, record, table = run(tmp_path, "layers", "registered", *given)
    assert code == 0, table
    titles = ["LoRA r8", "LoRA r16", "MoS r8 e2 l4 p1", "BOFT b4 m2", "BOFT b8 m4", "FourierFT n1000"]
    titles += ["all four", "all four, smaller"]
    cells = record["layers"]
    assert list(dict.fromkeys(cell["method"] for cell in cells)) == titles
    # Four or six rows, one or four adapters, one or three tokens; one adapter is no mix.
    assert len(cells) == len(titles) * 2 * 2 * 2 - 2 * 4
    for cell in cells:
        assert 0 < cell["error"] <= cell["limit"] and cell["rounds"] == 3
        assert min(cell["base"], cell["layer"], cell["route"]) > 0 and cell["peft"] is None
    lora = [cell for cell in cells if cell["method"] == "LoRA r16" and cell["adapters"] == 4]
    assert lora[0]["bytes"] == pytest.approx(4 * 16 * (128 + 64) / (128 * 64))
    assert "| 128→64 | 1 | 6 | 4 | all four |" in table
    assert "| MoS r8 e2 l4 p1 | 128→64 | 3 | 1 to 4 | 6 | × " in table and "| 4 to 6 | 4 | × " in table

    few, many = record["registered"]
    assert (few["registered"], few["resident"], many["registered"], many["resident"]) == (10, 10, 40, 20)
    assert few["same"] and many["same"] and min(few["layer"], many["route"], many["base"]) > 0
    assert "| 128→64 | 40 | 20 |" in table and "WRONG" not in table
    if (tmp_path / "serving.png").exists():
        assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_peft_stands_beside(tmp_path: Path, hurried):
    pytest.importorskip("peft")
    methods = ["lora-r8", "boft-b4m2", "fourierft", "mos"]
    code, record, table = run(tmp_path, "layers", *COMMAND, "--methods", *methods)
    assert code == 0, table
    for cell in record["layers"]:
        # LoRA is in every cell; what PEFT switches is so at the smallest T and the fewest rows alone.
        first = (cell["tokens"], cell["rows"]) == (1, 4)
        has = cell["method"] == "LoRA r8" or (first and not cell["method"].startswith("MoS"))
        assert (cell["peft"] is not None) == has
        assert not has or (cell["peft_error"] <= cell["limit"] and cell["peft_rounds"] == 3)
    assert "PEFT: LoRA with adapter_names=" in table


def test_a_wrong_batch_gets_no_figures(tmp_path: Path, monkeypatch, hurried):
    honest = AdapterBank.load

    def confused(self, name: str, folder: Path) -> None:
        honest(self, name, folder.with_name("lora-r8-0"))

    monkeypatch.setattr(AdapterBank, "load", confused)
    code, record, table = run(tmp_path, "layers", *COMMAND, "--methods", "lora-r8", "--no-peft")
    assert code == 1
    assert "| 128→64 | 1 | 4 | 4 | LoRA r8 | 0.750 | wrong | wrong | – | – |" in table
    assert "WRONG: LoRA r8, 4 rows, 4 adapters" in table and "4 rows, 1 adapters" not in table
    assert all((cell["layer"] is None) == (cell["adapters"] == 4) for cell in record["layers"])


SERVICE = ["--model", "random", "--clients", "1", "5", "--answer", "4", "--threads", "1"]


def test_loads_and_service(tmp_path: Path, hurried):
    code, record, table = run(tmp_path, "loads", "service", *SERVICE)
    assert code == 0, table
    loads = {row["method"]: row for row in record["loads"]}
    assert len(loads) == 6
    for row in loads.values():
        assert row["load"] >= row["least"] > 0 and row["file_bytes"] > 0 and row["register"] > 0
    assert loads["LoRA r16"]["bytes"] == loads["LoRA r16"]["expanded_bytes"]
    assert loads["MoS r8 e2 l4 p1"]["bytes"] < loads["MoS r8 e2 l4 p1"]["expanded_bytes"]
    alone, together = record["service"]
    assert (alone["clients"], together["clients"]) == (1, 5) and not together["wrong"]
    for row in (alone, together):
        assert row["rounds"] == 3 and min(row["tokens_per_second"], row["base_tokens_per_second"]) > 0
        assert min(row["first"], row["base_first"]) > 0
    assert f"| 5 | {together['base_tokens_per_second']:.1f} |" in table


def test_wrong_answers_get_no_figures(tmp_path: Path, monkeypatch, hurried):
    @contextlib.contextmanager
    def nobody(*_):
        yield 0

    async def ask(port: int, model: str, prompt: list[int], tokens: int) -> serving_http.Reply:
        return serving_http.Reply(0.1, tokens, "what nobody asked for")

    monkeypatch.setattr(serving_http, "service", nobody)
    monkeypatch.setattr(serving_http, "ask", ask)
    code, record, table = run(tmp_path, "service", *SERVICE)
    assert code == 1 and "| 1 | wrong |" in table and "WRONG: 1 clients: random: 'what nobody asked for'" in table
    assert record["service"][0]["rounds"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["everything"], "parts are layers, registered, loads, service, got everything"),
        (["--methods", "oft"], "a bank serves no OFT"),
        (["--rows", "4", "--adapters", "8"], "at most one of --rows"),
        (["--registered", "5"], "at least 10"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        serving.parse(arguments)
    assert message in capsys.readouterr().err


def test_grids():
    shapes = serving.parse([]).shapes
    assert (1, 128, 128) in shapes and (16, 32, 32) in shapes and (16, 128, 128) not in shapes
    assert (16, 128, 128) in serving.parse(["--full"]).shapes
    assert serving.parse(["--full"]).clients == [1, 2, 4, 8, 16, 32]
    assert serving.parse(["--quick", "--clients", "2"]).clients == [2]
