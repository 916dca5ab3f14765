"""PEFT's models computed by our operators: outputs and gradients of models of every kind.

The oracle is the very same model before it was accelerated; how the two are compared is told in peft_models.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft_models import (
    CASES,
    MARKS,
    PATHS,
    TARGETS,
    Tower,
    agree,
    assert_close,
    every_case,
    every_method,
    fill,
    inputs,
    make_tower,
    pair,
    peft,
    results,
    same_dropout,
    wide_fourier,
)
from torch import nn

import fastpeft

transformers = pytest.importorskip("transformers")

pytestmark = MARKS


# ---------------------------------------------------------------------- what is computed


@every_case
def test_a_model_computes_what_it_computed(case, calls):
    ours, theirs = pair(case)
    agree(ours, theirs)
    assert calls["ours"] > 0 and calls["peft"] == 0


@every_method
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (3, 0, 16), (3, 2, 16)], ids=str)
def test_leading_shapes(case, shape):
    ours, theirs = pair(case)
    ours.eval(), theirs.eval()
    x = inputs(*shape)
    y = ours(x)
    assert y.shape == (*shape[:-1], 3)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


def test_butterfly_factors_of_peft_with_its_cuda_helper(cuda_helper, calls):
    ours, theirs = pair("boft", second=True)
    for factors in (2, 3):
        base = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
        torch.manual_seed(0)
        config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors, target_modules=["0", "1"])
        theirs = fill(peft.get_peft_model(base, config))
        ours = copy.deepcopy(theirs)
        fastpeft.accelerate(ours, strict=True)
        assert ours.base_model.model[0].boft_R["default"].shape[0] == factors
        agree(ours, theirs)
    assert calls["peft"] == 0


@every_case
def test_training_gives_the_same_parameters(case):
    ours, theirs = pair(case)
    exact = copy.deepcopy(theirs).double()
    trained = []
    for model, x in ((ours, inputs()), (theirs, inputs()), (exact, inputs().double())):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        torch.manual_seed(3)
        with wide_fourier(), same_dropout():
            for _ in range(4):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        trained.append({"y": model.eval()(x).detach(), **{n: p.detach() for n, p in model.named_parameters()}})
    assert all(torch.isfinite(model["y"]).all() for model in trained)
    assert_close(tuple(trained))
    assert not torch.equal(trained[0]["y"], pair(case)[0].eval()(inputs()))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", ["float32", "same"])
def test_half_precision(case, dtype, adapters, calls):
    """PEFT keeps adapters in float32 unless it is told not to. What is exact is the model in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16, bias=False)).to(dtype)
    theirs = peft.get_peft_model(
        base, CASES[case](target_modules=["0", "1"]), autocast_adapter_dtype=adapters != "same"
    )
    fill(theirs)
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours, strict=True)
    agree(ours, theirs, 3, 16, dtype=dtype)
    assert calls["ours"] > 0


@every_method
def test_autocast(case):
    ours, theirs = pair(case)
    exact = copy.deepcopy(theirs).double()
    draws = []
    for seed in range(4):
        x = inputs(seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            found, composed = results(ours, x), results(theirs, x)
        with wide_fourier():
            right = results(exact, x.double())
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in composed.items()}
        for side in (found, composed):  # rounded to bfloat16 on the way, whatever they end in
            side["y"] = side["y"].bfloat16()
        draws.append((found, composed, right))
    assert_close(*draws)


def test_tied_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    theirs = fill(peft.get_peft_model(Tied(), CASES["lora"](target_modules=["a"])))
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours)
    agree(ours, theirs)


def language_model(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":  # all of its layers are Conv1D
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
        return transformers.GPT2LMHeadModel(config), ["c_attn", "c_fc"]
    if kind == "t5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                       decoder_start_token_id=0, dropout_rate=0.0, **sizes)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config), "all-linear"
    if kind == "bart":
        config = transformers.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, **sizes,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config), "all-linear"
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    return transformers.LlamaForCausalLM(config), "all-linear"


@every_method
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_generation_and_training_of_language_models(case, kind, calls):
    if kind == "gpt2" and "oft" in case:
        with pytest.raises(TypeError, match="Conv1D"):
            peft.get_peft_model(language_model(kind)[0], CASES[case](target_modules=["c_attn"]))
        return
    base, targets = language_model(kind)
    task = "SEQ_2_SEQ_LM" if kind in ("t5", "bart") else "CAUSAL_LM"
    theirs = fill(peft.get_peft_model(base, CASES[case](target_modules=targets, task_type=task)))
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours, strict=True)
    tokens = torch.tensor([[5, 9, 33, 7], [11, 12, 13, 14]])
    mask = torch.ones_like(tokens)
    found, wanted = (
        model.eval().generate(
            input_ids=tokens, attention_mask=mask, min_new_tokens=8, max_new_tokens=8, do_sample=False, use_cache=True,
            output_scores=True, return_dict_in_generate=True,
        )
        for model in (ours, theirs)
    )  # fmt: skip
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-3, atol=1e-4)
    for model in (ours, theirs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (their.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert calls["ours"] > 0 and calls["peft"] == 0


# ---------------------------------------------------------------------- mixed and nested models


def test_mixed_models(calls):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_tower("oft"), CASES["lora"](target_modules=["up", "mix"]), "one", mixed=True)
    theirs.add_adapter("two", CASES["oft"](target_modules=["up", "down"]))
    theirs.add_adapter("three", peft.LoHaConfig(r=2, target_modules=["down", "mix"], init_weights=False))
    fill(theirs)
    theirs.set_adapter(["one", "two"])
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert {path.partition("blocks.")[2] for path in report.left_alone} >= {"0.mix", "1.mix"}
    assert all("LoHa" in reason or "loha" in reason for reason in report.left_alone.values())
    assert any(path.endswith("inner.up") for path in report.accelerated)
    agree(ours, theirs)
    assert calls["ours"] > 0
    for model in (ours, theirs):
        model.set_adapter(["three", "one", "two"])
    agree(ours, theirs)


def test_peft_models_inside_others():
    torch.manual_seed(0)
    inside = peft.get_peft_model(Tower(), CASES["lora"](target_modules=TARGETS))
    theirs = fill(nn.Sequential(nn.Linear(16, 16), inside, nn.Linear(3, 2)))
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert sorted(report.accelerated) == sorted(f"1.{path}" for path in PATHS)
    agree(ours, theirs)


def test_injected_adapters():
    torch.manual_seed(0)
    theirs = fill(peft.inject_adapter_in_model(CASES["boft"](target_modules=TARGETS), make_tower("boft")))
    ours = copy.deepcopy(theirs)
    assert len(fastpeft.accelerate(ours).accelerated) == 6
    agree(ours, theirs)
