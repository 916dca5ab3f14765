"""PEFT as the oracle: the same outputs, gradients, random draws, checkpoints and configurations, model against model.

Tolerances: the exact value is PEFT in float64 with the same (float32) numbers in it. Errors are relative to a tensor's
largest value, and a kind of result (y, ∂L/∂x, all gradients of lora_A, …) has the largest error of several draws: the
error of a single small tensor is too much a matter of luck. In float32 ours may be at most twice PEFT's own, plus one
rounding of the largest value. In float64 it may be that multiple of the finer rounding.
"""

import copy
import dataclasses
import json
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.boft import layer as peft_boft  # noqa: E402 (after the skip)
from peft.tuners.fourierft import layer as peft_fourierft  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are far too small to share, and on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_cuda_helper(monkeypatch):
    """PEFT as it is where its CUDA helper does not build, without the attempt to build it: BOFT has one factor."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)


@pytest.fixture
def cuda_helper(monkeypatch, no_cuda_helper):
    """PEFT as it is where the helper builds, with the one function that it takes from there written in PyTorch."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(
        peft_boft.FastBlockDiag, "apply", lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )


def wide_delta_weight(self, adapter):
    """FourierFTLayer.get_delta_weight in the spectrum's dtype, where PEFT's own goes through float32 in any."""
    spectrum, (rows, cols) = self.fourierft_spectrum[adapter], self.indices[adapter]
    dense = torch.zeros(self.out_features, self.in_features, dtype=spectrum.dtype)
    dense[rows, cols] = spectrum
    return torch.fft.ifft2(dense).real * self.fourierft_scaling[adapter]


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Rectangular layers, with a bias and without, in a list as models have it, and a head that nobody adapts."""

    def __init__(self, width, hidden):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_tower(width, hidden, seed=0):
    torch.manual_seed(seed)
    return Tower(width, hidden)


def make_inputs(width, count=4):
    return [torch.randn(2, 9, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


NAMES = ("default", "other")


def peft_model(base, *configs, dtype=torch.float32, names=NAMES):
    """PEFT's model of a copy of the base, with random numbers in its adapters."""
    model = peft.get_peft_model(copy.deepcopy(base).to(dtype), copy.deepcopy(configs[0]), adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, copy.deepcopy(config))
    draw_values(model, seed=0)
    return model


