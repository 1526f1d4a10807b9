"""Relational alignment: do student and teacher agree which image regions belong together? (GRACE eq. 10-13)

For one image, X (n, d_s) and Y (n, d_t) are the hidden states of its n visual tokens at the tapped layer. Rows are
l2-normalised (X^, Y^), H = I - 1/n centres, and with xc = H X^, yc = H Y^

    K_S = xc xc^T = H X^ X^^T H,   K_T = yc yc^T                      centred cosines, n x n
    a = <K_T, K_S>,   b = |K_T|,   c = |K_S|                          HSIC(K, L) = <K, L>; | | is Frobenius' norm
    CKA = HSIC(K_T, K_S) / sqrt(HSIC(K_T, K_T) HSIC(K_S, K_S)) = a / (b c),   loss = 1 - CKA

Only the n x n relations are compared, so widths may differ and no projector is learned. FP64 stays FP64, else FP32.
Images under ``min_tokens`` tokens, or whose centred Gram vanishes (squared norm < 1e-8), have no part in it, as in
the official code; unlike there, the test is a mask and not a host synchronisation per image.

The gradient is made in the forward pass. da/dK_S = K_T and dc/dK_S = K_S / c, hence

    M = d loss/dK_S = CKA K_S / c^2 - K_T / (b c)
    G = d loss/dX^ = 2 M xc                                           centred already, since H M = M
    d loss/dx = (G - (G . x^) x^) / |x|                               row by row; x^ = x / max(|x|, 1e-12)

Where |x| is below that floor x^ is linear in x and nothing is projected out: G / 1e-12, as in ``F.normalize``.

Images of different length share batched products: each is padded to the longest of its sub-batch, and a padded row is
exactly 0 after centring, so the Gram matrices, their sums and every product are those of the n tokens alone.

Of the teacher only K_T is needed. ``centred_grams`` makes it ahead of time, as packed triangles (``Grams``), and the
loss takes those in place of features: the same numbers but for the rounding of another summation order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from grace_vlm.kernels.upload import upload
from grace_vlm.losses.signal import Grams, triangle

DEGENERATE_SQUARED_NORM = 1e-8
NORM_FLOOR = 1e-12
"""Of a token's length, as in ``F.normalize``."""
SHORTEST_BUCKET_TOKENS = 16
"""Images of up to so many tokens share a bucket; above it a bucket ends at each power of two."""
SUB_BATCH_BYTES = 256 * 2**20
"""Of padded features and Gram matrices that are alive at one time; an image that needs more is alone."""


