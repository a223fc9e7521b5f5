"""ViewAugmenter, the component."""

from tfx import types
from tfx.dsl.components.base import base_beam_component, executor_spec
from tfx.types import standard_artifacts

from components.view_augmenter.executor import Executor
from components.view_augmenter.spec import ViewAugmenterSpec
from trainer_module import config_json
from trainer_module.config import AugmentConfig, ImageConfig, SampleConfig


class ViewAugmenter(base_beam_component.BaseBeamComponent):
    """Makes seeded pairs of views, or the stored images that the trainer makes them from.

    Example:
        example_gen = ImageExampleGen(images="photos/")
        views = ViewAugmenter(
            examples=example_gen.outputs["examples"],
            image=ImageConfig(storage_size=256),
            augment=AugmentConfig(size=224, pairs_per_image=4),
            seed=0,
            sample=SampleConfig(bank=1000),
        )
        trainer = Trainer(examples=views.outputs["views"], run_fn="trainer_module.run_fn.run_fn", ...)

    Output `views`: Examples with the split `train`, as uncompressed TFRecords, each file made from one input shard:
        images-SSSSS-of-NNNNN.tfrecord        `id` (hex SHA-256), `image` (PNG); unless augment.where is `beam`
        views-pPPPP-SSSSS-of-NNNNN.tfrecord   `id`, `query`, `key` (uint8 [size, size, 3], raw) of pair P; unless
                                              augment.where is `trainer`
    Beside the split lie `watch/`, a small sample of the labelled images of both splits for the trainer's online kNN:
        SPLIT-SSSSS-of-NNNNN.tfrecord         `id`, `image` (uint8 [size, size, 3], raw, the centre view), `label`
    and views.json, written last, which lists the files with their records and bytes.
    """

    SPEC_CLASS = ViewAugmenterSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)

    def __init__(
        self,
        examples: types.BaseChannel,
        image: ImageConfig,
        augment: AugmentConfig,
        seed: int,
        sample: SampleConfig = SampleConfig(),
        code: str = "",
    ):
        """Makes the node.

        Args:
            examples: of ImageExampleGen; views are made of the split `train`, the sample is taken of `eval`, too.
            image: geometry of the stored image.
            augment: the recipe, how many pairs, and where they are made.
            seed: of the experiment.
            sample: how many labelled images are kept for the online kNN.
            code: fingerprint of the code; it takes part in the cache key and in nothing else.
        """
        super().__init__(
            ViewAugmenterSpec(
                examples=examples,
                image=config_json.dumps(image),
                augment=config_json.dumps(augment),
                seed=seed,
                sample=config_json.dumps(sample),
                code=code,
                views=types.Channel(type=standard_artifacts.Examples),
            )
        )