def draw_values(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for (_, _, name), parameter in adapter_values(model).items():
        values = torch.randn(parameter.shape, generator=generator)  # in float32 whatever the parameter is
        spread = parameter.shape[1] ** -0.5 if name == "lora_A" else 0.3
        parameter.data.copy_(spread * values + (1.0 if name in ("boft_s", "lora_magnitude_vector") else 0.0))


PEFT_NAMES = re.compile(
    r"base_model\.model\.(?P<path>.*)\.(?P<key>lora_[AB]|lora_magnitude_vector|boft_[Rs]|fourierft_spectrum|oft_R)"
    r"\.(?P<adapter>\w+)"
)
OUR_NAMES = re.compile(
    r"(?P<path>.*)\.adapters\.(?P<adapter>\w+)\.(?P<key>lora_[AB]|lora_magnitude_vector|boft_[Rs]|spectrum|oft_R)"
)


def peft_key(name):
    """(adapter, path of the layer, parameter) for a PEFT parameter's name, or None for one of the base."""
    found = PEFT_NAMES.match(name)
    return found and (found["adapter"], found["path"], found["key"].removeprefix("fourierft_"))


def adapter_values(model):
    """The parameters of all adapters of a model, PEFT's or ours, by the same keys."""
    values = {}
    for name, parameter in model.named_parameters():
        if isinstance(model, peft.PeftModel):
            key = peft_key(name)
        else:
            found = OUR_NAMES.match(name)
            key = found and (found["adapter"], found["path"], found["key"])
        if key:
            values[key] = parameter
    return values


def our_model(base, theirs, *configs, dtype=torch.float32, names=NAMES):
    """Our model of a copy of the base, from the same configurations and with the same numbers as PEFT's."""
    model = copy.deepcopy(base).to(dtype)
    for name, config in zip(names, configs, strict=False):
        fastpeft.adapt(model, copy.deepcopy(config), adapter_name=name)
    copy_values(theirs, model)
    return model


def copy_values(source, target):
    found, wanted = adapter_values(source), adapter_values(target)
    assert found.keys() == wanted.keys()
    for key, parameter in wanted.items():
        assert parameter.shape == found[key].shape, key
        parameter.data.copy_(found[key].data)


def assert_same_values(first, second):
    first, second = adapter_values(first), adapter_values(second)
    assert first.keys() == second.keys()
    for key, parameter in first.items():
        assert torch.equal(parameter, second[key]), key


def run(model, x):
    """y, and the gradients of x and of the active adapters' parameters for a fixed gradient of y."""
    if x.dtype.is_floating_point:
        x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y = getattr(y, "logits", y)
    wanted = {("", "", "x"): x, **adapter_values(model)}
    wanted = {key: tensor for key, tensor in wanted.items() if tensor.requires_grad}
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    gradients = torch.autograd.grad(y, list(wanted.values()), grad)
    return {("", "", "y"): y.detach(), **dict(zip(wanted, gradients, strict=True))}


class Errors:
    """The largest relative error of a tensor of each kind so far, of three models: PEFT's and ours in one dtype, and
    ours in float64. PEFT's in float64 is right."""

    def __init__(self):
        self.theirs, self.ours, self.wide = {}, {}, {}

    def add(self, exact, theirs, ours, wide=None):
        for errors, results in ((self.theirs, theirs), (self.ours, ours), (self.wide, wide)):
            if results is None:
                continue
            assert results.keys() == exact.keys()
            for key, value in exact.items():
                if not value.any():  # such as the gradient of a block of size one, which cannot turn
                    assert not results[key].any(), key
                    continue
                # Root mean squares: steadier than the largest entry, of which a small tensor has few to choose from.
                error = (results[key].double() - value).norm() / value.norm()
                errors[key[2]] = max(errors.get(key[2], 0.0), float(error))

    def check(self, dtype=torch.float32):
        eps = torch.finfo(dtype).eps
        assert "y" in self.theirs and len(self.theirs) > 1
        for kind, error in self.theirs.items():
            assert self.ours[kind] <= 2 * error + eps, kind
            if self.wide:  # the yardstick is in float64 itself here, and off by PEFT's share
                assert self.wide[kind] <= (3 * error / eps + 1) * torch.finfo(torch.float64).eps, kind


def compare(monkeypatch, base, config, inputs):
    """Our model against PEFT's in float32 and float64, in several draws; PEFT's configuration object goes into both."""
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours, wide = our_model(base, theirs, config), our_model(base, theirs, config, dtype=torch.float64)
    compare_models(monkeypatch, exact, theirs, ours, wide, inputs)


def compare_models(monkeypatch, exact, theirs, ours, wide, inputs, dtype=torch.float32):
    errors = Errors()
    for seed, x in enumerate(inputs):
        draw_values(theirs, seed)
        results = []
        for model in (exact, theirs, ours, wide):
            if model is None:
                results.append(None)
                continue
            copy_values(theirs, model)
            torch.manual_seed(seed)  # for dropout
            with monkeypatch.context() as patch:
                if model is exact:
                    patch.setattr(peft_fourierft.FourierFTLayer, "get_delta_weight", wide_delta_weight)
                results.append(run(model, x))
        errors.add(*results)
    errors.check(dtype)


# Outputs and gradients

EVERYWHERE = ["up", "down"]

LORA = [
    # width, hidden, options
    pytest.param(35, 21, {"r": 4, "lora_alpha": 7}, id="odd"),
    pytest.param(13, 31, {"r": 1}, id="prime-rank-one"),
    pytest.param(6, 10, {"r": 16, "lora_alpha": 4}, id="rank-above-both-sides"),
    pytest.param(35, 21, {"r": 9, "lora_alpha": 6, "use_rslora": True}, id="rslora"),
    pytest.param(
        20,
        50,
        {
            "r": 3,
            "lora_alpha": 5,
            # a last part, a whole path, a regular expression
            "rank_pattern": {"down": 5, "layers.0.up": 2},
            "alpha_pattern": {r"layers\.[1-9]\.\w+": 11},
        },
        id="patterns",
    ),
    pytest.param(
        20,
        50,
        {"r": 3, "use_rslora": True, "rank_pattern": {"down": 8}, "alpha_pattern": {"up": 2}},
        id="rslora-patterns",
    ),
]


@pytest.mark.parametrize("width, hidden, options", LORA)
def test_lora(monkeypatch, width, hidden, options):
    config = peft.LoraConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


FOURIERFT = [
    pytest.param(35, 21, {"n_frequency": 50, "random_loc_seed": 0}, id="odd-seed-0"),
    pytest.param(13, 31, {"n_frequency": 50, "random_loc_seed": 2024}, id="prime-seed-2024"),
    pytest.param(24, 40, {"n_frequency": 200}, id="even"),  # the middles of both spectra are hit
    pytest.param(6, 10, {"n_frequency": 60}, id="full"),  # every place
    pytest.param(12, 5, {"n_frequency": 1, "scaling": 300.0}, id="one-frequency"),
    pytest.param(35, 21, {"n_frequency": 20, "n_frequency_pattern": {"down": 37, "layers.0.up": 5}}, id="patterns"),
]


@pytest.mark.parametrize("width, hidden, options", FOURIERFT)
def test_fourierft(monkeypatch, width, hidden, options):
    options = {"scaling": 20.0, **options}
    config = peft.FourierFTConfig(target_modules=EVERYWHERE, init_weights=False, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


BOFT = [
    # width, hidden, options
    pytest.param(35, 21, {"boft_block_size": 7}, id="odd-blocks"),
    pytest.param(12, 20, {"boft_block_size": 4}, id="usual-blocks"),
    pytest.param(24, 16, {"boft_block_size": 8}, id="large-blocks"),
    pytest.param(13, 26, {"boft_block_size": 13}, id="one-prime-block"),
    pytest.param(9, 5, {"boft_block_size": 1}, id="blocks-of-one"),  # R is the identity; s alone does something
    pytest.param(15, 25, {"boft_block_size": 0, "boft_block_num": 5}, id="by-number"),  # blocks of 3 and of 5
]


@pytest.mark.parametrize("width, hidden, options", BOFT)
def test_boft(monkeypatch, width, hidden, options):
    config = peft.BOFTConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


BOFT_FACTORS = [
    # width, hidden, block size, factors
    pytest.param(24, 40, 4, 2, id="usual"),
    pytest.param(24, 40, 2, 3, id="half-of-one"),
    pytest.param(24, 48, 6, 3, id="half-of-three-one-window"),  # the last factor spans all of width
    pytest.param(28, 84, 14, 2, id="half-of-seven"),
    pytest.param(16, 48, 2, 4, id="four-factors"),
]


@pytest.mark.parametrize("width, hidden, block_size, factors", BOFT_FACTORS)
def test_boft_with_more_factors(monkeypatch, cuda_helper, width, hidden, block_size, factors):
    config = peft.BOFTConfig(target_modules=EVERYWHERE, boft_block_size=block_size, boft_n_butterfly_factor=factors)
    assert (
        peft_model(make_tower(width, hidden), config).base_model.model.layers[0].up.boft_R["default"].shape[0]
        == factors
    )
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


OFT = [
    # width, hidden, options
    pytest.param(24, 32, {"oft_block_size": 8}, id="usual"),
    pytest.param(24, 32, {"oft_block_size": 8, "use_cayley_neumann": False}, id="exact"),
    *(
        pytest.param(20, 28, {"oft_block_size": 4, "num_cayley_neumann_terms": terms}, id=f"{terms}-terms")
        for terms in (2, 3, 4, 6, 9)  # one term has no gradient at PEFT's
    ),
    pytest.param(35, 21, {"oft_block_size": 7, "use_cayley_neumann": False}, id="odd-blocks"),
    pytest.param(13, 26, {"oft_block_size": 13}, id="one-prime-block"),
    pytest.param(15, 25, {"oft_block_size": 0, "r": 5}, id="by-number"),  # blocks of 3 and of 5
    pytest.param(24, 32, {"oft_block_size": 8, "block_share": True}, id="shared"),
    pytest.param(24, 32, {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}, id="shared-exact"),
]


@pytest.mark.parametrize("width, hidden, options", OFT)
def test_oft(monkeypatch, width, hidden, options):
    config = peft.OFTConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


METHODS = [
    pytest.param(peft.LoraConfig(r=4, lora_alpha=7, target_modules=EVERYWHERE), id="lora"),
    pytest.param(peft.FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=EVERYWHERE), id="fourierft"),
    pytest.param(peft.BOFTConfig(boft_block_size=8, target_modules=EVERYWHERE), id="boft"),
    pytest.param(
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE), id="boft-two-factors"
    ),
    pytest.param(peft.OFTConfig(oft_block_size=8, target_modules=EVERYWHERE), id="oft"),
    pytest.param(peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=EVERYWHERE), id="oft-exact"),
    pytest.param(peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=EVERYWHERE), id="oft-shared"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", METHODS)
