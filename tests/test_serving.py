"""Batches that mix adapters compute, row by row, what a model computes that holds each adapter alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, IN, LORA, Errors, call, make_linear, randn
from serving_models import OPTIONS, Switched, make_bank, save, save_all
from small_models import BASES, Model
from torch import nn

import fastpeft
from fastpeft.serving import AdapterBank, UnknownAdapterError

NAMES = list(OPTIONS)
MIXED: list[str | None] = [*NAMES, None, *reversed(NAMES), None, "lora", "lora"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


def served(bank: AdapterBank, model: nn.Module, x, rows: Sequence[str | None]):
    with torch.no_grad(), bank.route(rows):
        return model(x)


def check_rows(model: nn.Module, oracle: Switched, x, rows: Sequence[str | None], bank: AdapterBank, run=call) -> None:
    """Against the model in float64; it may err twice as much as the switched model in x's dtype."""
    exact_oracle, errors = oracle.cast(torch.float64), Errors()
    wide = x.double() if x.is_floating_point() else x
    narrow = oracle.cast(torch.float32)  # whose error stands in for that of float64, see Errors
    for draw in range(4):
        turned = rows[draw:] + rows[:draw]
        with torch.no_grad(), bank.route(turned):
            found = run(model, x)
        exact, composed = exact_oracle(wide, turned, run), oracle(x, turned, run)
        pairs = [(composed, exact)]
        if x.dtype == torch.float64:
            pairs.append((narrow(x.float(), turned, run), narrow.cast(torch.float64)(x.float().double(), turned, run)))
        for b, name in enumerate(turned):
            errors.add(str(name), found[b], exact[b], *((composed[b], right[b]) for composed, right in pairs))
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixed_batch(dtype: torch.dtype, folders: dict[str, Path]):
    base = Model().to(dtype).requires_grad_(False)
    model = copy.deepcopy(base)
    bank = make_bank(model, folders)
    rows = MIXED
    if dtype == torch.float64:  # the operators take scalings in float32, and 3 / √7 is none
        rows = [None if name == "lora_other_ranks" else name for name in rows]
    check_rows(model, Switched(base, folders), randn(len(rows), 3, IN, dtype=dtype), rows, bank)


@pytest.mark.parametrize("name", NAMES)
def test_one_method_beside_the_base(name: str, folders: dict[str, Path]):
    base = Model().requires_grad_(False)
    model = copy.deepcopy(base)
    bank = make_bank(model, {name: folders[name]})
    rows = [name, None, None, name, name]
    check_rows(model, Switched(base, {name: folders[name]}), randn(5, 2, IN), rows, bank)


def test_rows_without_an_adapter_are_the_bases(folders: dict[str, Path]):
    """Bit for bit in the same batch, layer by layer."""
    base = Model().requires_grad_(False)
    model = copy.deepcopy(base)
    bank = make_bank(model, folders)
    x = randn(len(MIXED), 3, IN)
    expected = base(x)
    assert torch.equal(model(x), expected)  # nothing is routed
    assert torch.equal(served(bank, model, x, [None] * len(MIXED)), expected)
    found = served(bank, model, x, MIXED)
    for b, name in enumerate(MIXED):
        assert torch.equal(found[b], expected[b]) == (name is None), name


def test_strides_do_not_change_the_base(tmp_path: Path):
    """PyTorch's linear layer takes another way for them, whose last bits differ at this size."""

    def make() -> nn.Sequential:
        return nn.Sequential(make_linear(512, 512)).requires_grad_(False)

    model, base = make(), make()
    bank = make_bank(model, {"boft": save(tmp_path, OPTIONS["boft"], base=make)}, max_resident_bytes=1 << 23)
    for x in (
        randn(8, 4, 512),
        randn(4, 8, 512).transpose(0, 1),
        randn(8, 4, 1024)[..., :512],
        randn(8, 4, 512, 2)[..., 0],
        randn(1, 4, 512).expand(8, 4, 512),
        randn(512, 8).T,
        randn(8, 513)[:, 1:],
    ):
        rows = [None] * 7 + ["boft"]
        expected, found = base(x), served(bank, model, x, rows)
        assert torch.equal(found[:7], expected[:7])
        torch.testing.assert_close(found, served(bank, model, x.contiguous(), rows), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[7], expected[7])


