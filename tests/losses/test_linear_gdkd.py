"""linear_gdkd and linear_gate against autograd through whole logits, and what they must not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grace_vlm.errors import ConfigError
from grace_vlm.losses.gdkd import GateSignal, confidence_gate, gated_decoupled_kd
from grace_vlm.losses.linear_gdkd import chunking, linear_gate, linear_gdkd

IGNORE = -100
D_S, D_T = 24, 40


@dataclass
class Case:
    """Inputs of one call; heads scaled so that logits have a spread of about ``spread``."""

    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    targets: torch.Tensor
    ce_weights: torch.Tensor
    kd_weights: torch.Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(
            *(x.to(dtype) for x in (self.hidden, self.head, self.teacher_hidden, self.teacher_head)),
            self.targets,
            self.ce_weights,
            self.kd_weights,
        )


def make_case(num_tokens: int, words: int, teacher_words: int, seed: int = 0, spread: float = 2.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = min(words, teacher_words)
    targets = torch.randint(0, common, (num_tokens,), generator=generator)
    weights = torch.rand(2, num_tokens, generator=generator, dtype=torch.float64) / max(num_tokens, 1)
    if num_tokens:
        targets[-1] = common - 1
    if num_tokens > 4:
        targets[1] = IGNORE
        weights[0, 2], weights[1, 3] = 0.0, 0.0
        weights[:, 4] = 0.0
    return Case(
        randn(num_tokens, D_S),
        randn(words, D_S) * spread / D_S**0.5,
        randn(num_tokens, D_T),
        randn(teacher_words, D_T) * spread / D_T**0.5,
        targets,
        *weights,
    )


def plain(
    case: Case, *, round_gradient: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dH, dW) by autograd through whole logits; ``round_gradient``: dZ is rounded to BF16 once."""
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ head.to(wide).T
    if round_gradient:
        logits.register_hook(lambda grad: grad.to(torch.bfloat16).to(grad.dtype))
    teacher_logits = case.teacher_hidden.to(wide) @ case.teacher_head.to(wide).T
    per_token = F.cross_entropy(logits, case.targets, ignore_index=IGNORE, reduction="none")
    loss = (case.ce_weights.to(wide) * per_token).sum()
    loss = (
        loss
        + gated_decoupled_kd(
            logits,
            teacher_logits,
            case.targets,
            gate=case.kd_weights.to(wide),
            normalizer=1.0,
            vocabulary="common",
            **options,
        ).loss
    )
    d_hidden, d_head = torch.autograd.grad(loss, (hidden, head))
    return loss.detach(), d_hidden, d_head


def fused(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    terms = linear_gdkd(
        hidden,
        head,
        case.targets,
        cross_entropy_weights=case.ce_weights,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head,
        distillation_weights=case.kd_weights,
        vocabulary="common",
        **options,
    )
    terms.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return terms.loss.detach(), hidden.grad, head.grad


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize(
    ("temperature", "a", "b"), [(2.0, 1.0, 4.0), (1.0, 0.0, 1.0), (1.5, 2.5, 0.5), (3.0, 1.0, 0.0), (4.0, 1.0, 4.0)]
)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 400_000])
def test_equals_autograd_through_whole_logits(
    temperature: float, a: float, b: float, decoupled: bool, workspace_bytes: int
) -> None:
    case = make_case(37, 301, 301)
    options = {"temperature": temperature, "tckd_weight": a, "nckd_weight": b, "decoupled": decoupled}
    for ours, expected in zip(
        fused(case, workspace_bytes=workspace_bytes, **options), plain(case, **options), strict=True
    ):
        assert error(ours, expected) < 1e-13


@pytest.mark.parametrize(("words", "teacher_words"), [(64, 80), (80, 64), (65, 64), (2, 2), (3, 2)])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
def test_heads_of_other_widths_and_odd_numbers_of_tokens(num_tokens: int, words: int, teacher_words: int) -> None:
    case = make_case(num_tokens, words, teacher_words, seed=num_tokens)
    for ours, expected in zip(fused(case, workspace_bytes=5_000), plain(case), strict=True):
        assert ours.shape == expected.shape
        assert float((ours - expected).abs().max() if ours.numel() else 0.0) < 1e-13