def test_a_narrow_base(monkeypatch, cuda_helper, config, dtype):
    """The adapter stays in float32 over it, in PEFT as here."""
    base = make_tower(24, 40).to(dtype)
    theirs, exact = peft_model(base, config, dtype=dtype), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config, dtype=dtype)
    for model in (theirs, ours):
        assert {value.dtype for value in adapter_values(model).values()} == {torch.float32}
    inputs = [x.to(dtype) for x in make_inputs(24)]
    compare_models(monkeypatch, exact, theirs, ours, None, inputs, dtype)


@pytest.mark.parametrize("config", METHODS)
def test_merged_weights(monkeypatch, cuda_helper, config):
    base = make_tower(24, 40)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config)
    copy_values(theirs, exact)
    fastpeft.merge(ours)
    monkeypatch.setattr(peft_fourierft.FourierFTLayer, "get_delta_weight", wide_delta_weight)
    weights = [dict(model.merge_and_unload().named_parameters()) for model in (theirs, exact)]
    worst = {"ours": 0.0, "theirs": 0.0}
    for path in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"):
        right = weights[1][f"{path}.weight"]
        for whose, weight in (("ours", ours.get_submodule(path).weight), ("theirs", weights[0][f"{path}.weight"])):
            worst[whose] = max(worst[whose], float((weight.double() - right).abs().max() / right.abs().max()))
    assert worst["ours"] <= 2 * worst["theirs"] + torch.finfo(torch.float32).eps


