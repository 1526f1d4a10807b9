"""The engine against Transformers' own generation: the same tokens, whatever runs beside and however it is cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worlds import FAMILIES, asked, loaded_toy, on_a_cpu, pictures, stock_tokens

from grace_vlm.data.rows import IMAGE_MARKER
from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import CPU_PIXELS, LLM, Asked, Parts
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError, RequestError
from grace_vlm.kernels.low_bit_linear import PackedLinear
from grace_vlm.quant.affine import bake, quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantScheme

GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("pictures"), 8)


@on_a_cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_tokens(family: str, paths: list[Path]) -> None:
    """Fifty prompts a family: together, in a cache that holds a few at a time, and in pieces of 32 tokens."""
    loaded = loaded_toy(family, seed=1)
    prompts = asked(paths, 50)
    expected = [stock_tokens(loaded, text, images, 12) for text, images in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 25, "a model that says the same to everybody tests nothing"
    texts, images = [text for text, _ in prompts], [images for _, images in prompts]
    for options in (EngineOptions(), EngineOptions(cache_tokens=1536, max_running=8, max_step_tokens=32)):
        llm = LLM(copy.deepcopy(loaded), options=options)
        answers = llm.generate(texts, images, GREEDY)
        assert [list(answer.token_ids) for answer in answers] == expected
        assert llm.engine.pages.num_free == llm.engine.pages.num_pages
        assert not llm.engine.has_work


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 16])
def test_first_differences_on_a_gpu_are_near_ties(family: str, bits: int, paths: list[Path]) -> None:
    """W4 kernels and BF16 against Transformers on the baked weights: where tokens part, its own two best are close."""
    loaded, codes = loaded_toy(family), {}
    for name, module in loaded.model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear) and bits == 4:
            weight, scheme = module.weight.detach().float(), QuantScheme(4, 64)
            codes[f"model.language_model.layers.{name}"] = quantize_tensor(weight, minmax_scale(weight, scheme), scheme)
            module.weight.data = bake(codes[f"model.language_model.layers.{name}"])
    prompts = asked(paths, 50)
    options = EngineOptions(max_running=8, max_step_tokens=48)  # prompts in pieces
    llm = LLM(copy.deepcopy(loaded), quantized=codes, options=options)
    if bits == 4 and family == "tiny":
        assert isinstance(llm.engine.weights.layers[0].qkv.weight, PackedLinear)
    answers = llm.generate([text for text, _ in prompts], [images for _, images in prompts], GREEDY)
    differing = 0
    for (text, images), answer in zip(prompts, answers, strict=True):
        expected = stock_tokens(loaded, text, images, 12)
        place = next((n for n, (a, b) in enumerate(zip(answer.token_ids, expected, strict=False)) if a != b), None)
        if place is None:
            continue
        differing += 1
        prefix = SamplingParams(max_tokens=place + 1, logprobs=20, ignore_eos=True)
        seen = dict(llm.generate([text], [images], prefix)[0].choices[place].top_logprobs)
        assert seen[answer.token_ids[place]] - seen.get(expected[place], -1e9) < 0.1, (text, place)
    print(
        f"{family}, {'W4' if bits == 4 else 'BF16'}: {differing} of {len(prompts)} answers differ, each at a near-tie"
    )
    assert differing <= 20


def test_a_second_engine_on_one_model_is_refused() -> None:
    loaded = loaded_toy("tiny")
    LLM(loaded)
    with pytest.raises(ConfigError, match="has 0 of its 2 layers: another engine took the others; open the model once"):
        LLM(loaded)


def test_a_conversation_and_where_pictures_go(paths: list[Path]) -> None:
    loaded = loaded_toy("tiny")
    llm = LLM(copy.deepcopy(loaded))
    turns = [f"first {IMAGE_MARKER} then this", "a red circle", "and now?"]
    rendered = loaded.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "image"},
                                         {"type": "text", "text": "then this"}]},
            {"role": "assistant", "content": "a red circle"},
            {"role": "user", "content": "and now?"},
        ],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    from PIL import Image

    ids = loaded.processor(text=[rendered], images=[Image.open(paths[0])], return_tensors="pt")["input_ids"][0]
    assert llm.prompt(turns, [paths[0]]).ids.tolist() == ids.tolist()


def test_one_picture_is_made_once(paths: list[Path]) -> None:
    llm = LLM(loaded_toy("tiny"))
    llm.generate(["one", "two", "three"], [paths[0], [paths[0], paths[1]], paths[1]], GREEDY)
    assert llm.engine.pictures.num_made == 2
    small = LLM(loaded_toy("tiny"), options=EngineOptions(picture_bytes=0))
    small.generate(["one", "two"], [paths[0], paths[0]], GREEDY)
    assert small.engine.pictures.num_made == 1, "both were there in one step"
    small.generate("three", paths[0], GREEDY)
    assert small.engine.pictures.num_made == 2
    assert small.engine.pictures.held_bytes == 0


def test_a_picture_that_could_not_be_made_is_made_the_next_time(paths: list[Path]) -> None:
    llm = LLM(loaded_toy("tiny"))
    expected = llm.generate(["one", "two"], [paths[0], paths[1]], GREEDY)
    again = LLM(loaded_toy("tiny"), options=EngineOptions(picture_bytes=0))
    of, failures = again.engine.pictures.of, [torch.OutOfMemoryError("no room")]

    def failing(images):  # type: ignore[no-untyped-def]
        if failures:
            raise failures.pop()
        return of(images)

    again.engine.pictures.of = failing  # type: ignore[method-assign]
    for name, path in (("a", paths[0]), ("b", paths[1])):
        again.engine.add(name, again.prompt("one" if name == "a" else "two", [path]), GREEDY)
    with pytest.raises(torch.OutOfMemoryError):
        again.engine.step()
    found: dict[str, list[int]] = {"a": [], "b": []}
    while again.engine.has_work:
        for event in again.engine.step():
            if event.choice:
                found[event.request_id].append(event.choice.token)
    assert [tuple(found["a"]), tuple(found["b"])] == [answer.token_ids for answer in expected]


def test_what_the_forward_does_not_do_is_refused() -> None:
    loaded = loaded_toy("qwen2_vl")
    loaded.model.config.text_config.use_sliding_window = True
    with pytest.raises(ConfigError, match="attends in a sliding window, which the engine does not; set use_sliding_w"):
        LLM(loaded)
    loaded = loaded_toy("tiny")
    loaded.model.config.text_config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="the decoder's activation is 'gelu'; the engine has silu"):
        LLM(loaded)
    loaded = loaded_toy("tiny")
    loaded.model.config.text_config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ConfigError, match="rope_type is 'dynamic', whose angles depend on a prompt's length"):
        LLM(loaded)


def test_a_stream_is_the_answer(paths: list[Path]) -> None:
    llm = LLM(loaded_toy("tiny"))
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    whole = llm.generate("what is it?", paths[0], params)[0]
    pieces = list(llm.stream("what is it?", paths[0], params))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    stream = llm.stream("what is it?", paths[0], params)
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    assert llm.engine.pages.num_free == llm.engine.pages.num_pages


@on_a_cpu
def test_streams_at_once_do_not_take_each_others_tokens() -> None:
    llm = LLM(loaded_toy("tiny"))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    texts = ["yes", "count", "is there a red circle?"]
    expected = [answer.text for answer in llm.generate(texts, sampling=params)]
    streams = [llm.stream(text, sampling=params) for text in texts]
    found = [""] * 3
    for number in [0, 1, 2, 1, 1, 0] * 3:
        found[number] += next(streams[number], "")
    assert llm.generate("no", sampling=params)[0].text
    for number, stream in enumerate(streams):
        found[number] += "".join(stream)
    assert found == expected


@on_a_cpu
def test_answers_of_a_long_list_come_as_they_end(paths: list[Path]) -> None:
    llm = LLM(loaded_toy("tiny"), options=EngineOptions(max_running=2, cache_tokens=1024))
    taken = []

    def asked() -> Iterator[Asked]:
        for number in range(30):
            taken.append(number)
            images = [paths[0]] if number % 2 else ["nowhere.png"] if number == 8 else []
            yield Asked(f"n{number}", "yes", images, SamplingParams(max_tokens=3, ignore_eos=True))

    found = {}
    for one, answer in llm.answers(asked()):
        found[one.id] = answer
        assert len(taken) - len(found) <= 5
    assert len(found) == 30
    assert str(found.pop("n8")) == "nowhere.png: no such file"
    expected = llm.generate(["yes", "yes"], [None, paths[0]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert all(answer == expected[int(name[1:]) % 2] for name, answer in found.items())


def test_a_stop_text_ends_an_answer() -> None:
    llm = LLM(loaded_toy("tiny"))
    whole = llm.generate("count", sampling=SamplingParams(max_tokens=40, ignore_eos=True))[0]
    stop = whole.text[10:13]
    cut = llm.generate("count", sampling=SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert whole.finish == "length"
    assert (
        "".join(llm.stream("count", sampling=SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,)))) == cut.text
    )


@on_a_cpu
def test_seeds_decide_whatever_runs_beside() -> None:
    llm = LLM(loaded_toy("tiny"))
    params = [SamplingParams(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True) for seed in (1, 2, 1)]
    together = llm.generate(["yes"] * 3, sampling=params)
    alone = [llm.generate(["yes"], sampling=[one])[0] for one in params]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert together[0].token_ids == together[2].token_ids != together[1].token_ids


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("", None, "text 1 of the prompt is empty; expected words"),
        ([["a", "b"]], None, "a conversation has 2 texts; expected an odd number, the user's last"),
        (["a", "b"], ["x.png"], "images has 1 entries for 2 prompts; give each its own, None for none"),
        (
            f"{IMAGE_MARKER} {IMAGE_MARKER} a",
            "x.png",
            "the prompt has 2 times <image> and 1 pictures; give one for each",
        ),
        ([["a", IMAGE_MARKER, "c"]], None, "text 2 of the prompt is empty; expected words"),
        ("a", "x.png", "x.png: no such file"),
        ("a\ud800", None, "text 1 of the prompt has half of a surrogate pair; expected whole characters"),
    ],
)
def test_what_cannot_be_asked_is_said(prompts: object, images: object, message: str) -> None:
    llm = LLM(loaded_toy("tiny"))
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, images, GREEDY)  # type: ignore[arg-type]
    assert str(caught.value) == message
    assert not llm.engine.has_work


def test_what_can_never_fit_is_refused_at_once() -> None:
    llm = LLM(loaded_toy("tiny"), options=EngineOptions(cache_tokens=64))
    with pytest.raises(RequestError, match=r"request r0 needs room for \d+ tokens and the cache has 64: shorten"):
        llm.generate("yes", sampling=SamplingParams(max_tokens=100))
    with pytest.raises(RequestError, match=r"max_tokens 9,999; the model takes 2,048 in all: shorten one of them"):
        llm.generate("yes", sampling=SamplingParams(max_tokens=9999))
    assert not llm.engine.has_work
    assert llm.generate("yes", sampling=SamplingParams(max_tokens=4))[0].token_ids


def test_weights_are_held_once() -> None:
    loaded = loaded_toy("tiny")
    before = sum(p.nbytes for p in loaded.model.model.language_model.parameters())
    llm = LLM(loaded)
    assert not list(llm.loaded.model.model.language_model.layers.parameters())
    head = loaded.adapter.head(loaded.model).weight.nbytes
    norms = sum(x.weight.nbytes for layer in llm.engine.weights.layers for x in
                (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm) if x)  # fmt: skip
    assert llm.engine.weights.num_bytes + norms + llm.engine.weights.last_norm.weight.nbytes == before + head


@on_a_cpu
def test_log_probabilities(paths: list[Path]) -> None:
    loaded = loaded_toy("tiny")
    llm = LLM(copy.deepcopy(loaded))
    answer = llm.generate("yes", sampling=SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True))[0]
    inputs = llm.prompt("yes")
    logits = loaded.model(input_ids=torch.from_numpy(inputs.ids).unsqueeze(0)).logits[0, -1]
    expected = logits.log_softmax(-1).topk(2)
    first = answer.choices[0]
    assert first.token == int(expected.indices[0])
    assert first.logprob == pytest.approx(float(expected.values[0]), abs=1e-4)
    assert [token for token, _ in first.top_logprobs] == expected.indices.tolist()


@on_a_cpu
@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}, {"draft_tokens": 4}])
def test_entropies_are_those_of_transformers_logits(options: dict[str, int], paths: list[Path]) -> None:
    """Of a prompt's and of a new token, under drafts too; who did not ask beside has none."""
    loaded = loaded_toy("tiny")
    llm = LLM(copy.deepcopy(loaded), options=EngineOptions(max_running=4, **options))  # type: ignore[arg-type]
    params = [SamplingParams(max_tokens=12, logprobs=number, ignore_eos=True) for number in (0, None, 3)]
    texts = ["yes no yes no yes no", "count", "is there a red circle?"]
    answers = llm.generate(texts, sampling=params)
    for text, answer, one in zip(texts, answers, params, strict=True):
        if one.logprobs is None:
            assert all(choice.entropy is None for choice in answer.choices)
            continue
        ids = torch.tensor([[*llm.prompt(text).ids.tolist(), *answer.token_ids]])
        logits = loaded.model(input_ids=ids).logits[0, -13:-1]
        expected = torch.distributions.Categorical(logits=logits).entropy().tolist()
        assert [choice.entropy for choice in answer.choices] == pytest.approx(expected, abs=1e-4)
    assert bool(llm.engine.drafter.num_accepted) == bool(options.get("draft_tokens"))