def test_a_row_does_not_depend_on_the_others(folders: dict[str, Path]):
    """The frozen product aside: here it is exact, whatever the order of its sums."""
    base = Model().requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_((parameter * 8).round() / 8)
    layer = base.blocks[0].up
    alone = copy.deepcopy(base)
    bank = make_bank(base, folders)
    x = (randn(1, IN) * 4).round().repeat(len(MIXED), 1)
    x[1:] += torch.arange(1, len(MIXED))[:, None]
    with torch.no_grad():
        assert torch.equal(alone.blocks[0].up(x), torch.cat([alone.blocks[0].up(row) for row in x.split(1)]))
        deltas = {n for n in NAMES if "boft" not in n}  # the product of rotated numbers is rounded
        with bank.route(MIXED):
            together = layer(x)
        for b, name in enumerate(MIXED):
            if name in deltas:
                with bank.route([name]):
                    assert torch.equal(layer(x[b : b + 1])[0], together[b]), name


@pytest.mark.parametrize("kind", BASES)
def test_bases_of_other_kinds(kind: str, tmp_path: Path):
    """Quantised bases and Conv1D are called as they are."""

    def make() -> nn.Sequential:
        return nn.Sequential(BASES[kind]()).requires_grad_(False)

    names = ["lora", "boft", "fourierft"]
    folders = save_all(tmp_path, {name: OPTIONS[name] for name in names}, make)
    model = make()
    bank = make_bank(model, folders)
    check_rows(model, Switched(make(), folders), randn(6, 2, IN), [*names, None, *names[:2]], bank)


@pytest.mark.parametrize("names", [["boft", "lora"], ["fourierft", "mos"]], ids="-".join)
def test_shapes_of_a_batch(names: list[str], folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {name: folders[name] for name in names})
    rows = [names[0], None, names[1]]
    x = randn(3, 4, IN)
    expected = served(bank, model, x, rows)
    per_row = [name for name in rows for _ in range(4)]
    flat = x.flatten(0, 1)
    for found in (
        served(bank, model, flat, rows),
        served(bank, model, flat, per_row),
        served(bank, model, flat[None], per_row),
        served(bank, model, x.unsqueeze(1), rows),
        served(bank, model, x.transpose(0, 1).contiguous().transpose(0, 1), rows),  # strides are real
    ):
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=2e-5, atol=1e-5)
    assert served(bank, model, x[:0], []).shape == (0, 4, 11)
    assert served(bank, model, x[0, 0], names[:1]).shape == (11,)
    for wrong in (x.transpose(0, 1), x[:2], flat[:5], flat[None]):
        with pytest.raises(ValueError, match="routed with 3 entries"):
            served(bank, model, wrong, rows)
    with pytest.raises(ValueError, match="routed with 0 entries"):
        served(bank, model, x, [])
    with pytest.raises(ValueError, match="shape"):
        served(bank, model.blocks[0].up, randn(3, 4, IN + 1), rows)
    assert torch.equal(served(bank, model, x, rows), expected)


def test_whatever_the_default_device(folders: dict[str, Path]):
    """What is made on the host is made there, in a thread with a default device of its own, too."""
    models = [Model().requires_grad_(False) for _ in range(2)]
    x, rows = randn(len(folders), 3, IN), list(folders)
    banks = [make_bank(model) for model in models]
    found = []
    for device, bank, model in zip(("cpu", "meta"), banks, models, strict=True):
        with torch.device(device):
            for name, folder in folders.items():
                bank.load(name, folder)
            found.append(served(bank, model, x, rows))
    assert torch.equal(*found)


def test_routes_nest_and_end(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, folders)
    x = randn(1, IN)
    base, lora, boft = model(x), served(bank, model, x, ["lora"]), served(bank, model, x, ["boft"])
    with torch.no_grad(), bank.route(["lora"]):
        with bank.route(["boft"]):
            assert torch.equal(model(x), boft)
        assert torch.equal(model(x), lora)
        with pytest.raises(UnknownAdapterError, match="no adapter is named 'eve'"), bank.route(["eve"]):
            pass
        assert torch.equal(model(x), lora)
        assert bank.stats()["in_use"] == 1
    assert torch.equal(model(x), base)
    assert bank.stats()["in_use"] == 0
    route = bank.route(["lora"])
    for _ in range(2):  # a route may be used again
        with torch.no_grad(), route:
            assert torch.equal(model(x), lora)


