"""Parameter counts on Llama-2-7B, without its weights, against the figures in the methods' papers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fastpeft

transformers = pytest.importorskip("transformers")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


class RealMemory(TorchDispatchMode):
    """Sums up the bytes of the tensors that operations make outside of the meta device."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(t.nbytes for t in tree_iter(result) if isinstance(t, torch.Tensor) and not t.is_meta)
        return result


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    return model


def adapted(model, config):
    """The trainable parameters by name, each once, all of them without memory."""
    fastpeft.adapt(model, config)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".adapters." in name for name in trainable)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *trainable.values()])
    assert {id(p) for p in fastpeft.adapter_parameters(model)} == {id(p) for p in trainable.values()}
    return trainable


def count(parameters):
    return sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize(
    "config, expected, published",
    [
        # FourierFT (arXiv 2405.03003), LLaMA2-7B: LoRA 33.5M and FourierFT 0.064M
        pytest.param(
            fastpeft.LoraConfig(r=64, target_modules=["q_proj", "v_proj"]),
            33_554_432,
            "33.55M",
            id="lora-64-query-value",
        ),
        pytest.param(
            fastpeft.FourierFTConfig(n_frequency=1000, target_modules=["q_proj", "v_proj"]),
            64_000,
            "0.06M",
            id="fourierft",
        ),
        # MoS (arXiv 2410.00938), LLaMA2-7B: 5.00M, both for LoRA of rank 2 and for MoS of rank 8 in its budget
        pytest.param(fastpeft.LoraConfig(r=2, target_modules=SEVEN), 4_997_120, "5.00M", id="lora-2-all"),
        pytest.param(
            fastpeft.MosConfig(r=8, pool_rank=2, shards_per_vector=4, private_rank=1, target_modules=SEVEN),
            4_997_120,
            "5.00M",
            id="mos",
        ),
        # "all-linear" is the same seven: the output embedding is left out
        pytest.param(fastpeft.LoraConfig(r=2, target_modules="all-linear"), 4_997_120, "5.00M", id="lora-2-all-linear"),
    ],
)
def test_parameters(llama, config, expected, published):
    parameters = adapted(llama, config)
    assert count(parameters) == expected
    assert f"{expected / 1e6:.2f}M" == published


def test_mos_pools_are_shared(llama):
    """Seven kinds of layers, each with two pools for all its 32 layers; the pool's size does not depend on r."""
    config = fastpeft.MosConfig(r=16, pool_rank=2, shards_per_vector=4, private_rank=1, target_modules=SEVEN)
    parameters = adapted(llama, config)
    assert len(parameters) == 14 and count(parameters) == 4_997_120


@pytest.mark.parametrize(
    "block_size, factors, published",
    [
        pytest.param(16, 1, "0.13%", id="oft-b16"),
        pytest.param(8, 2, "0.12%", id="boft-b8-m2"),
    ],
)
def test_boft_degrees_of_freedom(llama, block_size, factors, published):
    """BOFT (arXiv 2311.06243), Llama-2-7B. The paper counts the skew-symmetric part of a block, b (b − 1) / 2 numbers,
    which is what can be trained in its b² entries, and not the scales."""
    total = sum(parameter.numel() for parameter in llama.parameters())
    config = fastpeft.BOFTConfig(boft_block_size=block_size, boft_n_butterfly_factor=factors, target_modules=SEVEN)
    parameters = adapted(llama, config)
    rotations = {name: parameter for name, parameter in parameters.items() if name.endswith("boft_R")}
    assert len(rotations) == 7 * 32
    freedom = 0
    for parameter in rotations.values():
        m, blocks, b, _ = parameter.shape
        freedom += m * blocks * b * (b - 1) // 2
    in_features = 32 * (6 * 4096 + 11008)
    assert freedom == in_features * factors * (block_size - 1) // 2
    assert f"{100 * freedom / total:.2f}%" == published
    # What is stored besides: the whole blocks, and a scale for each output.
    out_features = 32 * (5 * 4096 + 2 * 11008)
    assert count(parameters) == in_features * factors * block_size + out_features


def test_oft_stores_its_degrees_of_freedom(llama):
    """OFT of the same table, b = 16: the skew-symmetric part and nothing else."""
    total = sum(parameter.numel() for parameter in llama.parameters())
    parameters = adapted(llama, fastpeft.OFTConfig(oft_block_size=16, target_modules=SEVEN))
    assert count(parameters) == 32 * (6 * 4096 + 11008) * 15 // 2
    assert f"{100 * count(parameters) / total:.2f}%" == "0.13%"


@pytest.mark.parametrize(
    "config, limit",
    [
        pytest.param(fastpeft.LoraConfig(r=64, target_modules=SEVEN), 0, id="lora"),
        pytest.param(
            fastpeft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=SEVEN), 0, id="boft"
        ),
        # Shard numbers are drawn on the CPU whatever the device: 7 · 2 · 32 · r · l of eight bytes, copied a few times.
        pytest.param(fastpeft.MosConfig(target_modules=SEVEN), 2**21, id="mos"),
        # For all 64 layers: index tables and, for a moment, one permutation of 4096² places, drawn as PEFT does.
        pytest.param(
            fastpeft.FourierFTConfig(n_frequency=1000, target_modules=["q_proj", "v_proj"]),
            8 * 4096**2 + 2**21,
            id="fourierft",
        ),
        pytest.param(fastpeft.OFTConfig(oft_block_size=32, target_modules=SEVEN), 0, id="oft"),
    ],
)
def test_adapting_allocates_next_to_nothing(llama, config, limit):
    with RealMemory() as memory:
        adapted(llama, config)
    assert memory.bytes <= limit