def _sub_batches(lengths: Sequence[int], min_tokens: int, image_bytes: Callable[[int], int]) -> list[list[int]]:
    """Images, by their place in ``lengths``, that share products; ``image_bytes``: of an image of so many tokens."""
    buckets: dict[int, list[int]] = {}
    images = (image for image, length in enumerate(lengths) if length >= max(min_tokens, 1))
    for image in sorted(images, key=lengths.__getitem__):
        bucket = max(SHORTEST_BUCKET_TOKENS, 1 << (lengths[image] - 1).bit_length())
        buckets.setdefault(bucket, []).append(image)
    batches = []
    for bucket_images in buckets.values():
        size = max(1, SUB_BATCH_BYTES // image_bytes(lengths[bucket_images[-1]]))
        batches += [bucket_images[first : first + size] for first in range(0, len(bucket_images), size)]
    return batches


def _arithmetic_dtype(features: torch.Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _unit_rows(
    features: torch.Tensor, rows: torch.Tensor, padded: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x^ (k, p, d), what x was divided by (k, p, 1)) of features (n, d) at rows (k, p); x^ is 0 where ``padded``."""
    tokens = features.index_select(0, rows.flatten()).view(*rows.shape, features.shape[1]).to(dtype)
    divisors = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min_(NORM_FLOOR)
    divisors.masked_fill_(padded, math.inf)  # what is divided by infinity is 0, and so is its gradient
    return tokens.div_(divisors), divisors


def _centre(rows: torch.Tensor, padded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """H rows, of a padded stack (k, p, d): the mean of an image's tokens is taken off them, padded rows stay 0."""
    mean = rows.sum(dim=1, keepdim=True) / lengths.view(-1, 1, 1)
    return torch.addcmul(rows, (~padded).to(rows.dtype), mean, value=-1.0)


def _gram(centred: torch.Tensor) -> torch.Tensor:
    return torch.bmm(centred, centred.transpose(1, 2))


def _triangle_places(places: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(where (i, j) of each image stands in packed triangles (k, p, p) int64, which pairs are padding (k, p, p)).

    places: as in ``_sub_batch_loss``. A pair and its mirror image stand at one place; padding is at the image's first.
    """
    _, lengths, firsts = places
    place = torch.arange(longest, device=places.device)
    later, earlier = torch.maximum(place.unsqueeze(1), place), torch.minimum(place.unsqueeze(1), place)
    padded = later >= lengths.view(-1, 1, 1)
    table = (later * (later + 1)).div_(2, rounding_mode="floor").add_(earlier)
    return firsts.view(-1, 1, 1) + table.masked_fill(padded, 0), padded


def _unpack(grams: Grams, places: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """(k, p, p) Gram matrices of packed triangles, 0 where padded."""
    at, padded = _triangle_places(places, longest)
    return grams.values.index_select(0, at.flatten()).view(at.shape).to(dtype).masked_fill_(padded, 0.0)


def _gram_of_rows(features: torch.Tensor, places: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """(k, p, p) Gram matrices of features (n, d), 0 where padded."""
    rows, padded = _padded_rows(places, longest)
    return _gram(_centre(_unit_rows(features, rows, padded, dtype)[0], padded, places[1]))


def _padded_rows(places: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each image's tokens (k, p), which of them are padding (k, p, 1))."""
    starts, lengths, _ = places
    place, last = torch.arange(longest, device=places.device), (lengths - 1).unsqueeze(1)
    # A padded place reads the last token of its own image: no image can spoil another with a NaN.
    return starts.unsqueeze(1) + torch.minimum(place, last), (place > last).unsqueeze(2)


def _compare(gram_s: torch.Tensor, gram_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1 - CKA (k,), 0 for an image that stays out; which stay out (k,); 2 M (k, p, p), written over gram_s)."""
    squared_s, squared_t = gram_s.square().sum((1, 2)), gram_t.square().sum((1, 2))
    out = torch.minimum(squared_s, squared_t) < DEGENERATE_SQUARED_NORM  # a NaN enters: it must stop the run
    squared_s, squared_t = squared_s.masked_fill_(out, 1.0), squared_t.masked_fill_(out, 1.0)
    norms = squared_s.sqrt() * squared_t.sqrt()
    cka = (gram_s * gram_t).sum((1, 2)) / norms
    slope = gram_s.mul_((2 * cka / squared_s).view(-1, 1, 1)).sub_(gram_t.mul_((2 / norms).view(-1, 1, 1)))
    return (1.0 - cka).masked_fill_(out, 0.0), out, slope


def _sub_batch_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | Grams,
    places: torch.Tensor,
    longest: int,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of 1 - CKA, images that entered) of one sub-batch; its gradients go to their rows of ``gradient``.

    places: (3, k) first row, length, and first packed value of each image. gradient: (n + 1, d_s); its last row is
    spare: it takes what belongs to no token or to an image that stays out, which therefore keeps the 0 that was there.
    """
    dtype = _arithmetic_dtype(student)
    if isinstance(teacher, Grams):
        gram_t = _unpack(teacher, places, longest, dtype)
    else:
        gram_t = _gram_of_rows(teacher, places, longest, dtype)
    rows, padded = _padded_rows(places, longest)
    unit, divisors = _unit_rows(student, rows, padded, dtype)
    lengths = places[1]
    centred = _centre(unit, padded, lengths)
    losses, out, slope = _compare(_gram(centred), gram_t)
    if gradient is not None:
        # H M = M but for rounding, which costs up to 1.7 times the error of FP32 when all tokens lie in one direction.
        step = torch.bmm(_centre(slope, padded, lengths), centred)
        along = (unit * step).sum(dim=-1, keepdim=True).masked_fill_(divisors <= NORM_FLOOR, 0.0)
        step.addcmul_(unit, along, value=-1.0).div_(divisors)
        target = rows.masked_fill(padded.squeeze(2) | out.unsqueeze(1), gradient.shape[0] - 1)
        gradient.index_copy_(0, target.flatten(), step.flatten(0, 1))
    return losses.sum(), (~out).sum()


def _places(lengths: Sequence[int], batches: list[list[int]], device: torch.device) -> torch.Tensor:
    """(3, images) int64 on the device, in the order of the sub-batches: as in ``_sub_batch_loss``."""
    starts = list(itertools.accumulate(lengths, initial=0))
    firsts = list(itertools.accumulate(map(triangle, lengths), initial=0))
    images = list(itertools.chain.from_iterable(batches))
    table = [[whole[image] for image in images] for whole in (starts, lengths, firsts)]
    return upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device)


class _RelationalLoss(torch.autograd.Function):
    """(sum of 1 - CKA, number of images that entered); the gradient of the student's features is made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | Grams,
        lengths: list[int],
        min_tokens: int,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = _arithmetic_dtype(student)

        def image_bytes(tokens: int) -> int:
            # The most that is alive at one time: unit and centred rows of the teacher, or the places of its triangle
            # (INT64, twice) and its Gram matrix, or four such rows of the student with three Gram matrices; and the
            # indices and masks.
            of_teacher = 6 * tokens if isinstance(teacher, Grams) else 2 * teacher.shape[1]
            widest = max(of_teacher, 4 * student.shape[1] + 3 * tokens)
            return tokens * (dtype.itemsize * widest + 32)

        batches = _sub_batches(lengths, min_tokens, image_bytes)
        places = _places(lengths, batches, student.device)
        total, count = student.new_zeros((), dtype=dtype), student.new_zeros((), dtype=dtype)
        gradient = student.new_zeros(student.shape[0] + 1, student.shape[1], dtype=dtype) if needs_gradient else None
        for batch, part in zip(batches, places.split([len(batch) for batch in batches], dim=1), strict=True):
            loss, entered = _sub_batch_loss(student, teacher, part, lengths[batch[-1]], gradient)
            total += loss
            count += entered
        ctx.dtype = student.dtype
        ctx.save_for_backward(None if gradient is None else gradient[:-1])
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_total).to(ctx.dtype), None, None, None, None


def centred_grams(features: torch.Tensor, image_lengths: Sequence[int]) -> Grams:
    """K_T of every image of any length, from features (n, d), image after image; on their device, without a read.

    For FP64 features in FP64, else in FP32.
    """
    dtype = _arithmetic_dtype(features)
    total = sum(map(triangle, image_lengths))
    # The last place is spare: it takes the upper triangles and the padding.
    values = features.new_zeros(total + 1, dtype=dtype)
    batches = _sub_batches(
        image_lengths, 1, lambda tokens: tokens * dtype.itemsize * (2 * features.shape[1] + 6 * tokens)
    )
    places = _places(image_lengths, batches, features.device)
    for batch, part in zip(batches, places.split([len(batch) for batch in batches], dim=1), strict=True):
        longest = image_lengths[batch[-1]]
        at, padded = _triangle_places(part, longest)
        is_upper = torch.ones(longest, longest, dtype=torch.bool, device=features.device).triu_(1)
        target = at.masked_fill_(padded | is_upper, total)
        values.index_copy_(0, target.flatten(), _gram_of_rows(features, part, longest, dtype).flatten())
    return Grams(values[:-1])


def relational_cka_sum(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor | Grams,
    image_lengths: Sequence[int] | torch.Tensor,
    *,
    min_tokens: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of 1 - CKA, number of images that entered), both scalars. No second derivative.

    Args:
        student_features: (n, d_s), all visual tokens, image after image. teacher_features: (n, d_t), or
            the ``Grams`` of the same images; no gradient.
        image_lengths: visual tokens of each image, a list or 1-D tensor; their sum is n.
        min_tokens: an image with fewer tokens is left out.
    """
    given = image_lengths.tolist() if isinstance(image_lengths, torch.Tensor) else image_lengths
    lengths = [int(length) for length in given]
    if isinstance(teacher_features, Grams):
        teacher: torch.Tensor | Grams = Grams(teacher_features.values.detach())
        num_given, num_expected = teacher_features.values.shape[0], sum(map(triangle, lengths))
    else:
        teacher = teacher_features.detach()
        num_given, num_expected = teacher_features.shape[0], sum(lengths)
    if sum(lengths) != student_features.shape[0] or num_given != num_expected:
        given_as = "packed values" if isinstance(teacher_features, Grams) else "rows"
        expected = f" where {num_expected} are expected" if isinstance(teacher_features, Grams) else ""
        raise ValueError(
            f"image_lengths add up to {sum(lengths)}, features have {student_features.shape[0]} (student) and "
            f"{num_given} (teacher) {given_as}{expected}"
        )
    needs_gradient = torch.is_grad_enabled() and student_features.requires_grad
    loss, count = _RelationalLoss.apply(student_features, teacher, lengths, min_tokens, needs_gradient)
    return loss, count


def relational_cka(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor | Grams,
    image_lengths: Sequence[int] | torch.Tensor,
    *,
    min_tokens: int = 4,
    normalizer: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Mean of 1 - CKA over the images that enter (eq. 13), a scalar; 0 when none does.

    ``normalizer``: divide the sum by this instead (images of all micro-batches and ranks). Other arguments as in
    ``relational_cka_sum``.
    """
    total, count = relational_cka_sum(student_features, teacher_features, image_lengths, min_tokens=min_tokens)
    return total / (count.clamp_min(1.0) if normalizer is None else normalizer)