@on_a_cpu
def test_large_pictures_are_shrunk_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To 448 x 448 pixels in all, said once; another area on request, which is never said."""
    loaded = loaded_toy("tiny")
    size = loaded.processor.image_processor.size
    loaded.processor.image_processor.size = type(size)(shortest_edge=128 * 128, longest_edge=1 << 24)
    path = tmp_path / "large.png"
    Image.new("RGB", (1536, 1024), (200, 30, 30)).save(path)
    counts = {}
    for limit in (None, 256 * 256, 1 << 24):
        caplog.clear()
        llm = LLM(copy.deepcopy(loaded), max_pixels=limit)
        area = (loaded.processor.image_processor.patch_size * loaded.processor.image_processor.merge_size) ** 2
        first, again = (llm.prompt("what is it?", [path]) for _ in range(2))
        counts[limit] = len(first.visual) * area
        assert len(again.visual) == len(first.visual)
        assert [record.message.count("1536 x 1024") for record in caplog.records] == ([1] if limit is None else [])
    assert counts[256 * 256] <= 256 * 256 < counts[None] <= CPU_PIXELS < counts[1 << 24]
    assert counts[1 << 24] > 0.9 * 1536 * 1024


@on_a_cpu
def test_an_area_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="max_pixels is 0; expected at least 1"):
        LLM(loaded_toy("tiny"), max_pixels=0)
    with pytest.raises(ConfigError, match="for processors that resize to an area"):
        LLM(loaded_toy("llava"), max_pixels=1000)


@on_a_cpu
def test_pictures_come_as_paths_bytes_or_pillows(paths: list[Path]) -> None:
    llm = LLM(loaded_toy("tiny"))
    opened = Image.open(paths[0])
    ways = [paths[0], str(paths[0]), paths[0].read_bytes(), opened, [opened], [paths[0].read_bytes()]]
    answers = [llm.generate("what is it?", way, GREEDY)[0] for way in ways]  # type: ignore[arg-type]
    assert len({answer.token_ids for answer in answers}) == 1
    assert answers[0].token_ids != llm.generate("what is it?", None, GREEDY)[0].token_ids
    together = llm.generate(["what is it?"] * 3, [paths[0], opened, [paths[0].read_bytes()]], GREEDY)
    assert [answer.token_ids for answer in together] == [answers[0].token_ids] * 3
    with pytest.raises(RequestError, match="picture 1: "):
        llm.generate("what is it?", b"no picture", GREEDY)
    with pytest.raises(RequestError, match="picture 1: 4 x 4 pixels; each side must be at least 8"):
        llm.generate("what is it?", Image.new("RGB", (4, 4)), GREEDY)


@on_a_cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_taken_to_the_last_space(family: str, paths: list[Path]) -> None:
    """Token by token what Transformers' processor makes of the same parts; a marker in a text is letters."""
    loaded = loaded_toy(family)
    llm = LLM(loaded)
    parts = (paths[0], "what is in <image> ?\nA. red \n", paths[1].read_bytes(), " choose. \n")
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    rendered = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if "<image>" in loaded.processor.tokenizer.get_vocab():
        rendered = rendered.replace("in <image> ?", "in picture ?")  # where the marker is a token, letters are not it
        parts = (parts[0], parts[1].replace("<image>", "picture"), *parts[2:])  # type: ignore[union-attr]
    images = [Image.open(path).convert("RGB") for path in paths[:2]]
    expected = loaded.processor(text=[rendered], images=images, return_tensors="np")["input_ids"][0].tolist()
    assert llm.prompt(Parts(parts)).ids.tolist() == expected
    with pytest.raises(RequestError, match="a prompt of parts has no words; expected some"):
        llm.prompt(Parts((paths[0], " ")))
    with pytest.raises(RequestError, match="has its own pictures, and 1 more came"):
        llm.prompt(Parts(("what?",)), [paths[0]])


@pytest.mark.parametrize(
    ("prompts", "images", "said"),
    [
        ("yes", 3, "images has '3' (int)"),
        (["yes", "no"], 3, "images has '3' (int)"),
        ("yes", [3], "images has '3' (int)"),
        (["yes"], [[2.5]], "images has '2.5' (float)"),
    ],
)
def test_what_is_no_picture_is_said(prompts: Any, images: Any, said: str) -> None:
    llm = LLM(loaded_toy("tiny"))
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, images=images)
    expected = "; expected a path, bytes or a Pillow image, or a list of them"
    assert str(caught.value) == said + expected
    if isinstance(prompts, str):
        with pytest.raises(RequestError, match="expected a path, bytes"):
            next(llm.stream(prompts, images=images))
