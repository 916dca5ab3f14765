"""What test_distributed.py runs on several processes, all cases in one launch:

    torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER

Every process writes FOLDER/<rank>.json: for each case an empty string, or what went wrong. After that it stops, since
the processes no longer agree on what they are doing.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import BOFT, FOURIERFT, LORA, MOS, OFT, Errors, assert_unchanged, fill, randn, snapshot
from small_models import QuantisedLinear
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import sharded
from fastpeft.interop.distributed import ColumnParallel, RowParallel, keep_whole, once

WIDTH, HIDDEN, BATCH, TOKENS, STEPS, DRAWS = 32, 64, 8, 3, 3, 4

# Layers of 32 -> 32, 32 -> 64 and 64 -> 32. Windows of 8 features fit into the shards of 4 processes; one of 64 crosses
# those of 2.
CONFIGS = {
    "lora": LORA.config(),
    "dora": LORA.config(use_dora=True),
    "mos": MOS.config(),
    "boft": BOFT.config(),
    "boft_wide": BOFT.config(boft_n_butterfly_factor=5, target_modules=["down"]),
    "fourierft": FOURIERFT.config(),
    "oft": OFT.config(),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(self.norm(x))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, recompute: bool = False, skip: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 6)
        self.recompute, self.skip = recompute, skip

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i != self.skip:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def make(method: str, values: int = 0, train_base: bool = False, **options: Any) -> Model:
    torch.manual_seed(0)
    model = fastpeft.adapt(Model(**options), CONFIGS[method])
    for layer in (model.blocks[0].up, model.blocks[0].down) if train_base else ():
        layer.requires_grad_(True)
    return fill(model, values)


def inputs(step: int) -> Tensor:
    return randn(BATCH, TOKENS, WIDTH, seed=10 + step)


def loss_of(y: Tensor) -> Tensor:
    return y.square().log1p().mean()  # not to run away


def mine(x: Tensor) -> Tensor:
    """This process's share of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def mean(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9)


