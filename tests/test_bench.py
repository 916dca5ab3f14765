"""bench/tax.py on tiny layers: what it writes, what it refuses to time, how it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import reference

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import calls  # noqa: E402
import floors  # noqa: E402
import floors_cuda  # noqa: E402
import gpu  # noqa: E402
import layers  # noqa: E402
import tables  # noqa: E402
import tax  # noqa: E402
import test_operators  # noqa: E402
import whole_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(tax, "PAIR_SECONDS", 0.0)
    monkeypatch.setattr(tax, "ROUNDS", 3)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCH / "tax.py"), *arguments], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def test_command(tmp_path: Path):
    as_json, markdown = tmp_path / "tax.json", tmp_path / "tax.md"
    files = ("--json", str(as_json), "--markdown", str(markdown))
    grid = ("--methods", "lora-r8", "--sizes", "32x32", "--tokens", "2", "--threads", "1")
    done = run(*grid, "--no-peft", "--memory", *files)
    assert done.returncode == 0, done.stderr
    assert not done.stderr

    record = json.loads(as_json.read_text())
    assert record["settings"]["sizes"] == [[32, 32]] and record["settings"]["threads"] == 1
    (row,) = record["rows"]
    assert (row["method"], row["library"], row["dtype"]) == ("LoRA r8", "fastpeft", "float32")
    assert (row["in_features"], row["out_features"], row["tokens"]) == (32, 32, 2)
    assert 0 < row["error"] <= row["limit"] < 1e-5
    for phase in tables.PHASES:
        assert row[f"{phase}_rounds"] >= 15
        assert row[f"{phase}_tax"] == row[phase] / row[f"base_{phase}"] > 0
    # Gradients of A and B are alive at the end of a step: 2 · 8 · 32 numbers of four bytes.
    assert row["bytes"] - row["base_bytes"] >= 2 * 8 * 32 * 4
    (entry,) = record["summary"]
    assert entry["forward_tax"]["worst"] == row["forward_tax"] and entry["forward_peft_over_ours"] is None

    assert markdown.read_text(encoding="utf-8") == done.stdout
    assert f"| 32→32 | 2 | LoRA r8 | {row['forward_tax']:.2f} | {row['training_tax']:.2f} | – | – |" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "lorra"], "expected lora, boft or one of lora-r8"),
        (["--sizes", "32"], "expected INxOUT"),
        (["--sizes", "0x32"], "sizes must be positive"),
        (["--tokens", "0"], "expected a positive number"),
        (["--quick", "--full"], "not allowed with"),
        (["--chart", "x.png", "--chart-axis", "size", "--sizes", "32x64"], "needs a square layer"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        tax.parse(arguments)
    assert message in capsys.readouterr().err


def test_grids_and_families():
    full = tax.parse(["--full"])
    assert (full.methods, full.tokens) == (list(layers.METHODS), [1, 16, 128, 512])
    assert len(full.sizes) == 7 and (4096, 11008) in full.sizes
    chosen = tax.parse(["--quick", "--methods", "boft", "lora-r8", "boft-b4m2"])
    assert (chosen.methods, chosen.sizes) == (["boft-b4m2", "boft-b8m4", "lora-r8"], [(768, 768)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", layers.METHODS)
def test_every_method_is_right_and_seen_by_the_check(name: str, dtype: torch.dtype, hurried):
    (row,) = tax.measure(name, (128, 64), [5], dtype, None, memory=False)
    assert row.right and row.forward_tax and row.training_tax

    base = torch.nn.Linear(128, 64, dtype=dtype).requires_grad_(False)
    _, exact = layers.build_fastpeft(name, base)
    x, grad = torch.randn(5, 128).to(dtype), torch.randn(5, 64).to(dtype)
    assert layers.output_error(base, x, grad, range(5), exact(x, grad)) > 5 * row.limit


@pytest.mark.parametrize("name", ["lora-r8", "boft-b8m4", "fourierft"])
def test_peft_stands_beside(name: str, hurried):
    peft = pytest.importorskip("peft")
    ours, theirs = tax.measure(name, (64, 64), [5], torch.float32, peft, memory=False)
    assert (ours.library, theirs.library) == ("fastpeft", "peft")
    assert ours.right and theirs.right and theirs.forward_tax and theirs.training_tax
    remarks = "\n".join(tables.notes([ours, theirs], peft, memory=False))
    assert ("m = 1" in remarks) == (name == "boft-b8m4")


def test_a_wrong_layer_gets_no_figures(monkeypatch, capsys, hurried):
    honest = layers.build_fastpeft

    def spoiled(name, base):
        layer, exact = honest(name, base)
        with torch.no_grad():
            layer.adapters["default"].lora_B.mul_(1.001)
        return layer, exact

    monkeypatch.setattr(tax, "build_fastpeft", spoiled)
    command = ["--methods", "lora-r8", "--sizes", "32x32", "--tokens", "2", "--no-peft", "--threads", "1"]
    monkeypatch.setattr(tax.warnings, "filterwarnings", lambda *_: None)
    monkeypatch.setattr(tax.logging, "disable", lambda *_: None)
    assert tax.main(command) == 1
    printed = capsys.readouterr().out
    assert "| 32→32 | 2 | LoRA r8 | wrong | wrong | – |" in printed and "WRONG: fastpeft LoRA r8" in printed


@pytest.mark.parametrize("b, m", [(2, 3), (4, 2), (8, 4)])
def test_blockwise_rotation_is_the_formula(b: int, m: int):
    blocks = torch.randn(m, 64 // b, b, b, dtype=torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(layers.rotate(x, blocks), reference.boft.butterfly(x, blocks), rtol=0, atol=1e-9)


def test_pairs_take_turns():
    seen = []

    def call(name: str, seconds: float):
        return lambda: seen.append(name) or seconds

    assert tax.in_turn(call("a", 1.0), call("b", 2.0)) == (1.0, 2.0, tax.ROUNDS)
    assert seen == ["a", "b"] * (tax.ROUNDS + tax.WARM_UP)
    assert tax.in_turn(call("a", 1e-6), call("b", 1e-6))[2] == tax.MOST_ROUNDS
    assert tax.in_turn(call("a", 1.0), call("b", 2.0), patience=-1.0) == (1.0, 2.0, 3)


def made_up(library: str, d: int, tokens: int, extra: float) -> tables.Row:
    return tables.Row(
        "LoRA r8", library, "float32", d, d, tokens, error=0.0, limit=1.0,
        forward=1 + extra, base_forward=1.0, training=2 * (1 + extra), base_training=2.0,
    )  # fmt: skip


ROWS = [
    made_up(library, d, tokens, extra=part * d * tokens)
    for library, part in (("fastpeft", 1e-3), ("peft", 1e-2))
    for d in (16, 64)
    for tokens in (1, 8)
]


def test_the_price_of_calls(capsys, hurried):
    assert calls.main(["--sizes", "16x24", "--tokens", "2", "--threads", "1"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| 16→24 | 2 | ")
    base = torch.nn.Linear(16, 24).requires_grad_(False)
    layer, x = calls.NothingLinear(base), torch.randn(3, 16, requires_grad=True)
    y, grad = layer(x), torch.randn(3, 24)
    y.backward(grad)
    assert torch.equal(y, base(x)) and torch.equal(x.grad, grad @ base.weight)
    assert layer.A.grad.shape == layer.A.shape and layer.B.grad.shape == layer.B.shape


def test_summary_and_growth():
    (entry,) = tables.summarise(ROWS)
    taxes = [1.016, 1.128, 1.064, 1.512]
    assert entry["forward_tax"]["mean"] == pytest.approx((taxes[0] * taxes[1] * taxes[2] * taxes[3]) ** 0.25)
    assert entry["training_tax"]["worst"] == pytest.approx(1.512) and entry["training_tax"]["cell"] == "64→64, T 8"
    assert entry["forward_peft_over_ours"]["worst"] == pytest.approx(1.16 / 1.016)
    assert entry["forward_peft_over_ours"]["cell"] == "16→16, T 1"
    ours, theirs = tables.growth(ROWS)[2:]
    assert ours == "| LoRA r8 | float32 | fastpeft | × 2.0 | × 2.0 | × 2.0 | × 2.0 |"
    assert theirs == ours.replace("fastpeft", "peft")


@pytest.mark.parametrize("axis", ["tokens", "size"])
def test_chart(axis: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    tables.chart(ROWS, str(tmp_path / "tax.png"), axis)
    assert (tmp_path / "tax.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- bench/test_operators.py


@pytest.mark.parametrize("name", test_operators.NAMES)
def test_what_is_timed_of_operators_runs(name: str):
    assert set(test_operators.NAMES) == set(test_operators.calls(256, 3))
    test_operators.calls(256, 3)[name]()


# ---------------------------------------------------------------------- bench/gpu.py


def test_the_gpu_bench_on_a_cpu(tmp_path: Path, capsys, monkeypatch):
    """Everything but graphs, events and the compiler."""
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda layer: layer)
    path = tmp_path / "gpu.md"
    given = ["--device", "cpu", "--widths", "32", "--tokens", "3", "--methods", "lora-r8", "--markdown", str(path)]
    assert gpu.main([*given, "--no-peft"]) == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[3] for line in lines[2:7]] == [
        "fastpeft", "fastpeft, CUDA C++", "fastpeft, Triton", "fastpeft, composed", "formula, compiled"
    ]  # fmt: skip
    assert all(float(line.split(" | ")[4]) > 0 for line in lines[2:7])
    assert lines[8].startswith("## Which lane was chosen: ")
    assert [line.split(" | ")[3:5] for line in lines[12:14]] == [["forward", "CUDA C++"], ["training", "CUDA C++"]]
    assert gpu.main([*given, "--seconds", "1", "--widths", *["16"] * 50, "--no-peft"]) == 0
    assert "not reached: lora-r8 at 16→16" in capsys.readouterr().out


def test_the_choice_of_a_lane():
    """Only where another one is faster by more than what is noise; lanes that the method does not have have no tax."""

    def row(backend: str | None, forward: float, training: float, lanes: str) -> gpu.Row:
        contender = f"fastpeft, {gpu.LANES[backend]}" if backend else "fastpeft"
        taxes = {"forward": gpu.Tax(forward, True, lanes), "training": gpu.Tax(training, False, lanes)}
        return gpu.Row("boft-b8m4", contender, backend, 16, 24, 3, 0.0, 1.0, taxes)

    rows = [
        row(None, 1.10, 1.21, "CUDA C++"),
        row("native", 1.09, 1.20, "CUDA C++"),
        row("triton", 1.08, 1.1, "Triton"),
    ]
    title, _, _, _, forward, training = gpu.choices(rows)
    assert title.endswith("1 to change in fastpeft/ops/")
    assert forward == "| 16→24 | 3 | BOFT b8 m4 | forward | CUDA C++ | 1.09 | 1.08 | – | – |"
    assert training == "| 16→24 | 3 | BOFT b8 m4 | training | CUDA C++ | 1.20* | 1.10* | – | **Triton** × 1.10 |"
    assert gpu.choices(rows[:2])[0].endswith("the fastest everywhere")


def test_the_gpu_bench_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_what_make_gpu_lacks():
    """All of it at once: with packages that cannot be seen, each of them; else what of CUDA is not there."""
    ready = str(BENCH.parent / "tests" / "gpu_ready.py")
    blind = subprocess.run([sys.executable, "-S", ready], capture_output=True, text=True)
    wanted = ("pip", "pytest>=8", "setuptools>=77", "torch>=2.10", "pybind11>=2.13", "ninja", "triton>=3.4")
    assert blind.returncode == 1 and set(wanted) <= set(blind.stderr.split())
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, ready], capture_output=True, text=True)
        assert done.returncode == 1 and "a CUDA" in done.stderr and "pytest" not in done.stderr


def test_floors():
    """Of the frozen product by hand; no kernel without its operations, and none that launches."""
    assert floors.frozen((4096, 4096), 1, False).seconds == pytest.approx(2 * (4096**2 + 3 * 4096) / 4.3e12)
    assert floors.frozen((4096, 4096), 2048, False).operations == 2 * 2048 * 4096**2
    assert floors.frozen((4096, 4096), 2048, True).operations == 2 * 2 * 2048 * 4096**2
    for name in floors.TARGETS:
        for tokens in (1, 16, 4096):
            for training in (False, True):
                case = (768, 3072), tokens, training
                base, ours = floors.frozen(*case), floors.adapted(name, *case)
                assert ours.operations >= base.operations and ours.bytes > base.bytes
                assert 1 < floors.floor_of(name, *case) < 3


def test_floors_of_cuda_kernels():
    """Training costs more than its forward; the frozen product is in it; none for plain LoRA."""
    for name in ("boft-b8m4", "fourierft"):
        taxes = [floors.cuda_floor_of(name, (4096, 4096), tokens, True) for tokens in (1, 256, 4096)]
        assert all(tax is not None and 1 < tax < 3 for tax in taxes)
        method, options = name.partition("-")[0], layers.METHODS[name].options
        seconds = [floors_cuda.seconds_of(method, options, (768, 3072), 64, training) for training in (False, True)]
        assert None not in seconds and seconds[0] < seconds[1]
        assert seconds[0] > floors.frozen((768, 3072), 64, False).seconds
    assert floors.cuda_floor_of("lora-r8", (768, 768), 1, False) is None


def test_floors_are_printed(capsys):
    assert floors.main(["--sizes", "768x768", "--tokens", "1", "64", "--methods", "lora-r16", "boft-b4m2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and " 1.05 |" in lines[2] and " 1.10 |" in lines[3] and "– |" in lines[4]


# ---------------------------------------------------------------------- bench/whole_model.py


def test_a_whole_model(tmp_path: Path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tax, "PAIR_SECONDS", 0.0)
    monkeypatch.setattr(tax, "ROUNDS", 3)
    path = tmp_path / "model.json"
    methods = ("lora", "mos", "boft", "fourierft")
    given = ["--model", str(tmp_path / "model"), "--no-peft", "--threads", "1", "--json", str(path)]
    assert whole_model.main(given) == 0, capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert tuple(rows) == methods
    for row in rows.values():
        assert 0 < row["error"] <= 2 and row["step"] > 0 and row["frozen_sentence"] > 0 and row["bytes"] > 0
    # Six layers of one shape share a pool: its gradient is one array of theirs, and smaller than LoRA's.
    assert rows["mos"]["gradient_bytes"] < rows["lora"]["gradient_bytes"] / 3
    printed = capsys.readouterr().out
    assert all(f"| {method} | fastpeft |" in printed for method in methods)


def test_a_wrong_model_gets_no_figures():
    row = whole_model.Row("lora", "fastpeft", 2.5, 1.0, 1.0, 1.0, 1.0, 1, 1)
    assert not row.right and "wrong" in whole_model.table([row])[-1]
