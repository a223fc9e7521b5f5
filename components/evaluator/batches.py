"""Batches of one size for the models that are judged.

TFXIO has Beam choose the size by the clock, up to 1,000 images, and a network's last digits depend on its batch: the
same evaluation on a busier machine would differ in them.
"""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from tensorflow_model_analysis import constants
from tfx_bsl.arrow import table_util

IMAGES = 64

Extracts = dict[str, Any]


class FixedBatches(beam.PTransform):
    """TFMA's first extracts, a record batch each, to others of IMAGES rows; a bundle's last one may have fewer."""

    def expand(self, extracts: beam.PCollection) -> beam.PCollection:
        """See the class."""
        return (
            extracts
            | "Rows" >> beam.FlatMap(_rows)
            | "Batch" >> beam.BatchElements(IMAGES, IMAGES)
            | "Join" >> beam.Map(_joined)
        )


def _rows(extracts: Extracts) -> Iterator[pa.RecordBatch]:
    batch = extracts[constants.ARROW_RECORD_BATCH_KEY]
    for row in range(batch.num_rows):
        yield batch.slice(row, 1)


def _joined(rows: list[pa.RecordBatch]) -> Extracts:
    # Which columns a batch had depends on its images: a label that none has is none.
    return {constants.ARROW_RECORD_BATCH_KEY: table_util.MergeRecordBatches(rows)}