# Dropout: the same random numbers are drawn in the same order, so one seed gives one result


@pytest.mark.parametrize("p", [0.2, 0.75])
def test_lora_dropout(monkeypatch, p):
    config = peft.LoraConfig(r=4, lora_dropout=p, target_modules=EVERYWHERE)
    compare(monkeypatch, make_tower(35, 21), config, make_inputs(35, count=6))


@pytest.mark.parametrize("factors, width, hidden", [(1, 24, 40), (3, 48, 80)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])  # of 6 to 20 blocks: none or one, a half, all but one
def test_boft_dropout(monkeypatch, cuda_helper, factors, width, hidden, p):
    config = peft.BOFTConfig(
        target_modules=EVERYWHERE, boft_block_size=4, boft_n_butterfly_factor=factors, boft_dropout=p
    )
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width, count=8))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=EVERYWHERE), id="lora"),
        pytest.param(peft.BOFTConfig(boft_block_size=4, boft_dropout=0.5, target_modules=EVERYWHERE), id="boft"),
    ],
)
def test_dropout_is_for_training_alone(monkeypatch, config):
    base, inputs = make_tower(24, 40), make_inputs(24)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config)
    trained = ours(inputs[0])
    for model in (theirs, exact, ours):
        model.eval()
    assert torch.equal(ours(inputs[0]), ours(inputs[0])) and not torch.equal(ours(inputs[0]), trained)
    compare_models(monkeypatch, exact, theirs, ours, None, inputs)


# Several adapters together


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param(
            peft.LoraConfig(r=3, target_modules=EVERYWHERE),
            peft.LoraConfig(r=5, lora_alpha=3, target_modules=["up"]),
            id="lora",
        ),
        # Rotations do not commute, so that order counts. With one factor alone: PEFT keeps one permutation for all.
        pytest.param(
            peft.BOFTConfig(boft_block_size=5, target_modules=EVERYWHERE),
            peft.BOFTConfig(boft_block_size=15, target_modules=EVERYWHERE),
            id="boft",
        ),
        pytest.param(
            peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=EVERYWHERE),
            peft.FourierFTConfig(n_frequency=9, scaling=30.0, random_loc_seed=1, target_modules=["down"]),
            id="fourierft",
        ),
    ],
)
def test_two_adapters_together(monkeypatch, first, second, order):
    base, names = make_tower(45, 15), ("one", "two")
    theirs = peft_model(base, first, second, names=names)
    exact = peft_model(base, first, second, names=names, dtype=torch.float64)
    ours = our_model(base, theirs, first, second, names=names)
    wide = our_model(base, theirs, first, second, names=names, dtype=torch.float64)
    for model in (theirs, exact):
        model.base_model.set_adapter(order)
    for model in (ours, wide):
        fastpeft.set_adapter(model, order)
    compare_models(monkeypatch, exact, theirs, ours, wide, make_inputs(45))


