"""An adapter trained on several processes, in one of three ways; docs/several-gpus.md explains them.

torchrun --nproc-per-node 2 examples/distributed.py --way tp --method mos --out out/distributed
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from fastpeft.interop.distributed import ColumnParallel, RowParallel, keep_whole, once

CONFIGS = {
    "lora": fastpeft.LoraConfig(target_modules=["up", "down"]),
    "mos": fastpeft.MosConfig(target_modules=["up", "down"]),
    "boft": fastpeft.BOFTConfig(target_modules=["up", "down"], boft_block_size=8, boft_n_butterfly_factor=2),
    "fourierft": fastpeft.FourierFTConfig(target_modules=["up", "down"]),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def ddp(model: Model, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def fsdp(model: Model, mesh: DeviceMesh) -> nn.Module:
    whole = keep_whole(model, mesh)  # MoS's pools, which belong to several blocks
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def tp(model: Model, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"blocks.*.up": ColumnParallel(), "blocks.*.down": RowParallel()})


WAYS = {"ddp": ddp, "fsdp": fsdp, "tp": tp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="fsdp")
    parser.add_argument("--method", choices=CONFIGS, default="lora")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/distributed"))
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world,))

    torch.manual_seed(0)  # the same weights and the same data on every process
    model = fastpeft.adapt(Model().to(device), CONFIGS[arguments.method])
    x, target = torch.randn(2, 32, 16, 64).to(device)
    model = WAYS[arguments.way](model, mesh)
    optimizer = torch.optim.AdamW(fastpeft.adapter_parameters(model), lr=1e-2)

    if arguments.way != "tp":  # every process has its own part of the data; with tp all work on the same
        x, target = x.chunk(world)[rank], target.chunk(world)[rank]
    for step in range(arguments.steps):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item() / world:.4f}")

    # To go on from: adapter and optimizer, every process its own part.
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"model": once(weights), "optimizer": states}, checkpoint_id=arguments.out / "checkpoint")
    # To use: an ordinary adapter, whole. All processes ask for it, one writes; DDP's all have everything.
    if arguments.way != "ddp" or rank == 0:
        fastpeft.save_adapter(getattr(model, "module", model), arguments.out / "adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
