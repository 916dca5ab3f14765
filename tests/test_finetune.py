"""The example that `make finetune` runs, on a random two-layer BERT and made-up reviews."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import classifier
import cost
import data
import finetune
import report
import torch

GOOD = "a warm funny wise film full of charm and real feeling".split()
BAD = "a dull loud empty mess without wit or any sense of life".split()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*GOOD, *BAD})]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    rng = random.Random(0)
    lines = ["text\tlabel\tsource"]
    for i in range(60):
        words = rng.sample(GOOD if i % 2 else BAD, 6)
        lines.append(f"{' '.join(words)}\t{'pos' if i % 2 else 'neg'}\tcritic {i // 3}")
    path = tmp_path_factory.mktemp("data") / "reviews.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny(monkeypatch, model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    """Arguments for a run of seconds."""
    monkeypatch.setattr(cost, "TIMED_STEPS", 2)
    monkeypatch.setattr(cost, "TIMED_SENTENCES", 3)
    monkeypatch.setattr(finetune, "CHECKPOINT_EVERY", 2)
    return [
        *("--model", str(model_folder), "--data", str(data_file), "--out", str(tmp_path / "out")),
        *("--steps", "3", "--batch-size", "4"),
    ]


# ------------------------------------------------------------------------------------ the whole job


def test_all_four_methods_end_to_end(tiny, tmp_path, capsys):
    assert finetune.main(tiny) == 0
    out = tmp_path / "out"
    record = json.loads((out / "table.json").read_text())
    rows = {(row["method"], row["library"]): row for row in record["rows"]}

    titles = ["LoRA", "MoS", "BOFT", "FourierFT"]
    assert [method for method, library in rows if library == "fastpeft"] == titles
    for title in titles:
        row = rows[title, "fastpeft"]
        assert 0 <= row["accuracy"] <= 1
        for column in ("parameters", "disk_bytes", "step_seconds", "latency_ms", "peak_mb"):
            assert row[column] > 0, (title, column)
        checks = row["checks"]
        assert checks["reload_equal"] and checks["merge_equal"] and checks["unmerge_equal"], checks
        assert checks["reload_difference"] == 0
        assert checks["merge_difference"] <= checks["merge_tolerance"] < 1e-3
    assert rows["frozen", "–"]["latency_ms"] > 0

    for method in finetune.METHODS:
        assert [p.name for p in (out / method).iterdir()] == ["final"]
        assert {p.name for p in (out / method / "final").iterdir()} == {
            "adapter",
            "head.safetensors",
        }
    assert (out / "costs.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "table.md").read_text(encoding="utf-8")
    terminal = capsys.readouterr().out
    for word in (*report.COLUMNS, *titles):
        assert word in markdown and word in terminal


def test_peft_stands_beside(tiny, tmp_path):
    pytest.importorskip("peft")
    assert finetune.main([*tiny, "--method", "lora", "boft,fourierft"]) == 0
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {(row["method"], row["library"]): row for row in record["rows"]}
    for title in ("LoRA", "BOFT", "FourierFT"):
        for column in ("parameters", "disk_bytes", "step_seconds", "latency_ms", "peak_mb"):
            assert rows[title, "PEFT"][column] > 0
    for title in ("LoRA", "FourierFT"):
        assert rows[title, "PEFT"]["parameters"] == rows[title, "fastpeft"]["parameters"]
    # PEFT's BOFT has one of the two factors it was asked for, and the table says so.
    assert rows["BOFT", "PEFT"]["parameters"] < rows["BOFT", "fastpeft"]["parameters"]
    assert any("boft_n_butterfly_factor to 1" in note for note in record["notes"])


def test_without_peft(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "peft", None)
    assert finetune.main([*tiny, "--method", "lora"]) == 0
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    absent = next(row for row in record["rows"] if row["library"] == "PEFT")
    assert absent["step_seconds"] is None and absent["latency_ms"] is None
    assert any("PEFT is not installed" in note for note in record["notes"])


def test_a_seed_repeats_a_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "peft", None)
    heads = []
    for _ in range(2):
        assert finetune.main([*tiny, "--method", "mos", "--seed", "5"]) == 0
        heads.append((tmp_path / "out/mos/final/head.safetensors").read_bytes())
    assert heads[0] == heads[1]


@pytest.mark.parametrize("at_step", [1, 3])
def test_interrupt_leaves_a_checkpoint_and_says_where(tiny, tmp_path, monkeypatch, capsys, at_step):
    steps_done = 0
    honest = finetune.training_step

    def interrupted(*args):
        nonlocal steps_done
        steps_done += 1
        if steps_done == at_step:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(finetune, "training_step", interrupted)
    assert finetune.main([*tiny, "--method", "boft"]) == 130
    checkpoint = tmp_path / "out/boft/checkpoint"
    assert str(checkpoint) in capsys.readouterr().err
    assert not (tmp_path / "out/boft/final").exists()

    settings = finetune.parse([*tiny, "--method", "boft"])
    job = classifier.Job(settings, classifier.load_tokenizer(settings.model), data.Split([], [], 0))
    finetune.load(job.fresh_model(), checkpoint)


def test_interrupt_before_training(tiny, monkeypatch, capsys):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "frozen_head", interrupted)
    assert finetune.main(tiny) == 130
    assert "nothing was trained yet" in capsys.readouterr().err


# --------------------------------------------------------------------------- what a row is timed by


def test_peak_bytes_counts_what_is_alive_at_once():
    kept = []

    def work():
        first = torch.ones(1000)
        second = first + 1
        del first
        kept.append(second * 2)

    assert 8000 <= cost.peak_bytes(work) < 8200


def test_take_turns_keeps_its_budget():
    seen = []
    seconds = cost.take_turns("ab", lambda name, i: seen.append((name, i)), 9, budget=0.0)
    assert seen == [(name, i) for i in range(3) for name in "ab"]
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_logistic_regression_separates_what_is_separable():
    torch.manual_seed(0)
    x = torch.randn(200, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    labels = (x[:, 0] + x[:, 1] > 6).float()
    weight, bias = classifier.logistic_regression(x, labels)
    assert classifier.hits(x @ weight + bias, labels) >= 195


def test_logistic_regression_gives_a_dead_column_no_weight():
    torch.manual_seed(0)
    x = torch.randn(200, 3) * torch.tensor([1.0, 1e-30, 1.0])
    weight, _ = classifier.logistic_regression(x, (x[:, 0] > 0).float())
    assert abs(weight[1]) < 1e-6 < weight[0]


# ---------------------------------------------------------------------------------- rows and splits


def test_rows_with_and_without_a_header(tmp_path):
    written = {
        "named.csv": 'source,label,text\nx,0,"good, very"\ny,1,bad\n',
        "plain.csv": '"good, very",0,x\nbad,1,y\n',
        "named.tsv": "Source\tLabel\tText\nx\t0\tgood, very\ny\t1\tbad\n",
    }
    for name, content in written.items():
        path = tmp_path / name
        path.write_text("\ufeff" + content, encoding="utf-8")
        assert data.read_rows(path) == [data.Row("good, very", 0, "x"), data.Row("bad", 1, "y")]


def test_a_quotation_mark_in_a_tsv_ends_with_its_line(tmp_path):
    path = tmp_path / "quotes.tsv"
    path.write_text('"so they say\tneg\nso "good"\tpos\n', encoding="utf-8")
    assert [row.text for row in data.read_rows(path)] == ['"so they say', 'so "good"']


def test_related_rows_are_joined_through_third_ones():
    rows = [
        data.Row("one two three four five six seven eight", 0),
        data.Row("Zero ONE two, three four five six seven eight!", 0),  # eight words in common with 0
        data.Row("zero one two three four five six seven", 1),  # eight in common with 1 only
        data.Row("one two three four five six seven ate", 1),  # seven
        data.Row("short", 0, "a"),
        data.Row("Short.", 1, "b"),  # the same words
        data.Row("other", 1, "b"),  # the same source
        data.Row("!!!", 1),
        data.Row("???", 1),
    ]
    groups = sorted(sorted(group) for group in data.related(rows))
    assert groups == [[0, 1, 2], [3], [4, 5, 6], [7], [8]]


def test_a_split_parts_no_group():
    rows = [data.Row(f"text {i}", i % 2, f"source {i // 4}") for i in range(200)]
    split = data.split_rows(rows, seed=3)
    assert len(split.train) + len(split.held_out) == 200
    assert len(split.held_out) == 40
    assert split.groups == 50
    assert not {row.source for row in split.train} & {row.source for row in split.held_out}
    assert data.split_rows(rows, seed=3) == split
    assert data.split_rows(rows, seed=4) != split


def test_snippets_come_out_of_the_nested_archive(tmp_path, monkeypatch):
    snippets = "1\t2.5\tFine.\r\n2\t-0.5\tSo so.\r\n3\t-1.0\tBad.\r\n"
    inner = tar_of(tmp_path / "inner.tar.gz", {"hutto/" + data.SNIPPETS: snippets.encode()})
    sdist = tar_of(tmp_path / data.SDIST, {"vader/" + data.CORPUS: inner.read_bytes()})
    with pytest.raises(data.InputError, match=r"sha256 is .* expected"):
        data.fetch_snippets(tmp_path)
    monkeypatch.setattr(data, "SDIST_SHA256", data.hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert data.fetch_snippets(tmp_path) == [data.Row("Fine.", 1), data.Row("Bad.", 0)]


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    failed = data.subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: no route\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(data.InputError, match=r"no route; put vaderSentiment.* or give .* --data"):
        data.fetch_snippets(tmp_path / "cache")


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "lora,dora"],
            "argument --method: got 'lora,dora', expected one or several of lora",
        ),
        (["--steps", "0"], "argument --steps: got '0', expected a whole number of at least 1"),
        (["--steps", "many"], "argument --steps: got 'many'"),
        (["--batch-size", "-3"], "argument --batch-size: got '-3'"),
        (["--seed", "-1"], "argument --seed: got '-1', expected a whole number of at least 0"),
        (["--model", "nowhere"], "--model nowhere: no such folder, expected a folder with"),
        (["--data", "nowhere.tsv"], "--data nowhere.tsv: no such file, expected a TSV or CSV file"),
    ],
)
def test_bad_arguments(tiny, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        finetune.main([*tiny, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_none(tiny, tmp_path, capsys):
    for arguments in (["--model", str(tmp_path)], ["--out", __file__]):
        with pytest.raises(SystemExit) as stop:
            finetune.main([*tiny, *arguments])
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert f"--model {tmp_path}: holds no config.json" in errors
    assert f"--out {__file__}: is a file, expected a folder" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty, expected rows of text and label"),
        (b"fine\tpos\nbad", "line 2 has 1 columns, expected 2"),
        (b"fine\tpos\n\tneg\n", "line 2 has an empty text"),
        (b"fine,pos\nbad,\n", "line 2 has an empty label"),
        (b"fine\tpos\ngood\tpos\n", "found 1 distinct labels ('pos' (2x)), expected exactly two"),
        (b"sentence\tclass\nfine\t1\nbad\t0\n", "found 3 distinct labels"),
        (b"caf\xe9\t1\nbad\t0\n", "byte 3 is not UTF-8"),
        (b"fine\tpos\nbad\tneg\n", "split gets 1 and not both classes"),
    ],
)
def test_bad_data(tiny, tmp_path, capsys, content, message):
    path = tmp_path / "bad.data"
    path.write_bytes(content)
    assert finetune.main([*tiny, "--data", str(path)]) == 2
    errors = capsys.readouterr().err
    assert f"--data {path}" in errors or "--data: of" in errors
    assert message in errors


def test_a_model_that_is_broken(tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert finetune.main([*tiny, "--model", str(tmp_path)]) == 2
    assert f"--model {tmp_path}: transformers cannot load" in capsys.readouterr().err


def test_a_method_that_does_not_fit_the_model(tiny, monkeypatch, capsys):
    def too_large(method, library, encoder, seed=0):
        return library.BOFTConfig(boft_block_size=7, target_modules="all-linear")

    monkeypatch.setattr(finetune, "adapter_config", too_large)
    assert finetune.main([*tiny, "--method", "boft"]) == 2
    assert "--method boft: --model" in capsys.readouterr().err