# Folders

FOLDERS = [
    pytest.param(peft.LoraConfig(r=4, lora_alpha=7, target_modules=EVERYWHERE), id="lora"),
    pytest.param(
        peft.LoraConfig(r=4, use_rslora=True, target_modules=r".*\.(up|down)"), id="rslora-regular-expression"
    ),
    pytest.param(
        peft.LoraConfig(
            r=4,
            rank_pattern={"down": 5},
            alpha_pattern={"layers.0.up": 3},
            lora_dropout=0.1,
            target_modules=["up", "layers.1.down"],
        ),
        id="lora-patterns",
    ),
    pytest.param(
        peft.LoraConfig(r=4, target_modules=EVERYWHERE, layers_to_transform=[1], layers_pattern="layers"),
        id="one-layer",
    ),
    pytest.param(peft.BOFTConfig(boft_block_size=8, boft_dropout=0.1, target_modules=EVERYWHERE), id="boft"),
    pytest.param(peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=EVERYWHERE), id="boft-by-number"),
    pytest.param(
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE), id="boft-two-factors"
    ),
    pytest.param(
        peft.FourierFTConfig(n_frequency=50, scaling=20.0, random_loc_seed=3, target_modules=EVERYWHERE), id="fourierft"
    ),
    pytest.param(
        peft.FourierFTConfig(
            n_frequency=50,
            scaling=20.0,
            n_frequency_pattern={"down": 7},
            exclude_modules=["layers.0.up"],
            target_modules=EVERYWHERE,
        ),
        id="fourierft-pattern",
    ),
]


FOLDERS += [
    pytest.param(peft.OFTConfig(target_modules=EVERYWHERE, **options), id=name)
    for name, options in {
        "oft": {"oft_block_size": 8, "module_dropout": 0.1},
        "oft-exact": {"oft_block_size": 4, "use_cayley_neumann": False},
        "oft-terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
        "oft-by-number": {"oft_block_size": 0, "r": 4},
        "oft-shared": {"oft_block_size": 8, "block_share": True},
        "oft-shared-exact": {"oft_block_size": 0, "r": 2, "block_share": True, "use_cayley_neumann": False},
        "oft-constrained": {"oft_block_size": 8, "coft": True, "eps": 2.0, "use_cayley_neumann": False},
    }.items()
]


@pytest.mark.parametrize("config", FOLDERS)
def test_a_folder_of_pefts_is_read(monkeypatch, cuda_helper, tmp_path, config):
    base = make_tower(24, 40)
    theirs, exact = peft_model(base, config).eval(), peft_model(base, config, dtype=torch.float64).eval()
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))


@pytest.mark.parametrize("config", FOLDERS)
def test_peft_reads_a_folder_of_ours(monkeypatch, cuda_helper, tmp_path, config):
    base = make_tower(24, 40)
    ours = our_model(base, peft_model(base, config), config).eval()
    fastpeft.save_adapter(ours, tmp_path)
    theirs, exact = read_with_peft(base, tmp_path), read_with_peft(copy.deepcopy(base).double(), tmp_path)
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))
    read = theirs.peft_config["default"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in {field.name for field in dataclasses.fields(fastpeft.nn.METHODS[read.peft_type.value].config_class)}:
        if name not in written:  # said only where it is switched on, because PEFT does not know it
            assert not hasattr(read, name), name
            continue
        before, after = getattr(config, name), getattr(read, name)
        assert before == after or (not before and not after), name


def read_with_peft(base, folder):
    # That a parameter asks for its gradient is the only thing that is_trainable changes.
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(fastpeft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"), id="lora"),
        pytest.param(
            fastpeft.BOFTConfig(boft_block_size=8, init_weights=False, target_modules="all-linear"), id="boft"
        ),
        pytest.param(
            fastpeft.FourierFTConfig(n_frequency=60, init_weights=False, target_modules="all-linear"), id="fourierft"
        ),
        pytest.param(fastpeft.OFTConfig(oft_block_size=8, init_weights=False, target_modules="all-linear"), id="oft"),
    ],
)
def test_peft_reads_all_linear(monkeypatch, tmp_path, config):
    """PEFT knows what all-linear means for transformers' models alone, so the folder says what it meant."""
    base = make_tower(24, 40)
    ours = fastpeft.adapt(copy.deepcopy(base), config)
    fastpeft.save_adapter(ours, tmp_path)
    theirs, exact = read_with_peft(base, tmp_path), read_with_peft(copy.deepcopy(base).double(), tmp_path)
    assert len(theirs.targeted_module_names) == 5
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))


