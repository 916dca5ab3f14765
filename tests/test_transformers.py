"""Adapters on transformers' models of every build, in their trainer and their generation, at tiny sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHODS, every_method, fill
from torch import nn

import fastpeft
from fastpeft.nn import Adapted

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
# Sizes are multiples of 24, as the methods' small options want.


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=16)
        ),
        "albert": lambda: transformers.AlbertForMaskedLM(  # one block, used in every layer
            transformers.AlbertConfig(**SMALL, embedding_size=24, intermediate_size=48, max_position_embeddings=16)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(  # of Conv1D
            transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_positions=32)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(  # an output layer that shares the embedding's weight
            transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=True)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=61, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "bart": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
            )
        ),
    }  # fmt: skip
    return made[kind]().eval()


KINDS = ["bert", "albert", "gpt2", "llama", "t5", "bart"]
GENERATING = ["gpt2", "llama", "t5", "bart"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted_model(kind: str, method, **changes) -> nn.Module:
    options = {"mos": {"pool_rank": 4, "r": 3}}.get(method.name, {})
    return fill(fastpeft.adapt(make(kind), method.config(**options, **changes)))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-5) -> None:
    """Not bit for bit: the library's attention depends on where its operands happen to lie."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * wanted.abs().max().item())


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_method
@every_kind
def test_adapted_trained_merged_and_saved(kind: str, method, tmp_path: Path):
    base = make(kind)
    logits = base(input_ids=IDS, labels=IDS).logits
    fresh = fastpeft.adapt(make(kind), method.config(**({"pool_rank": 4} if method.name == "mos" else {})))
    assert_near(fresh(input_ids=IDS, labels=IDS).logits, logits)

    model = adapted_model(kind, method)
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    assert len(layers) >= 6 and model.get_output_embeddings() not in layers
    gradients = gradients_of(model)
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients.values())
    assert sum(g.abs().sum() > 0 for g in gradients.values()) == len(gradients)
    assert all(p.grad is None for name, p in model.named_parameters() if "adapters." not in name)

    changed = model(input_ids=IDS, labels=IDS).logits
    assert (changed - logits).abs().max() > 1e-4
    fastpeft.save_adapter(model, tmp_path)
    assert_near(fastpeft.load_adapter(make(kind), tmp_path)(input_ids=IDS, labels=IDS).logits, changed)
    fastpeft.merge(model)
    merged = model(input_ids=IDS, labels=IDS).logits
    assert_near(merged, changed, 1e-4)
    fastpeft.unmerge(model)
    fastpeft.set_adapter(model, None)
    assert_near(model(input_ids=IDS, labels=IDS).logits, logits)


@every_method
@pytest.mark.parametrize("kind", GENERATING)
def test_generation_with_a_cache(kind: str, method):
    model = adapted_model(kind, method)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **settings))
    assert with_cache.shape[1] > 1


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing(kind: str, reentrant: bool, method):
    model = adapted_model(kind, method)
    wanted = gradients_of(model)
    model.train()  # dropout is zero in Llama; in Bert it is turned off below
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients_of(model)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loaded_onto_the_meta_device_first(method, tmp_path: Path):
    base = make("llama")
    base.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, low_cpu_mem_usage=True)
    options = {"pool_rank": 4} if method.name == "mos" else {}
    model = fill(fastpeft.adapt(loaded.eval(), method.config(**options)))
    assert_near(model(input_ids=IDS).logits, adapted_model("llama", method)(input_ids=IDS).logits)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_adapted_on_the_meta_device(method):
    with torch.device("meta"):
        model = make("llama")
    fastpeft.adapt(model, method.config(**({"pool_rank": 4} if method.name == "mos" else {})))
    assert all(parameter.is_meta for parameter in fastpeft.adapter_parameters(model))
    model.to_empty(device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())


# ---------------------------------------------------------------------- the trainer


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 61, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer_of(model: nn.Module, folder: Path, steps: int, **options):
    from fastpeft.interop.transformers import AdapterTrainer

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, logging_steps=100, per_device_train_batch_size=2, report_to=[],
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return AdapterTrainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@every_method
def test_a_trainer_saves_adapters_alone_and_resumes(method, tmp_path: Path):
    straight = adapted_model("llama", method)
    straight.lm_head = nn.Linear(24, 61, bias=False)  # a new head, trained beside the adapter
    start = copy.deepcopy(straight)
    trainer_of(straight, tmp_path / "straight", 4).train()

    trainer_of(first := copy.deepcopy(start), tmp_path / "parts", 2).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trained_beside.safetensors"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names

    trainer = trainer_of(resumed := copy.deepcopy(start), tmp_path / "parts", 4)
    before = [id(p) for p in resumed.parameters()]
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [id(p) for p in resumed.parameters()] == before
    assert trainer.state.global_step == 4
    found, wanted = values_of(resumed), values_of(straight)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(found[name], value, 1e-4)
        assert (values_of(first)[name] - value).abs().max() > 1e-3 * value.abs().max(), name


def test_a_trainer_comes_back_to_the_best(tmp_path: Path):
    model = adapted_model("llama", METHODS[0])
    trainer = trainer_of(
        model, tmp_path, 4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = fastpeft.load_adapter(make("llama"), trainer.state.best_model_checkpoint)
    assert_near(best(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_several_adapters_in_a_checkpoint(tmp_path: Path):
    from fastpeft.interop.transformers import load_trained, save_trained

    model = adapted_model("llama", METHODS[0])
    fill(fastpeft.adapt(model, METHODS[0].config(), "other"), 1)
    fastpeft.set_adapter(model, ["default", "other"])
    wanted = model(input_ids=IDS).logits
    save_trained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"default", "other"}
    fill(model, 2)
    load_trained(model, tmp_path)
    assert_near(model(input_ids=IDS).logits, wanted)


def test_checkpoints_that_do_not_fit(tmp_path: Path):
    from fastpeft.interop.transformers import load_trained, save_trained

    with pytest.raises(ValueError, match=r"no active adapter: fastpeft\.adapt comes first"):
        save_trained(make("llama"), tmp_path)
    model = adapted_model("llama", METHODS[0])
    save_trained(model, tmp_path)
    model.model.norm.requires_grad_()
    with pytest.raises(FileNotFoundError, match=r"has no trained_beside.safetensors, and model.norm.weight are being"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    model.model.norm.weight = nn.Parameter(torch.ones(25))
    before = values_of(fill(model, 3))
    with pytest.raises(ValueError, match=r"model.norm.weight must have shape \(25,\), got \(24,\)"):
        load_trained(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