def test_a_plan_is_refilled_in_place(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, folders)
    x = randn(4, 2, IN)
    first, second = ["lora", None, "boft", "mos"], ["fourierft", "fourierft", "lora", None]
    expected = [served(bank, model, x, rows) for rows in (first, second)]
    plan = bank.plan(first, tokens=2)
    before = [tensor for pair in plan.tensors(2) for tensor in pair]
    with torch.no_grad():
        with plan:
            assert torch.equal(model(x), expected[0])
        plan.refill(second)
        with plan:
            assert torch.equal(model(x), expected[1])
            assert torch.equal(model(x.flatten(0, 1)), expected[1].flatten(0, 1))
        bank.bind(plan)
        assert torch.equal(model(x), expected[1])
        with bank.route(first):
            assert torch.equal(model(x), expected[0])
        for bad, error, said in (
            (second[:3], ValueError, "rows must have 4 entries"),
            ([*second[:3], "eve"], UnknownAdapterError, "eve"),
        ):
            with pytest.raises(error, match=said):
                plan.refill(bad)
            assert torch.equal(model(x), expected[1])
    after = [tensor for pair in plan.tensors(2) for tensor in pair]
    assert [tensor.data_ptr() for tensor in after] == [tensor.data_ptr() for tensor in before]
    bank.bind(None)
    plan.close()
    assert bank.stats()["in_use"] == 0
    with pytest.raises(ValueError, match="the plan is closed"):
        plan.refill(first)


def test_what_a_plan_says(folders: dict[str, Path]):
    bank = make_bank(Model(), {"lora": folders["lora"], "b": folders["lora_alphas"], "boft": folders["boft"]})
    slots = {}
    with bank.plan(["b", None, "lora", "b", "boft"], tokens=3) as plan:
        lora, boft = plan.tensors(1)
        assert sorted(lora[0].tolist()) == sorted(boft[0].tolist()) == list(range(5))
        for rows, of in (lora, boft):
            slots.update({r: s for r, s in zip(rows.tolist(), of.tolist(), strict=True) if s >= 0})
            assert sorted(of.tolist()[of.tolist().index(-1) :]) == of.tolist()[of.tolist().index(-1) :]  # none is last
        assert slots[0] == slots[3] != slots[2]
        rows, of = plan.tensors(3)[0]
        assert len(rows) == len(of) == 15
        assert rows.tolist() == [r * 3 + i for r in lora[0].tolist() for i in range(3)]
        assert of.tolist() == [s for s in lora[1].tolist() for _ in range(3)]
        assert rows.dtype == of.dtype == torch.int32


def test_a_plan_meets_a_family_that_came_later(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"lora": folders["lora"]})
    plan = bank.plan(["lora", None])
    bank.load("boft", folders["boft"])
    with pytest.raises(ValueError, match=r"'boft' is of BOFTFamily.*make a new plan"):
        plan.refill(["boft", None])
    assert bank.stats()["in_use"] == 1
    bank.plan(["lora", None]).refill(["boft", None])


def test_a_plan_outlives_the_last_adapter_of_a_family(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"lora": folders["lora"]})
    plan = bank.plan(["lora", None])
    plan.refill([None, None])
    bank.unload("lora")
    bank.load("other", folders["lora_alphas"])
    plan.refill(["other", None])
    x = randn(2, IN)
    with torch.no_grad(), plan:
        torch.testing.assert_close(model(x)[0], fastpeft.load_adapter(Model(), folders["lora_alphas"])(x)[0])
    plan.close()
    bank.unload("other")
    assert bank.stats()["table_bytes"] == 0


def test_a_plan_makes_room_for_itself(folders: dict[str, Path]):
    """One batch's adapters fit: a plan that holds them is refilled with others, and closed where those are refused."""
    model = Model().requires_grad_(False)
    names = ["lora", "lora_alphas", "lora_other_ranks"]
    bank = make_bank(model, {name: folders[name] for name in names}, max_resident=2, timeout=0)
    x = randn(2, IN)
    plan = bank.plan(["lora", "lora"])
    for rows in (["lora", "lora_alphas"], ["lora_other_ranks", "lora"], ["lora_alphas", "lora_other_ranks"]):
        plan.refill(rows)
        with torch.no_grad(), plan:
            found = model(x)
        for b, name in enumerate(rows):
            expected = fastpeft.load_adapter(Model(), folders[name])(x)
            torch.testing.assert_close(found[b], expected[b].detach())
    for name in ("boft", "fourierft"):
        bank.register(name, folders[name])
    with pytest.raises(ValueError, match="make a new plan"):
        plan.refill(["boft", "fourierft"])
    with pytest.raises(ValueError, match="the plan is closed"):
        plan.refill(["lora", "lora"])
    with torch.no_grad(), plan, pytest.raises(ValueError, match="the plan is closed"):
        model(x[None])
    assert bank.stats()["in_use"] == 0


