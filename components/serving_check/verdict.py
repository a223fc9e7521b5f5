"""From a model's answers to a verdict: what it does otherwise than it must, in words, and its figures."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.serving_check.config import ServingCheckConfig
from components.serving_check.requests import BATCHES, INPUTS, Kind, Request
from components.serving_check.session import Answer, Session
from trainer_module.config import Precision

OUTPUT = "embedding"

_BFLOAT16_TOLERANCE = 2.0**-6  # two steps of its eight bits, which one more addition may turn the other way


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is written beside the blessing.

    Attributes:
        reasons: why the model must not be served, one sentence each; none where it may.
        figures: signatures and images that were asked for; largest differences; load_seconds; peak_mib; `latency_ms`,
            median and p95 of an image by signature and batch.
    """

    reasons: tuple[str, ...]
    figures: Mapping[str, Any]

    @property
    def blessed(self) -> bool:
        """Whether the model may be served."""
        return not self.reasons


def judge(requests: Sequence[Request], session: Session, config: ServingCheckConfig, precision: Precision) -> Verdict:
    """Compares answers with what they must be.

    Args:
        requests: that were made.
        session: what came of them.
        config: limits.
        precision: of the network's activations.
    """
    tolerance = max(config.tolerance, _BFLOAT16_TOLERANCE if precision is Precision.bfloat16 else 0.0)
    reasons = [session.trouble] if session.trouble else []
    if session.inputs is not None:
        reasons += _wrong_signatures(session.inputs)
        answered = [(r, a) for r, a in zip(requests, session.answers, strict=True) if a is not None]
        reasons += [reason for request, answer in answered for reason in _wrong(request, answer, tolerance)]
        reasons += _depends_on_batch(answered, tolerance)
    latency = _latency(requests, session.answers)
    reasons += _too_slow(latency, config.max_latency_ms)
    return Verdict(tuple(dict.fromkeys(reasons)), _figures(requests, session, latency, tolerance))


def _wrong_signatures(inputs: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name, argument in INPUTS.items():
        if name not in inputs:
            yield f"signature {name} is missing; there are: {', '.join(sorted(inputs)) or 'none'}"
        elif list(inputs[name]) != [argument]:
            yield f"signature {name} takes {', '.join(inputs[name]) or 'nothing'} instead of {argument}"


def _wrong(request: Request, answer: Answer, tolerance: float) -> Iterator[str]:
    """What is wrong with one answer; the first thing, since the rest follows from it."""
    if request.kind is Kind.broken:
        if answer.outputs is not None:
            yield f"{request}: gives a vector instead of an error"
        elif not answer.invalid:
            yield f"{request}: fails otherwise than with INVALID_ARGUMENT ({answer.error})"
        return
    if answer.outputs is None:
        yield f"{request}: {answer.error}"
        return
    if set(answer.outputs) != {OUTPUT}:
        yield f"{request}: gives {', '.join(sorted(answer.outputs)) or 'nothing'} instead of {OUTPUT}"
        return
    vectors, size = answer.outputs[OUTPUT], _size(request)
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(request.value):
        shape = ", ".join(map(str, vectors.shape))
        yield f"{request}: gives {vectors.dtype}[{shape}] instead of float32[{len(request.value)}, D]"
    elif size and vectors.shape[1] != size:
        yield f"{request}: gives {vectors.shape[1]} numbers an image, the trainer's network {size}"
    elif not np.isfinite(vectors).all():
        yield f"{request}: gives NaN or infinity"
    elif request.expected is not None:
        yield from _differs(request, vectors, tolerance)


def _size(request: Request) -> int:
    return 0 if request.expected is None else request.expected.shape[1]


def _differs(request: Request, vectors: NDArray[np.float32], tolerance: float) -> Iterator[str]:
    assert request.expected is not None
    length = _off_unit_length(vectors)
    difference = float(np.abs(vectors - request.expected).max())
    if length > tolerance:
        yield f"{request}: lengths of embeddings are up to {length:.1e} off 1"
    elif difference > tolerance:
        yield f"{request}: is up to {difference:.1e} off the trainer's own embeddings; {tolerance:.1e} is allowed"


def _off_unit_length(vectors: NDArray[np.float32]) -> float:
    return float(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max(initial=0.0))


def _sound(answered: Sequence[tuple[Request, Answer]]) -> Iterator[tuple[Request, NDArray[np.float32]]]:
    """Embeddings of images that are vectors as they should be, whatever their values."""
    for request, answer in answered:
        if request.kind is Kind.images and answer.outputs is not None and not list(_wrong(request, answer, np.inf)):
            yield request, answer.outputs[OUTPUT]


def _vectors(answered: Sequence[tuple[Request, Answer]], signature: str) -> dict[int, NDArray[np.float32]]:
    """Embeddings of one signature by size of batch; each batch begins with the same images."""
    return {len(request.value): rows for request, rows in _sound(answered) if request.signature == signature}


def _batch_difference(vectors: Mapping[int, NDArray[np.float32]]) -> float:
    """Largest difference of an image's embeddings in the largest batch and in others; 0 for less than two batches."""
    if len(vectors) < 2:
        return 0.0
    largest = vectors[max(vectors)]
    return max(float(np.abs(rows - largest[:count]).max()) for count, rows in vectors.items())


def _depends_on_batch(answered: Sequence[tuple[Request, Answer]], tolerance: float) -> Iterator[str]:
    for signature in INPUTS:
        difference = _batch_difference(_vectors(answered, signature))
        if difference > tolerance:
            yield (
                f"{signature}: an image's embedding depends on its batch, by up to {difference:.1e}; "
                f"{tolerance:.1e} is allowed"
            )


def _latency(requests: Sequence[Request], answers: Sequence[Answer | None]) -> dict[str, dict[str, Any]]:
    """{signature: {batch: {"median", "p95"}}}, milliseconds of one image."""
    latency: dict[str, dict[str, Any]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if answer is not None and answer.seconds:
            each = 1e3 * np.array(answer.seconds) / len(request.value)
            median, p95 = np.percentile(each, [50, 95])
            batches = latency.setdefault(request.signature, {})
            batches[str(len(request.value))] = {"median": round(median, 3), "p95": round(p95, 3)}
    return latency


def _too_slow(latency: Mapping[str, Mapping[str, Any]], limit: float) -> Iterator[str]:
    for signature, batches in latency.items():
        if limit and str(BATCHES[0]) in batches and batches[str(BATCHES[0])]["p95"] > limit:
            p95 = batches[str(BATCHES[0])]["p95"]
            yield f"{signature}: one image takes {p95:.1f} ms (p95), above serving_check.max_latency_ms={limit:g}"


def _figures(
    requests: Sequence[Request], session: Session, latency: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    answered = [(r, a) for r, a in zip(requests, session.answers, strict=True) if a is not None]
    images = [request for request, _ in answered if request.kind is Kind.images]
    sound = list(_sound(answered))
    differences = [float(np.abs(vectors - r.expected).max()) for r, vectors in sound if r.expected is not None]
    return {
        "signatures": len({request.signature for request in images}),
        "images": sum(len(request.value) for request in images),
        "calls": len(answered),
        "tolerance": tolerance,
        "off_trainer": max(differences, default=None),
        "off_batch": max((_batch_difference(_vectors(answered, name)) for name in INPUTS), default=None),
        "off_unit_length": max((_off_unit_length(vectors) for _, vectors in sound), default=None),
        "latency_ms": latency,
        "load_seconds": round(session.load_seconds, 2),
        "peak_mib": round(session.peak_bytes / 2**20),
    }
