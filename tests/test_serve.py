"""The engine of the example's service, and what is beside it, on a small random Llama. HTTP: test_serve_http.py."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serve_models import CONFIGS, LENGTH, Asked, llama, make_tokenizer, oracle, prompt_of, running, save_all
from service.cache import RowCache
from service.catalog import Catalog, CatalogFullError
from service.engine import BusyError, Engine, Event, Request, StoppedError
from service.metrics import Histogram
from service.sampling import Sampling, choose, nucleus
from service.styles import QUESTIONS, STYLES, encode, train
from service.text import TextStream
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import fastpeft
from fastpeft.files import CONFIG, TENSORS
from fastpeft.serving import AdapterBank, AdapterInUseError, UnknownAdapterError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]):
    return oracle(folders)


# The engine


def test_each_row_is_as_alone(folders, alone):
    """Prompts and answers of all lengths, of every method and none, joining and leaving all the time."""
    names = [None, *folders]
    asked = []
    with running(folders, prefill_tokens=40) as engine:
        for i in range(15):
            asked.append(Asked(prompt_of(1 + 5 * i % 23, i), 1 + 7 * i % 20, names[i % 5]))
            engine.submit(asked[-1].request)
            if i % 4 == 3:
                time.sleep(0.02)  # some begin before others come
        found = [each.tokens() for each in asked]
        assert engine.counts["tokens"] == sum(len(tokens) for tokens, _ in found)
        assert engine.counts["steps"] < sum(len(tokens) for tokens, _ in found) / 2  # they did run together
    for each, (tokens, finish) in zip(asked, found, strict=True):
        request = each.request
        assert finish == "length"
        assert tokens == alone(request.prompt, request.max_tokens, request.adapter)


def test_another_architecture():
    """Learned positions, layers of transformers' own kind, another attention."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    prompts = [[5, 7], [1, 2, 3, 4, 5, 6], [9]]
    asked = [Asked(prompt, 10 + 3 * i) for i, prompt in enumerate(prompts)]
    expected = []
    for prompt, each in zip(prompts, asked, strict=True):
        tokens = list(prompt)
        for _ in range(each.request.max_tokens):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        expected.append((tokens[len(prompt) :], "length"))
    assert len(set(expected[1][0])) > 3
    with contextlib.closing(AdapterBank(model, timeout=0)) as bank:
        engine = Engine(model, bank, max_rows=2)
        for each in asked:
            engine.submit(each.request)
        assert [each.tokens() for each in asked] == expected
        engine.stop()


def test_attention_that_is_not_full_is_refused():
    config = MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with contextlib.closing(AdapterBank(MistralForCausalLM(config).requires_grad_(False))) as bank:
        with pytest.raises(ValueError, match=r"full attention in every layer, got \['sliding_attention'\]"):
            Engine(bank._model, bank)


def test_adapters_say_different_things(alone):
    answers = {tuple(alone(prompt_of(9), 12, name)) for name in (None, *CONFIGS)}
    assert len(answers) == 5


def test_a_stop_token_ends_and_is_not_given(folders, alone):
    expected = alone(prompt_of(6), 12)
    end = next(i for i, token in enumerate(expected) if token not in expected[:i] and i >= 3)
    with running(folders) as engine:
        asked = Asked(prompt_of(6), 12, stop_tokens=frozenset({expected[end]}))
        engine.submit(asked.request)
        assert asked.tokens() == (expected[:end], "stop")


def test_a_cancelled_request_frees_its_row(folders, alone):
    with running(folders, max_rows=1) as engine:
        first, second = Asked(prompt_of(4), LENGTH - 4, "mos"), Asked(prompt_of(5), 6, "lora")
        engine.submit(first.request)
        first.events.get(timeout=20)
        engine.submit(second.request)
        engine.cancel(first.request)
        assert second.tokens()[0] == alone(prompt_of(5), 6, "lora")
        assert engine.counts["cancelled"] == 1 and not any(event.finish for event in list(first.events.queue))


def test_a_listener_that_fails_ends_itself_alone(folders, alone):
    def fails(event: Event) -> None:
        raise RuntimeError("gone")

    with running(folders) as engine:
        other = Asked(prompt_of(5), 10, "boft")
        engine.submit(Request(prompt_of(3), 30, fails, "lora"))
        engine.submit(other.request)
        assert other.tokens()[0] == alone(prompt_of(5), 10, "boft")


@pytest.mark.parametrize("prompt, count", [([], 3), (prompt_of(4), 0), (prompt_of(4), LENGTH - 3)])
def test_lengths_that_cannot_be(folders, prompt: list[int], count: int):
    with running(folders) as engine, pytest.raises(ValueError, match=f"at most {LENGTH} together"):
        engine.submit(Asked(prompt, count).request)


