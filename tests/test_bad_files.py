"""Files that are wrong: refused by an error that names them, with the model left as it was."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import BOFT, FOURIERFT, IN, LORA, MOS, OFT, Method, assert_unchanged, every_method, snapshot
from safetensors.torch import load_file, save_file
from small_models import ALL_LINEAR, Model, adapted_model
from torch import Tensor, nn

import fastpeft

TENSOR_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def with_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return corrupt


def with_config(**changes) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text())
        values.update(changes)
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not DROP}))

    return corrupt


DROP = object()


def named_as(method: Method) -> Callable[[Path], None]:
    values = {**method.config(target_modules=ALL_LINEAR).to_dict(), "base_model_name_or_path": None}
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(values)) and None


def truncated(keep: Callable[[int], int], name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: keep(len(content))])

    return corrupt


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def removed(*names: str) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return corrupt


class Explosive:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def pickled_only(folder: Path) -> None:
    removed(TENSOR_FILE)(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Explosive(str(folder / "exploded"))))


def pickled_under_the_right_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Explosive(str(folder / "exploded"))))


def one(tensors: dict[str, Tensor], end: str = "") -> str:
    return sorted(key for key in tensors if key.endswith(end))[-1]


def put(end: str, value: float, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = tensors[key].to(dtype or tensors[key].dtype).clone()
        tensors[key].view(-1)[-1] = value

    return with_tensors(change)


def recast(end: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = tensors[key].to(dtype)

    return with_tensors(change)


def reshaped(end: str, change_shape: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = change_shape(tensors[key]).contiguous()

    return with_tensors(change)


LAST = {LORA: "lora_B.weight", MOS: "pool_B", BOFT: "boft_s", FOURIERFT: "fourierft_spectrum", OFT: "oft_R.weight"}

# Method, what is done to a good folder, and what the error has to name beside the folder.
WRONG_FILES: dict[str, tuple[Method, Callable[[Path], None], list[str]]] = {
    # bytes
    "empty": (LORA, truncated(lambda size: 0), [TENSOR_FILE, "truncated"]),
    "cut in the header's length": (LORA, truncated(lambda size: 4), [TENSOR_FILE, "truncated"]),
    "cut in the header": (LORA, truncated(lambda size: 200), [TENSOR_FILE, "truncated"]),
    "cut in the middle": (LORA, truncated(lambda size: size // 2), [TENSOR_FILE, "truncated"]),
    "last byte missing": (LORA, truncated(lambda size: size - 1), [TENSOR_FILE, "truncated"]),
    "header of 2⁶⁴ bytes": (LORA, replaced(TENSOR_FILE, b"\xff" * 64), [TENSOR_FILE]),
    "text": (LORA, replaced(TENSOR_FILE, b"not tensors, but quite some text about them"), [TENSOR_FILE]),
    "a pickle of that name": (LORA, pickled_under_the_right_name, [TENSOR_FILE]),
    "configuration cut": (LORA, truncated(lambda size: size // 2, CONFIG_FILE), [CONFIG_FILE, "not JSON"]),
    "configuration empty": (LORA, replaced(CONFIG_FILE, b""), [CONFIG_FILE, "not JSON"]),
    "configuration not UTF-8": (LORA, replaced(CONFIG_FILE, b"\xff\xfe{}"), [CONFIG_FILE, "not JSON"]),
    "configuration a list": (LORA, replaced(CONFIG_FILE, b"[1, 2]"), [CONFIG_FILE, "object", "list"]),
    # tensors
    "tensor missing": (LORA, with_tensors(lambda t: t.pop(one(t))), ["up.lora_B.weight is missing"]),
    "tensor too many": (LORA, with_tensors(lambda t: t.update({"more": torch.ones(1)})), ["more is not expected"]),
    "tensor renamed": (
        LORA,
        with_tensors(lambda t: t.update({"wrong": t.pop(one(t))})),
        ["up.lora_B.weight is missing", "wrong is not expected"],
    ),
    "no tensors": (LORA, with_tensors(dict.clear), ["is missing", "8 more"]),
    "transposed": (LORA, reshaped("up.lora_B.weight", lambda t: t.T), ["(4, 16)", "(16, 4)"]),
    "other rank of one tensor": (LORA, reshaped("q.lora_A.weight", lambda t: t[:2]), ["(2, 24)", "(4, 24)"]),
    "flat": (BOFT, reshaped("up.boft_s", torch.flatten), ["(16,)", "(16, 1)"]),
    "no elements": (FOURIERFT, reshaped("spectrum", lambda t: t[:0]), ["(0,)", "(37,)"]),
    "other pool": (MOS, reshaped("pool_A", lambda t: t[:-1]), ["pool_A", "(15, 12)", "(16, 12)"]),
    "complex": (FOURIERFT, recast("spectrum", torch.complex64), ["spectrum", "complex64"]),
    "integers": (LORA, recast("lora_A.weight", torch.int64), ["lora_A.weight", "int64", "float32"]),
    "8-bit floats": (LORA, recast("lora_A.weight", torch.float8_e4m3fn), ["lora_A.weight", "float8_e4m3fn"]),
    **{
        f"{value} in {method.name}": (method, put(end, value), [end, "not finite"])
        for method, end in LAST.items()
        for value in (float("nan"), float("-inf"))
    },
    "finite in the file's dtype alone": (LORA, put("lora_A.weight", 1e300, torch.float64), ["lora_A.weight", "finite"]),
    # MoS indices
    "index too large": (MOS, put("index_A", 16), ["index_A", "[0, 16)", "16"]),
    "index negative": (MOS, put("index_B", -1), ["index_B", "[0, 16)", "-1"]),
    "index huge": (MOS, put("index_B", 2**62), ["index_B", "[0, 16)", str(2**62)]),
    "index of floats": (MOS, recast("index_A", torch.float32), ["index_A", "float32"]),
    "index of bools": (MOS, recast("index_A", torch.bool), ["index_A", "bool"]),
    "index of another rank": (MOS, reshaped("index_A", lambda t: t[:1]), ["index_A", "(1, 2)", "(3, 2)"]),
    # configuration
    "no method": (LORA, with_config(peft_type=DROP), ["peft_type", "LORA, MOS, BOFT, FOURIERFT", "None"]),
    "unknown method": (LORA, with_config(peft_type="VERA"), ["peft_type", "LORA, MOS, BOFT, FOURIERFT", "'VERA'"]),
    "method that is no name": (LORA, with_config(peft_type=["LORA"]), ["peft_type", "['LORA']"]),
    "another method": (LORA, named_as(BOFT), ["attention.q.boft_R is missing"]),
    "DoRA": (LORA, with_config(use_dora=True), ["lora_magnitude_vector", "missing"]),
    "trained biases": (LORA, with_config(bias="all"), ["bias", "'all'"]),
    "more modules saved": (LORA, with_config(modules_to_save=["head"]), ["modules_to_save", "['head']"]),
    "option nobody knows": (FOURIERFT, with_config(wavelets=3), ["wavelets", "3", "FOURIERFT"]),
    "rank that is not the tensors'": (LORA, with_config(r=5), ["(4, 24)", "(5, 24)"]),
    "rank that no memory holds": (LORA, with_config(r=2**50), ["r", "4"]),
    "rank a string": (LORA, with_config(r="4"), ["r", "integer", "'4'"]),
    "alpha NaN": (LORA, with_config(lora_alpha=float("nan")), ["lora_alpha", "finite"]),
    "alpha that no float holds": (LORA, with_config(lora_alpha=10**400), ["lora_alpha", "finite"]),
    "pattern null": (LORA, with_config(rank_pattern=None), ["rank_pattern", "None"]),
    "pattern that is no regular expression": (LORA, with_config(rank_pattern={"(": 4}), ["rank_pattern", "'('"]),
    "target that is no regular expression": (LORA, with_config(target_modules="("), ["target_modules", "'('"]),
    "target a number": (LORA, with_config(target_modules=7), ["target_modules", "7"]),
    "no target": (LORA, with_config(target_modules=None), ["target_modules", "must be given"]),
    "targets that are not there": (LORA, with_config(target_modules=["query"]), ["['query']", "no layer"]),
    "targets that are no layers": (LORA, with_config(target_modules=["norm"]), ["norm", "LayerNorm"]),
    "fewer targets than tensors": (LORA, with_config(target_modules=["q"]), ["up.lora_A.weight is not expected"]),
    "more targets than tensors": (
        LORA,
        with_config(target_modules=[*ALL_LINEAR, "head"]),
        ["head.lora_A.weight is missing"],
    ),
    "block that does not divide": (BOFT, with_config(boft_block_size=5), ["boft_block_size=5", "24"]),
    "too many factors": (BOFT, with_config(boft_n_butterfly_factor=9), ["boft_n_butterfly_factor=9"]),
    "both block sizes": (OFT, with_config(r=6), ["r", "oft_block_size", "6 and 4"]),
    "another block size": (OFT, with_config(oft_block_size=8), ["oft_R.weight", "(3, 28)", "(6, 6)"]),
    "a shared block": (OFT, with_config(block_share=True), ["oft_R.weight", "(1, 6)", "(6, 6)"]),
    "PEFT's other series": (OFT, with_config(peft_version="0.17.1"), ["use_cayley_neumann", "0.18", "'0.17.1'"]),
    "a series of no version": (OFT, with_config(peft_version=DROP), ["use_cayley_neumann", "0.18", "None"]),
    "endless series": (OFT, with_config(num_cayley_neumann_terms=10**9), ["num_cayley_neumann_terms", str(10**9)]),
    "too many frequencies": (FOURIERFT, with_config(n_frequency=10**6), ["n_frequency", "576", "1000000"]),
    "seed that is no seed": (FOURIERFT, with_config(random_loc_seed=2**70), ["random_loc_seed", str(2**70)]),
    "pool too small": (MOS, with_config(pool_rank=1), ["r=3", "pool_rank=1"]),
}
# Errors of a configuration that a model with this adapter in it does not meet: its layers are known.
ABOUT_TARGETS = {
    "no target",
    "target that is no regular expression",
    "targets that are not there",
    "targets that are no layers",
    "fewer targets than tensors",
    "more targets than tensors",
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
@pytest.mark.parametrize("into", ["a fresh model", "a model with that adapter", "a model with another"])
def test_wrong_files_are_refused(wrong: str, into: str, tmp_path: Path):
    method, corrupt, words = WRONG_FILES[wrong]
    if into == "a model with that adapter":
        if wrong in ABOUT_TARGETS:
            return
        model = adapted_model(method, values=1)
    else:
        model = Model() if into == "a fresh model" else adapted_model(BOFT, "other", values=1)
    fastpeft.save_adapter(adapted_model(method, values=2), tmp_path)
    corrupt(tmp_path)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        fastpeft.load_adapter(model, tmp_path)
    if into != "a model with that adapter":  # there it can be enough to say that the configurations differ
        assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(model, before)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "corrupt, words",
    [
        (removed(TENSOR_FILE), [TENSOR_FILE]),
        (removed(CONFIG_FILE), [CONFIG_FILE]),
        (removed(TENSOR_FILE, CONFIG_FILE), [CONFIG_FILE]),
        (pickled_only, [TENSOR_FILE, "pickle"]),
        (shutil.rmtree, [CONFIG_FILE]),
        (lambda folder: shutil.rmtree(folder) or folder.write_text("a file"), [CONFIG_FILE]),
        (lambda folder: removed(TENSOR_FILE)(folder) or (folder / TENSOR_FILE).mkdir(), [TENSOR_FILE]),
    ],
    ids=["no tensors", "no configuration", "neither", "only a pickle", "no folder", "a file", "a folder as a file"],
)
def test_missing_files_are_named(corrupt: Callable, words: list[str], tmp_path: Path):
    folder = tmp_path / "folder"
    fastpeft.save_adapter(adapted_model(LORA), folder)
    corrupt(folder)
    model = Model()
    before = snapshot(model)
    with pytest.raises(OSError) as caught:
        fastpeft.load_adapter(model, folder)
    assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value
    assert_unchanged(model, before)
    assert not (folder / "exploded").exists()


@every_method
def test_an_adapter_of_another_model(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted_model(method), tmp_path)
    for model in (Model(n_blocks=1), Model(n_blocks=3), nn.Sequential(nn.Linear(IN, IN))):
        before = snapshot(model)
        try:
            fastpeft.load_adapter(model, tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) or "target_modules" in str(error)
            assert_unchanged(model, before)
        else:
            assert len(model.blocks) == 3  # the file's layers are all there


def test_layers_that_the_file_does_not_name_are_missing(tmp_path: Path):
    fastpeft.save_adapter(adapted_model(LORA, target_modules=["q"], model=Model(n_blocks=1)), tmp_path)
    model = Model(n_blocks=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.q\.lora_A\.weight is missing"):
        fastpeft.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
