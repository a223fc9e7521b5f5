"""Where Beam runs: here unless it is said otherwise, and what is said must make sense."""

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions

from pipeline import beam
from trainer_module.errors import UserError


def test_beam_runs_in_this_process_unless_another_runner_is_named():
    assert beam.options([]).view_as(StandardOptions).runner.endswith(".FnApiRunner")
    assert beam.options(["--direct_num_workers=2"]).view_as(StandardOptions).runner.endswith(".FnApiRunner")
    assert beam.options(["--runner=DataflowRunner"]).view_as(StandardOptions).runner == "DataflowRunner"


def test_arguments_reach_beam():
    made = beam.options(["--runner=DataflowRunner", "--project=mine", "--temp_location=gs://b/t"])
    options = made.view_as(GoogleCloudOptions)
    assert (options.project, options.temp_location) == ("mine", "gs://b/t")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--runer=DataflowRunner", "did you mean --runner?"),
        ("DataflowRunner", "--beam-arg=--runner=DataflowRunner"),
        ("--direct_num_workers=many", "direct_num_workers"),
    ],
)
def test_what_beam_does_not_know_is_refused_in_one_line(argument, words):
    with pytest.raises(UserError, match="--beam-arg") as caught:
        beam.options([argument])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_of_this_machine_are_refused_where_the_workers_are_elsewhere():
    dataflow = beam.options(["--runner=DataflowRunner"])
    beam.check_reachable(dataflow, model="gs://b/m", out="gs://b/o/")
    beam.check_reachable(beam.options([]), model="/m", out="/o")
    with pytest.raises(UserError, match=r"--images /i: .*gs://"):
        beam.check_reachable(dataflow, model="gs://b/m", images="/i")