def test_too_many_wait(folders):
    with running(folders, max_rows=1, max_waiting=2) as engine:
        asked = [Asked(prompt_of(4), 50) for _ in range(12)]
        with pytest.raises(BusyError, match="wait already"):
            for each in asked:
                engine.submit(each.request)
        for each in asked:
            engine.cancel(each.request)


def test_an_adapter_that_is_not_there_ends_its_request_alone(folders, alone):
    with running(folders) as engine:
        good, bad = Asked(prompt_of(4), 8, "lora"), Asked(prompt_of(4), 8, "nobody")
        for each in (good, bad):
            engine.submit(each.request)
        with pytest.raises(UnknownAdapterError, match="nobody"):
            bad.tokens()
        assert good.tokens()[0] == alone(prompt_of(4), 8, "lora")


def test_more_adapters_than_fit_take_turns(folders, alone):
    """Two are resident at a time; the others wait for room, and nobody fails."""
    with running(folders, resident=2) as engine:
        asked = [Asked(prompt_of(3 + i, i), 9, name) for i, name in enumerate([*folders] * 2)]
        for each in asked:
            engine.submit(each.request)
        for each in asked:
            assert each.tokens()[0] == alone(each.request.prompt, 9, each.request.adapter)


def test_numbers_that_are_not_finite_stay_in_their_row(folders, alone, tmp_path: Path):
    """Finite in the file, infinite in the model: the row fails, and who has the row next knows nothing of it."""
    model = fastpeft.adapt(llama(), CONFIGS["lora"])
    for parameter in fastpeft.adapter_parameters(model):
        nn.init.constant_(parameter, 1e200)
    fastpeft.save_adapter(model, tmp_path / "huge")
    with running({**folders, "huge": tmp_path / "huge"}, max_rows=2) as engine:
        bad, beside = Asked(prompt_of(9), 20, "huge"), Asked(prompt_of(6), 25, "mos")
        for each in (beside, bad):
            engine.submit(each.request)
        with pytest.raises(ValueError, match="'huge' gave numbers that are not finite"):
            bad.tokens()
        after = Asked(prompt_of(4), 20, "boft")
        engine.submit(after.request)
        assert beside.tokens()[0] == alone(prompt_of(6), 25, "mos")
        assert after.tokens()[0] == alone(prompt_of(4), 20, "boft")


def test_an_error_of_the_model_ends_those_in_it_and_not_the_loop(folders, alone, monkeypatch):
    with running(folders) as engine:
        model = engine._model
        whole = type(model).forward

        def fails(self, *args, **kwargs):
            raise MemoryError("too much")

        first = Asked(prompt_of(4), 40, "lora")
        engine.submit(first.request)
        first.events.get(timeout=20)
        monkeypatch.setattr(type(model), "forward", fails)
        with pytest.raises(MemoryError):
            first.tokens()
        begun = Asked(prompt_of(5), 5)
        engine.submit(begun.request)
        with pytest.raises(MemoryError):
            begun.tokens()
        monkeypatch.setattr(type(model), "forward", whole)
        after = Asked(prompt_of(6), 7, "mos")
        engine.submit(after.request)
        assert after.tokens()[0] == alone(prompt_of(6), 7, "mos")


def test_a_name_that_is_taken_away_below_the_engine_is_no_end_of_it(folders, alone):
    """The catalog never does that."""
    with running(folders) as engine:
        first = Asked(prompt_of(4), 58, "lora")
        engine.submit(first.request)
        first.events.get(timeout=20)
        with contextlib.suppress(TimeoutError):
            engine.bank.unload("lora", timeout=0)
        engine.submit(Asked(prompt_of(4), 1).request)  # who joins makes it look the names up again
        with pytest.raises(UnknownAdapterError):
            first.tokens()
        after = Asked(prompt_of(6), 7, "mos")
        engine.submit(after.request)
        assert after.tokens()[0] == alone(prompt_of(6), 7, "mos")


def test_stop_lets_requests_finish_or_ends_them(folders, alone):
    with running(folders) as engine:
        asked = Asked(prompt_of(4), 10, "lora")
        engine.submit(asked.request)
        engine.stop(20)
        assert asked.tokens()[0] == alone(prompt_of(4), 10, "lora")
        with pytest.raises(StoppedError):
            engine.submit(asked.request)
    with running(folders) as engine:
        asked = Asked(prompt_of(4), 60)
        engine.submit(asked.request)
        engine.stop(0)
        with pytest.raises(StoppedError):
            asked.tokens()


