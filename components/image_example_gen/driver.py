"""Driver of ImageExampleGen: TFX's spans and versions, and a fingerprint of everything below the source.

TFX's own fingerprint sees what the pattern matches, so for a folder of folders it misses a file that was added or
changed deeper down, and the cache would serve stale images.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tfx.components.example_gen import driver, input_processor
from tfx.proto import example_gen_pb2, range_config_pb2
from tfx.types import standard_component_specs
from tfx.utils import proto_utils

from components.image_example_gen import sources
from components.image_example_gen.config import LATEST
from trainer_module.errors import UserError


def resolve(exec_properties: Mapping[str, Any]) -> dict[str, Any]:
    """Does what TFX's driver does, where a service gives the parameters of a run and has no driver of ours.

    Args:
        exec_properties: `input_base` may be whatever `--images` may be, and `range_config` a number, "latest", or a
            RangeConfig as JSON.

    Returns:
        The properties with input base and pattern apart, span and version filled in, and the fingerprint of the files.

    Raises:
        UserError: nothing matches, there is no image, or no such span.
    """
    inputs = example_gen_pb2.Input()
    proto_utils.json_to_proto(exec_properties[standard_component_specs.INPUT_CONFIG_KEY], inputs)
    (split,) = inputs.splits
    src = sources.join_pattern(exec_properties[standard_component_specs.INPUT_BASE_KEY], split.pattern)
    base, split.pattern = sources.split_pattern(src)
    return Driver(metadata_handle=None).resolve_exec_properties(
        {
            **exec_properties,
            standard_component_specs.INPUT_BASE_KEY: base,
            standard_component_specs.INPUT_CONFIG_KEY: proto_utils.proto_to_json(inputs),
            standard_component_specs.RANGE_CONFIG_KEY: _range(
                exec_properties.get(standard_component_specs.RANGE_CONFIG_KEY) or LATEST
            ),
        },
        pipeline_info=None,
        component_info=None,
    )


def _range(span: str) -> str | None:
    if span == LATEST:
        return None
    if span.isdecimal():
        number = int(span)
        static = range_config_pb2.StaticRange(start_span_number=number, end_span_number=number)
        return proto_utils.proto_to_json(range_config_pb2.RangeConfig(static_range=static))
    if span.startswith("{"):
        return span
    raise UserError(f"span={span} is neither {LATEST!r} nor a number; e.g. span=7")


class Driver(driver.FileBasedDriver):
    """A FileBasedDriver with `ImageInputProcessor`."""

    def get_input_processor(
        self,
        splits: Iterable[example_gen_pb2.Input.Split],
        range_config: range_config_pb2.RangeConfig | None = None,
        input_base_uri: str | None = None,
    ) -> input_processor.InputProcessor:
        """See the base class."""
        try:
            return ImageInputProcessor(input_base_uri or "", splits, range_config)
        except ValueError as error:
            raise UserError(f"--images: {error}") from error


class ImageInputProcessor(input_processor.FileBasedInputProcessor):
    """Resolves span and version as TFX does, then fingerprints all files of the source they name."""

    def resolve_span_and_version(self) -> tuple[int, int | None]:
        """Returns the latest span (0 without a specification) and version (None without).

        Raises:
            UserError: nothing matches, or there is no image.
        """
        span: int = 0
        version: int | None = None
        (split,) = self._splits
        if self._is_match_span or self._is_match_date:
            try:
                span, version = super().resolve_span_and_version()
            except ValueError as error:
                src = sources.join_pattern(self._input_base_uri, split.pattern)
                raise UserError(
                    f"--images: no span found for {src}; check the path, and that numbers alone stand in place of "
                    "{SPAN} and {VERSION}, of as many digits as {SPAN:2} says"
                ) from error
        pattern = self.get_pattern_for_span_version(split.pattern, span, version)
        self._survey = sources.survey(sources.join_pattern(self._input_base_uri, pattern))
        return span, version

    def get_input_fingerprint(self, span: int, version: int | None) -> str:  # noqa: ARG002
        """Returns the fingerprint of the listing; `resolve_span_and_version` comes first."""
        return self._survey.fingerprint
