"""The search for the largest batch that fits."""

import numpy as np
import pytest

from pipeline.tpu.analysis import Compiled, Memory, Refused
from pipeline.tpu.fit import largest_batch

GIB = 2**30
HAS = 16 * GIB
LEFT = int(15.75 * GIB)


def compiler(fixed, per_image, bend=0.0):
    """Memory as compilers need it: a part that is fixed, one that grows with the batch, and some curvature."""

    def compile_for(batch):
        needed = int(fixed + per_image * batch * (1 + bend * batch))
        if needed > LEFT:
            return Refused("out of memory", needed, LEFT)
        return Compiled(1.0, 1.0, Memory(0, 0, 0, needed, 0), {}, (), (), {}, {}, {}, {}, {}, 1.0)

    return compile_for


def truth(compile_for, step):
    return max(batch for batch in range(step, 4096, step) if isinstance(compile_for(batch), Compiled))


@pytest.mark.parametrize("bend", [0.0, 0.001, -0.00005])
@pytest.mark.parametrize("start", [1, 32, 4000])
@pytest.mark.parametrize("step", [1, 8])
def test_the_largest_batch_is_found_to_a_sixteenth_by_few_compilations(start, step, bend):
    compile_for = compiler(GIB, 40 * 2**20, bend)
    fit = largest_batch(compile_for, start, step, 4095, HAS)
    best = truth(compile_for, step)
    assert best * 15 / 16 - step <= fit.largest <= best
    assert len(fit.tried) <= 8
    assert not fit.stopped
    assert fit.largest % step == 0


def test_memory_that_does_not_grow_in_a_line_does_not_lead_the_search_astray():
    measured = [
        (64, 0.4),
        (512, 1.7),
        (4096, 11.8),
        (5572, 14.7),
        (6254, 14.9),
        (9157, 16.5),
        (9547, 17.2),
        (10473, 18.9),
    ]

    def compile_for(batch):  # ResNet-18 at 32 px, K 131,072, as libtpu's compiler needed it
        needed = int(np.interp(batch, *zip(*measured, strict=True)) * GIB)
        return compiler(needed, 0)(batch)

    fit = largest_batch(compile_for, 64, 1, 16384, HAS)
    best = next(batch for batch in range(9157, 6253, -1) if isinstance(compile_for(batch), Compiled))
    assert best * 15 / 16 <= fit.largest <= best
    assert not fit.stopped


def test_a_queue_that_is_too_short_is_named():
    fit = largest_batch(compiler(GIB, 1000), 32, 1, 100, HAS)
    assert fit.largest == 100
    assert "needs a longer queue" in fit.words()


def test_a_chip_that_is_too_small_for_any_batch_is_said():
    fit = largest_batch(compiler(20 * GIB, 1000), 32, 1, 100, HAS)
    assert fit.largest is None
    assert fit.words().startswith("no batch fits; tried 32 does not (20.0 GiB)")


def test_another_refusal_of_the_compiler_ends_the_search_in_its_words():
    fit = largest_batch(lambda _: Refused("unsupported operation"), 32, 1, 100, HAS)
    assert fit.stopped == "32 does not compile: unsupported operation"
