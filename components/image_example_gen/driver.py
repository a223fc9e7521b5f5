"""Driver of ImageExampleGen: TFX's spans and versions, and a fingerprint of everything below the source.

TFX's own fingerprint sees what the pattern matches, so for a folder of folders it misses a file that was added or
changed deeper down, and the cache would serve stale images.
"""

from collections.abc import Iterable

from tfx.components.example_gen import driver, input_processor
from tfx.v1 import proto

from components.image_example_gen import sources
from trainer_module.errors import UserError


class Driver(driver.FileBasedDriver):
    """A FileBasedDriver with `ImageInputProcessor`."""

    def get_input_processor(
        self,
        splits: Iterable[proto.Input.Split],
        range_config: proto.RangeConfig | None = None,
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
                raise UserError(f"--images: no span found for {src} ({error}); check the path") from error
        pattern = self.get_pattern_for_span_version(split.pattern, span, version)
        self._survey = sources.survey(sources.join_pattern(self._input_base_uri, pattern))
        return span, version

    def get_input_fingerprint(self, span: int, version: int | None) -> str:  # noqa: ARG002
        """Returns the fingerprint of the listing; `resolve_span_and_version` comes first."""
        return self._survey.fingerprint
