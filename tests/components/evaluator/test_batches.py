"""Batches for the judged models: as many images each, whatever the sizes that came, none lost and in their order."""

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that
from tensorflow_model_analysis import constants

from components.evaluator.batches import IMAGES, FixedBatches
from pipeline.engines import BEAM_ARGUMENTS


def row(number):
    """Every third image has no label."""
    return {"raw": [b"image %d" % number], **({"label": [b"cat"]} if number % 3 else {})}


def arriving(sizes):
    """Record batches of these sizes, as TFXIO gives them to TFMA: without a column that no row of theirs has."""
    first = 0
    for size in sizes:
        rows = [row(number) for number in range(first, first + size)]
        names = sorted({name for one in rows for name in one})
        batch = pa.RecordBatch.from_pydict({name: [one.get(name) for one in rows] for name in names})
        yield {constants.ARROW_RECORD_BATCH_KEY: batch}
        first += size


@pytest.mark.parametrize("sizes", [(200,), (1, 3, 9, 27, 81, 79), (64, 64, 64, 8), (1,) * 200])
def test_the_sizes_that_come_do_not_matter(sizes):
    def check(leaving):
        batches = [extracts[constants.ARROW_RECORD_BATCH_KEY] for extracts in leaving]
        assert [batch.num_rows for batch in batches] == [IMAGES, IMAGES, IMAGES, 200 - 3 * IMAGES]
        rows = [one for batch in batches for one in batch.to_pylist()]
        assert rows == [{"label": None, **row(number)} for number in range(200)]

    with beam.Pipeline(argv=[*BEAM_ARGUMENTS]) as pipeline:
        # One element, so that all come in one bundle, as the examples of one file do.
        source = pipeline | beam.Create([sizes]) | beam.FlatMap(arriving)
        assert_that(source | FixedBatches(), check)