def test_the_cache_holds_nothing_but_its_rows():
    cache = RowCache(1, 3, 8)
    layer = cache.layers[0]
    states = torch.rand(3, 2, 5, 4) + 1
    cache.begin([5, 2, 3])
    layer.update(states, states)
    cache.drop(0)  # the last takes its place
    assert cache.lengths == [3, 2]
    torch.testing.assert_close(layer.keys[0, :, :3], states[2, :, :3])
    torch.testing.assert_close(layer.values[1, :, :2], states[1, :, :2])
    layer.keys[0, :, :3] = layer.keys[1, :, :2] = 0
    assert not layer.keys.any()
    places, mask = cache.extend(torch.device("cpu"), torch.float32)
    assert places.tolist() == [[3], [2]]
    assert (mask[:, 0, 0] == 0).tolist() == [[True] * 4, [True] * 3 + [False]]


# Tokens and text


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 1.0], [1.0, float("nan"), 0.0], [5.0, float("inf"), 0.0]])
    assert choose(logits, [Sampling()] * 3) == [1, None, None]
    draws = [Sampling(1.0, seed=7) for _ in range(2)]
    first, second = ([each.draw(logits[0]) for _ in range(20)] for each in draws)
    assert first == second and len(set(first)) > 1
    sampling = Sampling(0.5, seed=0)
    counts = torch.bincount(torch.tensor([sampling.draw(logits[0]) for _ in range(2000)]), minlength=3)
    expected = torch.softmax(logits[0] / 0.5, 0)
    spread = (expected * (1 - expected) / 2000).sqrt()
    assert bool(((counts / 2000 - expected).abs() < 4 * spread).all())


def test_nucleus_is_the_smallest_set():
    p = torch.softmax(torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2, 0)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        kept = nucleus(p, top_p)
        assert bool((kept[kept > 0] == p[kept > 0]).all())
        smallest = kept[kept > 0].min()
        assert kept.sum() >= top_p - 1e-5 and kept.sum() - smallest < top_p
        assert bool((p[kept == 0] <= smallest).all())


@pytest.mark.parametrize(
    "stop, expected", [([], "naïve 🙂 text"), (["🙂 t", "zz"], "naïve "), (["xt!"], "naïve 🙂 text")]
)
def test_text_comes_in_whole_characters(stop: list[str], expected: str):
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer("naïve 🙂 text")["input_ids"]:
        pieces.append(stream.feed(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == expected and stream.stopped == (expected == "naïve ")
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_comes_at_the_end():
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer("a🙂")["input_ids"]
    assert "".join(map(stream.feed, ids[:-1])) == "a" and stream.finish() == "\ufffd"


def test_a_histogram():
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.lines("x") == [
        'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 12.0", "x_count 4",
    ]  # fmt: skip


# The catalog


def test_a_name_means_what_it_meant_when_a_request_came(folders, tmp_path: Path):
    with running({}) as engine:
        catalog = Catalog(engine.bank, "base", tmp_path, max_adapters=2)

        def upload(name: str, folder: Path) -> None:
            with open(folder / CONFIG, "rb") as config, open(folder / TENSORS, "rb") as tensors:
                catalog.upload(name, config, tensors)

        upload("a", folders["lora"])
        with catalog.using("a") as before:
            upload("a", folders["mos"])
            with catalog.using("a") as after:
                assert before.inner != after.inner
                assert set(engine.bank.names()) == {before.inner, after.inner}
                with pytest.raises(AdapterInUseError, match="'a' is used by 1 request"):
                    catalog.remove("a", even_in_use=False)
            catalog.remove("a")
            with pytest.raises(UnknownAdapterError, match="no model is named 'a'"):
                catalog.find("a")
            assert engine.bank.names() == [before.inner]
        assert engine.bank.names() == [] and not list(tmp_path.iterdir())

        catalog.add("b", folders["boft"])
        upload("c", folders["lora"])
        with pytest.raises(CatalogFullError, match="2 adapters already"):
            upload("d", folders["lora"])
        with pytest.raises(ValueError, match="'base' is the base model"):
            catalog.remove("base")
        with pytest.raises(ValueError, match="'base' is the base model's"):
            upload("base", folders["lora"])
        catalog.remove("b")
        assert (folders["boft"] / TENSORS).exists()  # not the catalog's own
        catalog.remove("c")


# The example's adapters


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_learned(name: str, tmp_path: Path):
    """A few steps lower the loss, and what was saved fits a bank. The model is too small for the example's sizes."""
    style = replace(STYLES[name], config=CONFIGS[STYLES[name].config.peft_type.lower()])
    first, last = (train(llama().float(), make_tokenizer(), style, tmp_path / str(n), n) for n in (1, 6))
    assert last < first
    with contextlib.closing(AdapterBank(llama().float(), max_rank=8, max_resident_bytes=1 << 24)) as bank:
        bank.load(name, tmp_path / "6")


def test_only_answers_count():
    tokens, before = encode(make_tokenizer(), QUESTIONS[0], "It is a star.")
    assert make_tokenizer().decode(tokens[before:]) == "It is a star.<|im_end|>"
