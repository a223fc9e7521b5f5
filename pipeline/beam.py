"""Where Beam runs: in this process, or wherever the arguments given with --beam-arg say. Imports no TFX."""

import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer_module.errors import UserError

# Newer Beam would otherwise choose Prism, which downloads a binary; and in memory it is several times faster than with
# worker processes, each of which imports TensorFlow anew.
BEAM_ARGUMENTS = (
    "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "--direct_running_mode=in_memory",
    "--direct_num_workers=1",
    # Workers in memory start from no image. Naming one tells TFX that they have their packages: each Beam component
    # would otherwise pack the installed TFX anew, two seconds and 49 MB in the system's temporary folder, for good.
    "--sdk_container_image=none",
)
_DISTANT = "DataflowRunner"  # its workers see nothing of this machine


def options(given: Sequence[str]) -> Any:
    """Beam's PipelineOptions.

    Args:
        given: arguments of Beam, e.g. --runner=DataflowRunner; none of them for this process.

    Raises:
        UserError: Beam knows no such argument, or takes no such value.
    """
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    class Parser(_BeamArgumentParser):  # its own class, since Beam is not imported before it is needed
        def error(self, message: str) -> NoReturn:
            raise UserError(f"--beam-arg: {message}; see Beam's pipeline options")

    if not given:
        return PipelineOptions([*BEAM_ARGUMENTS])
    parser = Parser(allow_abbrev=False, add_help=False)
    for kind in PipelineOptions.__subclasses__():
        kind._add_argparse_args(parser)
    _, unknown = parser.parse_known_args([*given])
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "write e.g. --beam-arg=--runner=DataflowRunner"
        raise UserError(f"--beam-arg: Beam takes no {unknown[0]}; {hint}")
    runs_where = any(argument.partition("=")[0] == "--runner" for argument in given)
    return PipelineOptions([*given] if runs_where else [*BEAM_ARGUMENTS, *given])


def check_reachable(made: Any, **paths: str) -> None:
    """Refuses paths of this machine where the workers are elsewhere.

    Args:
        made: by `options`.
        **paths: by the name of the option that gave them.

    Raises:
        UserError: names the first of them.
    """
    from apache_beam.options.pipeline_options import StandardOptions

    runner = made.view_as(StandardOptions).runner or ""
    for option, path in paths.items():
        if runner.endswith(_DISTANT) and "://" not in path:
            raise UserError(f"--{option} {path}: {_DISTANT}'s workers cannot reach it; name a place on gs://")