def test_terms_of_each_token() -> None:
    case = make_case(12, 50, 50)
    terms = linear_gdkd(
        case.hidden,
        case.head,
        case.targets,
        cross_entropy_weights=0.5,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head,
        distillation_weights=torch.tensor(0.25),
    )
    logits, teacher_logits = case.hidden @ case.head.T, case.teacher_hidden @ case.teacher_head.T
    expected = gated_decoupled_kd(logits, teacher_logits, case.targets)
    assert torch.allclose(terms.tckd, expected.tckd, atol=1e-14)
    assert torch.allclose(terms.nckd, expected.nckd, atol=1e-14)
    assert torch.allclose(terms.distillation, 4.0 * (expected.tckd + 4.0 * expected.nckd), atol=1e-13)
    each = F.cross_entropy(logits, case.targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(terms.cross_entropy, each, atol=1e-14)
    assert torch.allclose(terms.loss, 0.5 * each.sum() + 0.25 * terms.distillation.sum())
    assert not any(x.requires_grad for x in (terms.cross_entropy, terms.distillation, terms.tckd, terms.nckd))


def test_without_a_teacher_it_is_cross_entropy() -> None:
    case = make_case(20, 64, 64)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    terms = linear_gdkd(hidden, head, case.targets, cross_entropy_weights=1.0 / 19, workspace_bytes=4_000)
    expected = F.cross_entropy(hidden @ head.T, case.targets, ignore_index=IGNORE)
    for ours, theirs in zip(
        torch.autograd.grad(terms.loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        assert error(ours, theirs) < 1e-14
    assert bool((terms.distillation == 0).all())


def confident(case: Case, one_minus_q: float) -> Case:
    """Teacher and student raised at the target along a direction of their own until 1 - q_k (at T = 2) is that."""
    rows = torch.arange(len(case.targets))
    for states, head in ((case.hidden, case.head), (case.teacher_hidden, case.teacher_head)):
        states[:, -1], head[:, -1] = 0.0, 0.0
        logits = states @ head.T / 2
        rest = logits.scatter(1, case.targets.clamp_min(0).unsqueeze(1), -torch.inf).logsumexp(1)
        wanted = 2 * (rest + math.log1p(-one_minus_q) - math.log(one_minus_q))
        states[:, -1] = wanted - 2 * logits[rows, case.targets.clamp_min(0)]
        # Every target is the same word, so that one row of the head raises it and no other.
        head[:, -1] = 0.0
        head[case.targets.clamp_min(0), -1] = 1.0
    return case


def one_target(case: Case, word: int) -> Case:
    case.targets[:] = word
    return case


@pytest.mark.parametrize("one_minus_q", [0.4, 2.5e-3, 3e-7, 1e-9])
def test_fp32_is_as_exact_as_plain_fp32(one_minus_q: float) -> None:
    case = confident(one_target(make_case(48, 5_003, 5_003), 77), one_minus_q)
    truth, fp32 = plain(case), plain(case.to(torch.float32))
    for ours, theirs, exact in zip(fused(case.to(torch.float32), workspace_bytes=300_000), fp32, truth, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-9


@pytest.mark.parametrize("one_minus_q", [2.5e-3, 3e-7, 1e-9])
def test_the_targets_gradient_of_confident_models_is_right_to_1e5(one_minus_q: float) -> None:
    """With an identity for a head the gradient of the states is that of the logits."""
    generator = torch.Generator().manual_seed(3)
    words, k = 997, 5
    teacher = torch.randn(16, words, generator=generator, dtype=torch.float64)
    student = teacher + 0.7 * torch.randn(16, words, generator=generator, dtype=torch.float64)
    for logits, factor in ((teacher, 1.0), (student, 3.0)):
        rest = (logits / 2).scatter(1, torch.full((16, 1), k), -torch.inf).logsumexp(1)
        logits[:, k] = 2 * (rest + math.log1p(-factor * one_minus_q) - math.log(factor * one_minus_q))
    eye, targets = torch.eye(words), torch.full((16,), k)

    def gradient(dtype: torch.dtype, run: Callable[..., Any]) -> torch.Tensor:
        states = student.float().to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(run(states, teacher.float().to(dtype), eye.to(dtype)), states)
        return grad.double()

    def ours(states: torch.Tensor, teacher_states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return linear_gdkd(
            states,
            head,
            targets,
            cross_entropy_weights=0.0,
            teacher_hidden=teacher_states,
            teacher_head=head,
            distillation_weights=1.0,
        ).loss

    def truth(states: torch.Tensor, teacher_states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return gated_decoupled_kd(states, teacher_states, targets, gate=torch.ones(16), normalizer=1.0).loss

    exact = gradient(torch.float64, truth)
    got = gradient(torch.float32, ours)
    assert float(((got - exact)[:, k] / exact[:, k]).abs().max()) < 1e-5
    assert error(got, exact) < 1e-5


def test_bf16_mode_rounds_the_logits_gradient_once() -> None:
    case = make_case(64, 4_001, 4_001).to(torch.bfloat16)
    truth = plain(case.to(torch.float64))
    once = plain(case, round_gradient=True)
    ours = fused(case, workspace_bytes=200_000)
    assert error(ours[0], truth[0]) < 1e-6
    for got, reference, exact in zip(ours[1:], once[1:], truth[1:], strict=True):
        assert got.dtype == torch.bfloat16
        assert error(got, exact) <= 2 * error(reference, exact)
        # Logits in BF16 would cost more than that.
        assert error(got, exact) < 5e-3


def test_a_confidently_wrong_student_in_bf16() -> None:
    """Where cross-entropy lies on a word that is not the target: e^2 must not be made of a rounded e."""
    case = make_case(32, 1_001, 1_001, spread=12.0).to(torch.bfloat16)
    truth, once = plain(case.to(torch.float64)), plain(case, round_gradient=True)
    for got, reference, exact in zip(fused(case)[1:], once[1:], truth[1:], strict=True):
        assert error(got, exact) <= 2 * error(reference, exact)


def test_the_heads_gradient_can_be_added_to_a_sum() -> None:
    """As for a tied embedding, whose gradient autograd makes in BF16 and the trainer adds up in FP32."""
    case = make_case(9, 40, 40)
    _, d_hidden, d_head = fused(case)
    total = torch.ones_like(case.head)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    arguments: dict[str, Any] = {
        "cross_entropy_weights": case.ce_weights,
        "teacher_hidden": case.teacher_hidden,
        "teacher_head": case.teacher_head,
        "distillation_weights": case.kd_weights,
    }
    linear_gdkd(hidden, head, case.targets, head_gradient=total, **arguments).loss.backward()
    assert head.grad is None
    assert torch.equal(hidden.grad, d_hidden)
    assert torch.allclose(total - 1.0, d_head, atol=1e-14)
    scaled = linear_gdkd(hidden, head, case.targets, head_gradient=total, **arguments).loss * 0.5
    with pytest.raises(ValueError, match=r"the loss was scaled by 0\.5 after head_gradient had been added up; put the"):
        scaled.backward()


def test_a_scaled_loss_scales_both_gradients() -> None:
    case = make_case(9, 40, 40)
    _, d_hidden, d_head = fused(case)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    terms = linear_gdkd(
        hidden,
        head,
        case.targets,
        cross_entropy_weights=case.ce_weights,
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head,
        distillation_weights=case.kd_weights,
    )
    (terms.loss * 3.0).backward()
    assert torch.allclose(hidden.grad, 3 * d_hidden, atol=1e-14)
    assert torch.allclose(head.grad, 3 * d_head, atol=1e-14)


def test_a_second_backward_is_refused() -> None:
    case = make_case(9, 40, 40)
    hidden = case.hidden.clone().requires_grad_()
    loss = linear_gdkd(hidden, case.head, case.targets, cross_entropy_weights=1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="went with its first backward; compute the loss again"):
        loss.backward()


class Watch(TorchDispatchMode):
    """Counts operations by name; the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def watched(case: Case, hidden_grad: bool, head_grad: bool, num_rows: int) -> Watch:
    hidden, head = case.hidden.clone().requires_grad_(hidden_grad), case.head.clone().requires_grad_(head_grad)
    with Watch() as watch:
        gate = linear_gate(case.teacher_hidden, case.teacher_head, workspace_bytes=8 * 400 * num_rows)
        terms = linear_gdkd(
            hidden,
            head,
            case.targets,
            cross_entropy_weights=torch.tensor(0.1),
            teacher_hidden=case.teacher_hidden,
            teacher_head=case.teacher_head,
            distillation_weights=gate / gate.sum(),
            workspace_bytes=2 * 8 * 400 * num_rows,
        )
        if hidden_grad or head_grad:
            terms.loss.backward()
    return watch


def test_no_tensor_of_all_tokens_and_words_and_no_read_by_the_host() -> None:
    watch = watched(make_case(200, 400, 400), True, True, num_rows=16)
    assert watch.largest <= max(16 * 400, 400 * D_T)
    # On a CPU targets are looked at; test_gdkd_gpu.py lets a GPU say whether it was waited for.
    assert watch.calls.count("_local_scalar_dense") <= 2
    assert not {"nonzero", "is_nonzero", "equal"} & set(watch.calls)
    # The test would see it: a workspace for all tokens makes such a tensor.
    assert watched(make_case(200, 400, 400), True, True, num_rows=200).largest == 200 * 400


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    """Products: logits of both heads and of the gate; then one for dH and one for dW."""
    case = make_case(10, 400, 400)
    for hidden_grad, head_grad, products, additions in (
        (False, False, 3, 0),
        (True, False, 4, 0),
        (True, True, 4, 1),
        (False, True, 3, 1),
    ):
        calls = watched(case, hidden_grad, head_grad, num_rows=10).calls
        assert (calls.count("mm"), calls.count("addmm_")) == (products, additions)


@pytest.mark.parametrize("signal", ["entropy", "margin"])
def test_the_gate_from_states_is_the_gate_from_logits(signal: GateSignal) -> None:
    case = make_case(70, 300, 300)
    expected = confidence_gate(case.teacher_hidden @ case.teacher_head.T, signal)
    for workspace_bytes in (None, 1, 30_000):
        gate = linear_gate(case.teacher_hidden, case.teacher_head, signal, workspace_bytes=workspace_bytes)
        assert torch.allclose(gate, expected, atol=1e-14)
    low = linear_gate(case.teacher_hidden.bfloat16(), case.teacher_head.bfloat16(), signal)
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), expected, atol=5e-3)
    assert linear_gate(case.teacher_hidden[:0], case.teacher_head).shape == (0,)


def test_what_is_not_finite_is_not_hidden() -> None:
    case = make_case(8, 40, 40)
    for poison, row in ((math.nan, 0), (math.inf, 5)):
        for states in (case.hidden, case.teacher_hidden):
            kept = states[row].clone()
            states[row] = poison
            assert not bool(torch.isfinite(fused(case)[0]))
            assert bool(torch.isnan(linear_gate(case.teacher_hidden, case.teacher_head)[row])) is (
                states is case.teacher_hidden
            )
            states[row] = kept
    # An ignored token may hold anything.
    case.hidden[1] = math.nan
    case.teacher_hidden[1] = math.inf
    loss, d_hidden, _ = fused(case)
    assert bool(torch.isfinite(loss))
    assert bool((d_hidden[1] == 0).all())


def test_an_ignored_token_with_nan_states_leaves_both_gradients_alone() -> None:
    clean, spoilt = make_case(8, 40, 40), make_case(8, 40, 40)
    spoilt.hidden[1], spoilt.teacher_hidden[1] = math.nan, math.inf
    for ours, expected in zip(fused(spoilt), fused(clean), strict=True):
        assert torch.equal(ours, expected)


def gradient_sum(case: Case, run: Callable[..., torch.Tensor], head_grad: bool = True) -> torch.Tensor:
    """What ``head_gradient`` holds after ``run`` of a loss and its backward."""
    total = torch.zeros_like(case.head)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_(head_grad)

    def loss(states: torch.Tensor) -> torch.Tensor:
        return linear_gdkd(states, head, case.targets, cross_entropy_weights=0.1, head_gradient=total).loss

    found = run(loss, hidden)
    if found.requires_grad:
        found.backward()
    return total


def test_no_grad_and_a_frozen_head_add_nothing() -> None:
    case = make_case(9, 40, 40)
    with torch.no_grad():
        assert bool((gradient_sum(case, lambda loss, states: loss(states)) == 0).all())
    assert bool((gradient_sum(case, lambda loss, states: loss(states), head_grad=False) == 0).all())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_adds_the_heads_gradient_once(use_reentrant: bool) -> None:
    case = make_case(9, 40, 40)
    expected = gradient_sum(case, lambda loss, states: loss(states))
    assert float(expected.abs().max()) > 0
    again = gradient_sum(case, lambda loss, states: checkpoint(loss, states, use_reentrant=use_reentrant))
    assert torch.allclose(again, expected, atol=1e-15)


def test_strided_inputs() -> None:
    case = make_case(9, 40, 40)
    expected = fused(case)
    case.targets = torch.stack([case.targets, case.targets + 1], 1)[:, 0]
    case.hidden, case.teacher_hidden = case.hidden.T.contiguous().T, case.teacher_hidden.T.contiguous().T
    for ours, theirs in zip(fused(case), expected, strict=True):
        assert error(ours, theirs) < 1e-14


@pytest.mark.parametrize(("words", "teacher_words"), [(50, 40), (40, 50), (40, None)])
def test_a_target_that_a_head_lacks_is_refused(words: int, teacher_words: int | None) -> None:
    case = make_case(6, words, teacher_words or words)
    case.targets[3] = 45
    teacher = (
        {} if teacher_words is None else {"teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head}
    )
    with pytest.raises(ConfigError) as refusal:
        linear_gdkd(case.hidden, case.head, case.targets, cross_entropy_weights=1.0, vocabulary="common", **teacher)
    assert str(refusal.value) == (
        "target id 45 is not among the 40 words of student and teacher; their tokenizers differ"
    )


def test_refusals_of_dtypes_and_shapes() -> None:
    case = make_case(6, 40, 40).to(torch.float32)
    both = {"teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head}
    expected = (
        "expected one of torch.bfloat16, torch.float32, torch.float64 for both (1 / N is below what float16 holds)"
    )
    for change, said in (
        (
            {"student_head": case.head.bfloat16()},
            f"the student's states are torch.float32 and its head torch.bfloat16; {expected}",
        ),
        (
            {"student_hidden": case.hidden.half(), "student_head": case.head.half()},
            f"the student's states are torch.float16 and its head torch.float16; {expected}",
        ),
        (
            {"teacher_head": case.teacher_head.double()},
            f"the teacher's states are torch.float32 and its head torch.float64; {expected}",
        ),
        (
            {"teacher_head": None},
            "linear_gdkd was given one of teacher_hidden and teacher_head; expected both or neither",
        ),
        (
            {"head_gradient": torch.zeros(40, 3)},
            "head_gradient is torch.float32 (40, 3); expected torch.float32 (40, 24)",
        ),
    ):
        given: dict[str, Any] = {"student_hidden": case.hidden, "student_head": case.head, **both, **change}
        with pytest.raises(ConfigError) as refusal:
            linear_gdkd(targets=case.targets, cross_entropy_weights=1.0, **given)
        assert str(refusal.value) == said


def test_refusals() -> None:
    case = make_case(6, 50, 40)
    arguments: dict[str, Any] = {"teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head}
    with pytest.raises(ConfigError) as widths:
        linear_gdkd(case.hidden, case.head, case.targets, cross_entropy_weights=1.0, **arguments)
    assert str(widths.value) == (
        "the student has 50 words and the teacher 40; "
        "set loss.vocabulary=common if both use one tokenizer and only the padding differs"
    )
    with pytest.raises(ConfigError, match=r"temperature is 0\.0; expected a number above 0"):
        linear_gdkd(case.hidden, case.head, case.targets, cross_entropy_weights=1.0, temperature=0.0)


@given(
    num_rows=st.integers(0, 20_000),
    num_words=st.integers(1, 300_000),
    teacher_words=st.integers(0, 300_000),
    gradient_bytes=st.sampled_from([0, 2, 4]),
    workspace_bytes=st.integers(1, 3_000_000_000),
)
@settings(max_examples=300, deadline=None)
def test_a_cut_fits_its_workspace(
    num_rows: int, num_words: int, teacher_words: int, gradient_bytes: int, workspace_bytes: int
) -> None:
    cut = chunking(num_rows, num_words, teacher_words, gradient_bytes, workspace_bytes)
    assert cut.rows >= 1
    assert cut.group >= min(cut.rows, num_rows)
    assert cut.num_bytes == cut.rows * 4 * (num_words + teacher_words) + cut.group * gradient_bytes * num_words
    # One row is the least there is.
    assert cut.num_bytes <= workspace_bytes or cut.rows == 1


def test_the_published_pair_is_cut_as_stated() -> None:
    cut = chunking(8192, 151_936, 151_936, 2, 1_250_000_000)
    assert (cut.rows, cut.group) == (512, 2048)
    assert cut.num_bytes <= 1_250_000_000
    assert chunking(1000, 151_936, 151_936, 2, 1_250_000_000).rows == 512
    assert chunking(300, 151_936, 151_936, 2, 1_250_000_000).rows == 300
