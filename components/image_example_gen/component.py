"""ImageExampleGen: images of many kinds and places to TFX Examples.

ImageExampleGen(images="photos/", config=IngestConfig(eval_fraction=0.1))
ImageExampleGen(images="gs://bucket/day-{SPAN}/v{VERSION}/*.tar")
"""

from tfx.components.example_gen.component import FileBasedExampleGen
from tfx.dsl.components.base import executor_spec
from tfx.orchestration.data_types import RuntimeParameter
from tfx.proto import example_gen_pb2, range_config_pb2

from components.image_example_gen import driver, executor, sources
from components.image_example_gen.config import IngestConfig, to_json, validate
from components.image_example_gen.parameters import pack_parameters

_BUCKETS = 10_000


class ImageExampleGen(FileBasedExampleGen):
    """Reads, checks, de-duplicates and splits images; see the package's `sources` for what can be read.

    Outputs `examples`: Examples with the splits `train` and `eval`, as uncompressed TFRecords, since images are
    compressed already. Beside the splits lie `ingest.json` (counts, manifest) and `quarantine.jsonl` (path, reason,
    detail, sha256).
    """

    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(executor.Executor)
    DRIVER_CLASS = driver.Driver

    def __init__(
        self,
        images: str | RuntimeParameter,
        config: IngestConfig | None = None,
        code: str = "",
        range_config: range_config_pb2.RangeConfig | RuntimeParameter | None = None,
    ):
        """Makes the node.

        Args:
            images: folder, file or glob, local or gs://, with {SPAN}, {VERSION} or dates as TFX has them; or a
                parameter of the run, which `driver.resolve` takes apart.
            config: limits; None for the defaults.
            code: fingerprint of the code; it takes part in the cache key and in nothing else.
            range_config: which span to read; the latest by default. As a parameter of the run: see `driver.resolve`.

        Raises:
            UserError: a value of the configuration cannot work.
        """
        config = config or IngestConfig()
        validate(config)
        base, pattern = (images, "*") if isinstance(images, RuntimeParameter) else sources.split_pattern(images)
        inputs = example_gen_pb2.Input(splits=[example_gen_pb2.Input.Split(name="images", pattern=pattern)])
        super().__init__(
            input_base=base,
            input_config=inputs,
            output_config=_split_config(config.eval_fraction),
            custom_config=pack_parameters({"ingest": to_json(config), "code": code}),
            range_config=range_config,
        )


def _split_config(eval_fraction: float) -> example_gen_pb2.Output:
    """Hash buckets of the two splits."""
    held_out = round(eval_fraction * _BUCKETS)
    splits = [
        example_gen_pb2.SplitConfig.Split(name="train", hash_buckets=_BUCKETS - held_out),
        example_gen_pb2.SplitConfig.Split(name="eval", hash_buckets=held_out),
    ]
    return example_gen_pb2.Output(split_config=example_gen_pb2.SplitConfig(splits=splits))