def test_compiled(folders: dict[str, Path]):
    """One graph for every batch that a plan is refilled with."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, {name: folders[name] for name in ("lora", "mos", "boft", "fourierft")})
    x = randn(4, 2, IN)
    plan = bank.plan(["lora"] * 4, tokens=2)
    bank.bind(plan)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(x)  # which implementations there are is looked up once, and a graph would see that it changed
        for rows in (["lora", "mos", "boft", "fourierft"], [None, "mos", None, "lora"], [None] * 4):
            plan.refill(rows)
            assert torch.equal(compiled(x), model(x)), rows
    assert len(graphs) == 1


def test_compiled_and_routed(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"lora": folders["lora"], "boft": folders["boft"]})
    x = randn(2, 2, IN)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for rows in (["lora", "boft"], [None, "lora"], ["boft", "boft"]):
            expected = served(bank, model, x, rows)
            with bank.route(rows):
                torch.testing.assert_close(compiled(x), expected)
        assert torch.equal(compiled(x), model(x))


def test_under_autocast(folders: dict[str, Path]):
    base = Model().requires_grad_(False)
    model = copy.deepcopy(base)
    bank = make_bank(model, folders)

    def run(model: nn.Module, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            return model(x)

    check_rows(model, Switched(base, folders), randn(len(MIXED), 3, IN), MIXED, bank, run)


def test_forward_only(folders: dict[str, Path]):
    model = Model()
    bank = make_bank(model, {"lora": folders["lora"]})
    with bank.route(["lora"]):
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            model(randn(1, IN))
        with torch.inference_mode():
            model(randn(1, IN))


def test_the_model_stays_what_it_was(folders: dict[str, Path], tmp_path: Path):
    model = Model().requires_grad_(False)
    layer, weight, keys = model.blocks[0].up, model.blocks[0].up.weight, list(model.state_dict())
    x = randn(2, IN)
    expected = model(x)
    bank = make_bank(model, folders)
    assert model.blocks[0].up is layer and layer.weight is weight and isinstance(layer, nn.Linear)
    assert list(model.state_dict()) == keys
    assert type(model.head) is nn.Linear  # the output layer is none of "all-linear"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.blocks[0].up) is nn.Linear
        assert torch.equal(twin(x), expected)
    with pytest.raises(ValueError, match="served by a bank already"):
        AdapterBank(model)
    stacked = make_bank(stacked_model := Model())
    fastpeft.adapt(stacked_model, LORA.config())
    with pytest.raises(ValueError, match="model holds adapters"):
        stacked.close()
    bank.close()
    assert type(layer) is nn.Linear and torch.equal(model(x), expected)
    assert vars(layer).keys() == vars(Model().blocks[0].up).keys()
    again = make_bank(model, folders)
    assert not torch.equal(served(again, model, x, ["lora", None])[0], expected[0])


def test_a_fused_encoder_layer(tmp_path: Path):
    """PyTorch's encoder computes past its layers, unless something in it has a hook."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(IN, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)

    folder = save(tmp_path / "lora", LORA.config(target_modules=["linear1", "linear2"]), base=make)
    model, oracle = make(), fastpeft.load_adapter(make(), folder)
    bank = make_bank(model, {"lora": folder}, target_modules=["linear1", "linear2"])
    x = randn(2, 5, IN)
    base = model(x)
    found = served(bank, model, x, ["lora", None])
    torch.testing.assert_close(found[0], oracle(x)[0])
    torch.testing.assert_close(found[1], base[1])
    assert not torch.allclose(found[0], base[0])


def test_a_language_model(tmp_path: Path):
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = transformers.LlamaConfig(**sizes, **heads)
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)

    names = ["lora", "mos", "boft", "boft_one_factor", "fourierft", "fourierft_transposed"]
    configs = {name: OPTIONS[name] for name in names}
    configs["some"] = LORA.config(target_modules=["q_proj", "v_proj"], r=2)
    folders = save_all(tmp_path, configs, make)
    base = make()
    model = copy.deepcopy(base)
    bank = make_bank(model, folders)
    rows = [*configs, None]
    tokens = torch.randint(0, 61, (len(rows), 7), generator=torch.Generator().manual_seed(1))
    check_rows(model, Switched(base, folders), tokens, rows, bank, lambda model, x: model(x).logits)

    with torch.no_grad(), bank.route(rows):  # prefill, then decoding with a cache: rows are planned for both
        found = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    oracle = Switched(base, folders)
    for b, name in enumerate(rows):
        fastpeft.set_adapter(oracle.model, name)
        alone = oracle.model.generate(tokens[b : b + 1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(found[b], alone[0]), name