def results(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    weights = {name: full(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), **weights}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
    forward: Callable | None = None,
    batch: Callable[[Tensor], Tensor] = lambda x: x,
    total: Callable[[Tensor], Tensor] = lambda loss: loss.detach(),
) -> dict[str, Tensor]:
    """Losses and adapter weights after some steps of one process, or of all of them."""
    forward = forward or model
    optimizer = optimizer or make_optimizer(model)
    dtype = next(model.parameters()).dtype
    losses = []
    for step in steps:
        loss = loss_of(forward(batch(inputs(step).to(dtype))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total(loss))
    return results(getattr(model, "module", model), losses)


@cache
def single(method: str, values: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    return train(make(method, values, **options).to(dtype))


def compare(run: Callable[[Model], dict[str, Tensor]], method: str, composition: Any = None, **options: Any) -> None:
    """A run on many processes is at most twice as far from the float64 run of one as the float32 run of one is."""
    errors = Errors()
    for values in range(DRAWS):
        found, exact = run(make(method, values, **options)), single(method, values, torch.float64, **options)
        if composition is None:
            composed = single(method, values, torch.float32, **options)
        else:
            composed = composition(make(method, values, **options))
        assert found.keys() == exact.keys()
        for name, tensor in found.items():
            errors.add(name, tensor, exact[name], (composed[name], exact[name]))
    errors.check()


shared = partial(train, batch=mine, total=mean)  # data parallel: a batch is cut, losses are averaged


# Data parallel


def ddp(method: str) -> None:
    compare(lambda model: shared(DistributedDataParallel(model)), method)


def ddp_buckets() -> None:
    """Small buckets, a static graph and gradients that are views of them."""
    options = {"bucket_cap_mb": 1e-3, "gradient_as_bucket_view": True, "static_graph": True}
    for method in ("mos", "boft"):
        compare(lambda model: shared(DistributedDataParallel(model, **options)), method)


def ddp_unused(method: str) -> None:
    """A block that no process calls: a pool is still used by the other one."""
    compare(lambda model: shared(DistributedDataParallel(model, find_unused_parameters=True)), method, skip=1)


def ddp_accumulate(method: str) -> None:
    def run(single: Model) -> dict[str, Tensor]:
        model = DistributedDataParallel(single)
        return accumulate(model, lambda last: nullcontext() if last else model.no_sync())

    compare(run, method)


def accumulate(model: nn.Module, synchronise: Callable[[bool], Any]) -> dict[str, Tensor]:
    """Two pieces of a batch before each step."""
    optimizer, losses = make_optimizer(model), []
    for step in range(STEPS):
        pieces = mine(inputs(step)).chunk(2)
        total = torch.zeros(())
        for i, piece in enumerate(pieces):
            with synchronise(i + 1 == len(pieces)):
                loss = loss_of(model(piece)) / len(pieces)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(total))
    return results(getattr(model, "module", model), losses)


# Fully sharded


def shard(model: Model, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    mesh = mesh or whole_mesh()
    whole = keep_whole(model, mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole, **options)
    return fully_shard(model, mesh=mesh, ignored_params=whole, **options)


def fsdp(method: str) -> None:
    compare(lambda model: shared(shard(model)), method)


def fsdp_layers(method: str) -> None:
    """Every adapted layer a group of its own."""

    def run(model: Model) -> dict[str, Tensor]:
        mesh = whole_mesh()
        whole = keep_whole(model, mesh)
        for layer in [module for module in model.modules() if isinstance(module, fastpeft.nn.Adapted)]:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        return shared(fully_shard(model, mesh=mesh, ignored_params=whole))

    compare(run, method)


def fsdp_hybrid(method: str) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    compare(lambda model: shared(shard(model, mesh)), method)


def fsdp_recompute(method: str) -> None:
    compare(lambda model: shared(shard(model)), method, recompute=True)


def fsdp_accumulate(method: str) -> None:

    def run(model: Model) -> dict[str, Tensor]:
        def synchronise(last: bool) -> Any:
            model.set_requires_gradient_sync(last)
            return nullcontext()

        return accumulate(shard(model), synchronise)

    compare(run, method)


def fsdp_bfloat16(method: str) -> None:
    """Parameters are rounded for the computation, as one process can do it; MoS's pools are not."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def composition(single: Model) -> dict[str, Tensor]:
        def forward(x: Tensor) -> Tensor:
            parameters = dict(single.named_parameters())
            rounded = {name: p if ".pool_" in name else p.bfloat16() for name, p in parameters.items()}
            return functional_call(single, rounded, x.bfloat16())

        return train(single, forward=forward)

    compare(lambda model: shared(shard(model, mp_policy=policy)), method, composition)


def fsdp_trained_later() -> None:
    """Pools that were frozen when the model was sharded."""

    def run(model: Model) -> dict[str, Tensor]:
        pools = [p for name, p in model.named_parameters() if ".pool_" in name]
        for pool in pools:
            pool.requires_grad_(False)
        model = shard(model)
        model(inputs(0))
        for pool in pools:
            pool.requires_grad_(True)
        return shared(model)

    compare(run, "mos")


def fsdp_refuses_shared_pools() -> None:
    model = make("mos")
    with pytest.raises(ValueError, match="keep_whole"):
        fully_shard(model.blocks[0])


def fsdp_starts_from_the_first_process() -> None:
    model = make("mos", values=dist.get_rank())
    keep_whole(model, whole_mesh())
    for name, value in make("mos").named_parameters():
        if "blocks" in name:
            assert torch.equal(dict(model.named_parameters())[name], value), name


# Tensor parallel


def styles(blocks: str = "*") -> dict[str, Any]:
    """All but the head, whose adapter is an ordinary one on every process."""
    return {
        f"blocks.{blocks}.q": ColumnParallel(output_layouts=Replicate()),
        f"blocks.{blocks}.up": ColumnParallel(),
        f"blocks.{blocks}.down": RowParallel(),
    }


def cut(model: Model, mesh: DeviceMesh | None = None, blocks: str = "*") -> Model:
    return parallelize_module(model, mesh or whole_mesh(), styles(blocks))


def alike(model: nn.Module) -> None:
    """Every process has the same adapter, bit for bit."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = parameter.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, parameter), name


def tp(method: str) -> None:
    def run(model: Model) -> dict[str, Tensor]:
        found = train(cut(model))
        alike(model)
        return found

    compare(run, method)


def tp_recompute(method: str) -> None:
    compare(lambda model: train(cut(model)), method, recompute=True)


def tp_part(method: str) -> None:
    """One block alone: layers that share a pool are partly cut and partly whole."""
    compare(lambda model: train(cut(model, blocks="0")), method)


def tp_sequence(method: str) -> None:
    """Activations cut along the sequence between layers, as sequence parallelism has them."""
    model = make(method)
    layouts = {"input_layouts": Shard(0), "use_local_output": True}
    parallelize_module(
        model,
        whole_mesh(),
        {
            "blocks.*.q": ColumnParallel(output_layouts=Shard(0), **layouts),
            "blocks.*.up": ColumnParallel(**layouts),
            "blocks.*.down": RowParallel(output_layouts=Shard(0)),
        },
    )
    # Outside of the layers every process has its own part of the tokens.
    with torch.no_grad():
        found, expected = model(mine(inputs(0))), mine(make(method)(inputs(0)))
    torch.testing.assert_close(found, expected)


def tp_without_gradients(method: str) -> None:
    model, single, exact = cut(make(method)).eval(), make(method).eval(), make(method).double().eval()
    for active in ("default", None):
        for one in (model, single, exact):
            fastpeft.set_adapter(one, active)
        with torch.no_grad():
            errors, truth = Errors(), exact(inputs(0).double())
            errors.add("y", model(inputs(0)), truth, (single(inputs(0)), truth))
        errors.check()


def tp_trained_base() -> None:
    """Weights and biases that are trained beside the adapter."""
    compare(lambda model: train(cut(model)), "lora", train_base=True)


def tp_starts_from_the_first_process() -> None:
    model = cut(make("lora", values=dist.get_rank()))
    for name, value in make("lora").named_parameters():
        if "blocks" in name:
            assert torch.equal(full(dict(model.named_parameters())[name]), value), name


def tp_refuses() -> None:
    mesh = whole_mesh()

    def refused(layer: nn.Module, style: Any, words: str) -> None:
        before = snapshot(layer)
        with pytest.raises(ValueError, match=words):
            parallelize_module(layer, mesh, style)
        assert_unchanged(layer, before)

    def adapted(linear: nn.Linear, config: Any) -> Any:
        return fastpeft.adapt(linear, config)

    for style, linear in ((ColumnParallel(), nn.Linear(8, 7)), (RowParallel(), nn.Linear(7, 8))):
        refused(adapted(linear, LORA.config()), style, "=7 is no multiple")
    refused(adapted(nn.Linear(8, 8), LORA.config(use_dora=True)), RowParallel(), "norm of a row")
    refused(adapted(nn.Linear(8, 8), OFT.config(coft=True)), ColumnParallel(), "coft")
    refused(adapted(QuantisedLinear(8, 8), LORA.config()), ColumnParallel(), "takes adapted nn.Linear layers")
    merged = adapted(nn.Linear(8, 8), LORA.config())
    fastpeft.merge(merged)
    refused(merged, ColumnParallel(), "unmerge first")

    dropping = parallelize_module(adapted(nn.Linear(8, 8), LORA.config(lora_dropout=0.1)), mesh, ColumnParallel())
    with pytest.raises(ValueError, match="dropout"):
        dropping(randn(3, 8))
    dropping.eval()(randn(3, 8))
    with pytest.raises(ValueError, match="cut already"):
        parallelize_module(dropping, mesh, ColumnParallel())
    with pytest.raises(ValueError, match="spread over processes"):
        fastpeft.adapt(dropping, LORA.config(), "late")

    two = fastpeft.adapt(adapted(nn.Linear(8, 8), LORA.config()), MOS.config(), "second")
    two = parallelize_module(two, mesh, RowParallel())
    two(mine_of_features(randn(3, 8)))
    fastpeft.set_adapter(two, ["default", "second"])
    with pytest.raises(ValueError, match="one active adapter"):
        two(mine_of_features(randn(3, 8)))
    fastpeft.set_adapter(two, "second")
    with pytest.raises(ValueError, match="x must have shape"):
        two(randn(3, 8))

    late = parallelize_module(nn.Linear(8, 8), mesh, ColwiseParallel())
    with pytest.raises(ValueError, match="spread over processes"):
        fastpeft.adapt(late, LORA.config())


def mine_of_features(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def tp_communication() -> None:
    """What is communicated beside what the base communicates: gradients of adapters; x where BOFT's windows need it."""
    base = communicated(cut(Model()))
    # q is gathered and down added up in both blocks; on the way back, x of q and up.
    assert base == ({"all_gather": 2, "all_reduce": 2}, {"all_reduce": 4}), base
    # On the way back one sum for each of six layers, or of three kinds; the head is an ordinary layer.
    for method, sums in (("lora", 6), ("mos", 3), ("boft", 6), ("fourierft", 6)):
        found = communicated(cut(make(method)))
        assert found == (base[0], {"all_reduce": 4 + sums}), (method, found)
    found = communicated(cut(make("boft_wide")))
    assert found == ({"all_gather": 4, "all_reduce": 2}, {"all_reduce": 4 + 2, "reduce_scatter": 2}), found


def communicated(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """The numbers of collectives forward and backward."""

    def plain(counts: dict[Any, int]) -> dict[str, int]:
        names = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
        found = {str(key).rpartition(".")[2]: count for key, count in counts.items()}
        return {names.get(name, name): count for name, count in found.items()}

    x = inputs(0).requires_grad_()
    with CommDebugMode() as forward:
        loss = loss_of(model(x))
    with CommDebugMode() as backward:
        loss.backward()
    return plain(forward.get_comm_counts()), plain(backward.get_comm_counts())


def tp_plain_layers() -> None:
    """The styles do for a layer without an adapter what PyTorch's do."""
    model = Model()
    expected = model(inputs(0))
    torch.testing.assert_close(cut(model)(inputs(0)), expected)


def both(model: Model) -> Model:
    mesh = two_dimensional_mesh()
    return shard(cut(model, mesh["tensor"]), mesh["data"])


@cache
def two_dimensional_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))


def two_dimensions(method: str) -> None:
    """Fully sharded over pairs of processes, which divide the layers between them."""
    data = two_dimensional_mesh()["data"]

    def batch(x: Tensor) -> Tensor:
        return x.chunk(data.size())[data.get_local_rank()]

    compare(lambda model: train(both(model), batch=batch, total=mean), method)


def compiled(method: str, spread: Callable[[Model], Model], run: Callable[..., dict[str, Tensor]]) -> None:
    """torch.compile of a model with shared pools, whose gradients leave a compiled graph layer by layer."""

    def through_dynamo(model: Model) -> dict[str, Tensor]:
        graph = torch.compile(spread(model), backend="aot_eager")
        return run(model, forward=lambda x: graph(x))

    compare(through_dynamo, method)


# Files


def resume(method: str, spread: Callable[[Model], Model], step: Callable[..., dict[str, Tensor]]) -> None:
    """PyTorch's distributed checkpoint of adapter and optimizer: what goes on from it is what went on without it."""
    options = StateDictOptions(ignore_frozen_params=True)
    model = spread(make(method))
    optimizer = make_optimizer(model)
    step(model, optimizer, steps=range(2))
    folder = shared_folder(f"checkpoint-{method}-{spread.__name__}")
    weights, states = get_state_dict(model, optimizer, options=options)
    weights = once(weights)
    assert sum(".pool_A" in name for name in weights) == (4 if method == "mos" else 0)  # of four kinds of layers
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    expected = step(model, optimizer, steps=range(2, 3))

    model = spread(make(method, values=1))
    optimizer = make_optimizer(model)
    weights, states = get_state_dict(model, optimizer, options=options)
    weights = once(weights)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    lenient = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=lenient)
    found = step(model, optimizer, steps=range(2, 3))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def folders(method: str, spread: Callable[[Model], Model]) -> None:
    """save_adapter writes whole tensors, once, and load_adapter reads them, here and on one process."""
    folder = shared_folder(f"adapter-{method}-{spread.__name__}")
    model = spread(make(method, values=1))
    with torch.no_grad():
        model(inputs(0))  # fully_shard may leave parameters gathered
    writers = torch.tensor(float(sharded.gather(model, dict(model.named_parameters())) is not None))
    dist.all_reduce(writers)
    assert writers == 1
    fastpeft.save_adapter(model, folder)
    dist.barrier()
    single = fastpeft.load_adapter(Model(), folder)
    other = spread(make(method))
    with torch.no_grad():
        other(inputs(0))
    fastpeft.load_adapter(other, folder)
    wanted = dict(make(method, values=1).named_parameters())
    for name, parameter in single.named_parameters():
        if "adapters" in name:
            assert torch.equal(parameter, wanted[name]), name
            assert torch.equal(full(dict(other.named_parameters())[name]), wanted[name]), name
    with torch.no_grad():
        torch.testing.assert_close(other(inputs(0)), make(method, values=1)(inputs(0)))
    with pytest.raises(ValueError, match="spread over processes"):
        fastpeft.load_adapter(other, folder, "late")


def for_one_process() -> None:
    for spread in (shard, cut):
        model = spread(make("lora"))
        with pytest.raises(ValueError, match="spread over processes"):
            fastpeft.merge(model)
    with pytest.raises(ValueError, match="spread over processes"):
        fastpeft.export_lora(shard(make("lora")), shared_folder("exported"))


FOLDER = Path()


def shared_folder(name: str) -> str:
    return str(FOLDER / f"{name}-{dist.get_world_size()}")


def whole_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


FOUR = ("lora", "mos", "boft", "fourierft")


def each(case: Callable, methods: Iterable[str] = FOUR, **ways: tuple) -> dict[str, Callable[[], None]]:
    """A case by name for every method, and for every way to spread a model if there are several."""
    if not ways:
        return {f"{case.__name__}-{method}": partial(case, method) for method in methods}
    return {
        f"{case.__name__}-{method}-{name}": partial(case, method, *way)
        for method in methods
        for name, way in ways.items()
    }


ON_TWO_AND_FOUR: dict[str, Callable[[], None]] = {
    **each(ddp, CONFIGS),
    **each(fsdp, CONFIGS),
    **each(tp, [method for method in CONFIGS if method != "dora"]),
    **each(resume, ["lora", "mos"], shard=(shard, shared), cut=(cut, train)),
    **{case.__name__: case for case in (fsdp_starts_from_the_first_process, tp_refuses, tp_communication)},
}
ON_TWO: dict[str, Callable[[], None]] = {
    **each(resume, ["boft", "fourierft"], shard=(shard, shared), cut=(cut, train)),
    **each(folders, shard=(shard,), cut=(cut,)),
    **each(ddp_unused, ["lora", "mos"]),
    **each(ddp_accumulate, ["lora", "mos"]),
    **each(fsdp_layers, ["mos", "boft"]),
    **each(fsdp_recompute),
    **each(fsdp_accumulate, ["lora", "mos"]),
    **each(fsdp_bfloat16),
    **each(tp_recompute, ["mos", "boft"]),
    **each(tp_part, ["mos"]),
    **each(tp_sequence),
    **each(tp_without_gradients, [*FOUR, "boft_wide"]),
    **each(compiled, ["mos"], shard=(shard, shared), cut=(cut, train)),
    **{
        case.__name__: case
        for case in (
            ddp_buckets,
            fsdp_refuses_shared_pools,
            fsdp_trained_later,
            tp_trained_base,
            tp_starts_from_the_first_process,
            tp_plain_layers,
            for_one_process,
        )
    },
}
ON_FOUR: dict[str, Callable[[], None]] = {
    **each(fsdp_hybrid),
    **each(two_dimensions),
    **each(folders, both=(both,)),
}


def cases(world: int) -> dict[str, Callable[[], None]]:
    return {**ON_TWO_AND_FOUR, **(ON_FOUR if world == 4 else ON_TWO)}


def main(folder: str, *names: str) -> None:
    global FOLDER
    FOLDER = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    done: dict[str, str] = {}
    for name, case in cases(dist.get_world_size()).items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        try:
            case()
            done[name] = ""
        except BaseException:
            done[name] = traceback.format_exc()
        print(f"{dist.get_rank()} {name} {time.perf_counter() - start:.2f} s", file=sys.stderr)
        (FOLDER / f"{dist.get_rank()}.json").write_text(json.dumps(done))
        if done[name]:
            print(done[name], file=sys.stderr)
            os._exit(1)
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