def test_one_factor_where_the_file_says_two(monkeypatch, tmp_path):
    """Where its helper does not build, PEFT trains one factor and goes on writing boft_n_butterfly_factor=2."""
    base = make_tower(24, 40)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 2
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor=2.*one factor"):
        ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))
    # Written again, the folder says what it holds.
    fastpeft.save_adapter(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


# Configurations

SIZES = {peft.FourierFTConfig: {"n_frequency": 9}, peft.OFTConfig: {"oft_block_size": 8}}  # that fit 24 → 40


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up"]},
        {"target_modules": ["layers.0.up", "model.layers.1.down"]},
        {"target_modules": r"model\.layers\.\d\.up"},
        {"target_modules": r".*(down|head)"},
        {"target_modules": ["up", "down", "head"], "exclude_modules": ["layers.0.down"]},
        {"target_modules": ["up", "down"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["up", "down"], "layers_to_transform": 1},
        {"target_modules": ["up", "down"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["up", "down"], "layers_to_transform": [0, 1], "layers_pattern": ["blocks", "layers"]},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("config_class", [peft.LoraConfig, peft.BOFTConfig, peft.FourierFTConfig, peft.OFTConfig])
def test_the_same_layers_are_adapted(config_class, options):
    base = nn.Sequential(OrderedDict(model=make_tower(24, 40)))  # PEFT tells layer lists by what stands before them
    sizes = SIZES.get(config_class, {})
    theirs = peft_model(base, config_class(**options, **sizes))
    ours = fastpeft.adapt(copy.deepcopy(base), config_class(**options, **sizes))
    assert {key[1] for key in adapter_values(ours)} == set(theirs.targeted_module_names)


@pytest.mark.parametrize(
    "pattern",
    [
        {"down": 7},
        {"layers.0.up": 5, "layers.1.up": 6},
        {"model.layers.0.up": 5},
        {r"layers\.\d\.up": 5, "up": 7},
        {"up": 7, "layers.0.up": 5},
        {"model.layers.0.up": 5, "up": 7},  # a whole path before a general rule
        {"up|down": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config_class, name", [(peft.LoraConfig, "rank_pattern"), (peft.FourierFTConfig, "n_frequency_pattern")]
)
def test_patterns_mean_the_same(config_class, name, pattern):
    base = nn.Sequential(OrderedDict(model=make_tower(24, 40)))
    sizes = SIZES.get(config_class, {})
    config = config_class(target_modules=EVERYWHERE, **{name: pattern}, **sizes)
    theirs, ours = peft_model(base, config), fastpeft.adapt(copy.deepcopy(base), copy.deepcopy(config))
    shapes = [{key: value.shape for key, value in adapter_values(model).items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


TINY = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: make_gpt2(), id="gpt2"),  # Conv1D, and an output layer tied to the embedding
        pytest.param(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), id="llama"),
        pytest.param(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)), id="bert"),
    ],
)
def test_all_linear_means_the_same(make):
    base = make()
    theirs = peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    ours = fastpeft.adapt(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert {key[1] for key in adapter_values(ours)} == set(theirs.targeted_module_names)


@pytest.mark.parametrize("config_class", [peft.LoraConfig, peft.BOFTConfig, peft.FourierFTConfig, peft.OFTConfig])
def test_book_keeping_is_accepted(config_class):
    config = config_class(
        target_modules=["up"],
        task_type="FEATURE_EXTRACTION",
        inference_mode=True,
        base_model_name_or_path="x",
        revision="main",
        **SIZES.get(config_class, {}),
    )
    assert adapter_values(fastpeft.adapt(make_tower(24, 40), config))


UNSUPPORTED = [
    (peft.LoraConfig, "bias", "all"),
    (peft.LoraConfig, "bias", "lora_only"),
    (peft.LoraConfig, "modules_to_save", ["head"]),
    (peft.LoraConfig, "layer_replication", [(0, 2), (1, 2)]),
    (peft.LoraConfig, "lora_bias", True),
    (peft.LoraConfig, "trainable_token_indices", [0, 1]),
    (peft.LoraConfig, "target_parameters", ["up.weight"]),
    (peft.LoraConfig, "alora_invocation_tokens", [1, 2]),
    (peft.LoraConfig, "init_lora_weights", "pissa"),
    (peft.BOFTConfig, "bias", "boft_only"),
    (peft.BOFTConfig, "modules_to_save", ["head"]),
    (peft.FourierFTConfig, "bias", "all"),
    (peft.FourierFTConfig, "modules_to_save", ["head"]),
    (peft.OFTConfig, "bias", "oft_only"),
    (peft.OFTConfig, "modules_to_save", ["head"]),
]


@pytest.mark.parametrize(
    "config_class, option, value",
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{case[2]}") for case in UNSUPPORTED],
)
def test_an_option_that_is_not_supported_is_named(tmp_path, config_class, option, value):
    sizes = SIZES.get(config_class, {})
    base = make_tower(24, 40)
    with pytest.raises(ValueError, match=option):
        fastpeft.adapt(base, config_class(target_modules=["up"], **{option: value}, **sizes))

    # The same in a file.
    peft_model(base, config_class(target_modules=["up"], **sizes)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(ValueError, match=option):
        fastpeft.load_adapter(base, tmp_path)
    assert all(type(module) is nn.Linear and module.weight.requires_grad for module in (base.head, base.layers[0].up))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_that_trains_a_head_is_named(task_type):
    """For these tasks PEFT trains the classification head as well, as if modules_to_save had been given."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task_type)
    kind = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}.get(task_type)
    name = f"BertFor{kind}Classification" if kind else "BertForQuestionAnswering"
    base = getattr(transformers, name)(transformers.BertConfig(**TINY))
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    assert any("modules_to_save" in name for name, value in theirs.named_parameters() if value.requires_grad)
    with pytest.raises(ValueError, match=r"task_type|modules_to_save"):
        fastpeft.adapt(base, config)


def test_another_method_of_pefts_is_refused():
    with pytest.raises(TypeError, match="LoHaConfig"):
        fastpeft.adapt(make_tower(24, 40), peft.LoHaConfig(target_modules=["up"]))


# transformers' Conv1D, whose weight is (in, out)


def make_gpt2():
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # GPT-2 starts with small weights and zero biases
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


TOKENS = [torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # 24 -> 72, 24 -> 24 and 96 -> 24, 24 -> 96


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(peft.LoraConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True), id="lora"),
        pytest.param(
            peft.FourierFTConfig(n_frequency=100, scaling=30.0, target_modules=CONV1D, fan_in_fan_out=True),
            id="fourierft",
        ),
    ],
)
def test_conv1d(monkeypatch, tmp_path, config):
    base = make_gpt2()
    assert isinstance(base.transformer.h[0].attn.c_attn, Conv1D)
    compare(monkeypatch, base, config, TOKENS)

    theirs = peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same_values(theirs, ours)
    fastpeft.save_adapter(ours, tmp_path / "ours")
    assert_same_values(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), ours)


@pytest.mark.parametrize("block_size, factors", [(8, 1), (3, 1), (4, 2)])
def test_conv1d_boft(monkeypatch, cuda_helper, block_size, factors):
    """PEFT's BOFT does not take a Conv1D, so its oracle is the same model with nn.Linear in their place."""
    base = make_gpt2()
    linear = copy.deepcopy(base)
    for path, module in list(linear.named_modules()):
        if isinstance(module, Conv1D):
            replacement = nn.Linear(*module.weight.shape)
            replacement.weight.data, replacement.bias.data = module.weight.data.T.contiguous(), module.bias.data
            linear.set_submodule(path, replacement)
    config = peft.BOFTConfig(boft_block_size=block_size, boft_n_butterfly_factor=factors, target_modules=CONV1D)
    theirs, exact = peft_model(linear, config), peft_model(linear, config, dtype=torch.float64)
    ours, wide = our_model(base, theirs, config), our_model(base, theirs, config, dtype=torch.float64)
    compare_models(monkeypatch, exact, theirs, ours, wide, TOKENS)
