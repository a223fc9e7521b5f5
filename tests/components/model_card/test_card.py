"""The card as JSON and Markdown: everything is in it, nothing is made up, and nothing breaks out of its cell."""

import dataclasses
import json

import pytest
import yaml
from materials import COUNTS, make_card

from components.model_card.card import SCHEMA_VERSION, Data, Evaluation, Figure, Recall, to_json
from components.model_card.config import CardConfig
from components.model_card.markdown import figure, to_markdown
from components.model_card.metrics import make_metrics


def row(markdown: str, start: str) -> str:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start} |")]
    return line


def with_data(**changes):
    return make_card(data=dataclasses.replace(make_card().data, **changes))


def test_the_json_has_the_promised_keys_and_null_for_what_could_not_be_measured():
    document = json.loads(to_json(make_card()))
    assert set(document) == {
        "schema_version", "name", "license", "owner", "contact", "dataset", "intended_use", "limits", "encoder",
        "config", "data", "training", "evaluation", "versions", "code", "lineage", "pictures",
    }  # fmt: skip
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["evaluation"]["metrics"][0]["trained"] == {"value": 0.54, "low": 0.49, "high": 0.59}
    assert document["evaluation"]["metrics"][1]["trained"] == {"value": None, "low": None, "high": None}
    assert document["evaluation"]["recall"] == [
        {"label": "birds", "images": 21, "value": 20 / 21, "low": 0.77, "high": 0.99, "taken_for": "frogs"},
        {"label": "frogs", "images": 4, "value": 1.0, "low": 0.51, "high": 1.0, "taken_for": None},
    ]
    assert document["lineage"]["artifacts"]["model"] == {"type": "Model", "id": 8, "name": None}


def test_the_recall_of_each_class_is_read_in_markdown_too_whatever_the_classes_are_called():
    bad = "a|b *c*"
    recall = (Recall("birds", 21, 20 / 21, 0.77, 0.99, bad), Recall(bad, 4, 1.0, 0.51, 1.0, None))
    evaluation = dataclasses.replace(make_card().evaluation, recall=recall)
    lines = to_markdown(make_card(evaluation=evaluation)).splitlines()
    (head,) = [
        number for number, line in enumerate(lines) if line.startswith("| Class | eval images | recall by kNN |")
    ]
    assert lines[head + 2] == r"| birds | 21 | 0.952 (0.770 to 0.990) | a\|b \*c\* |"
    assert lines[head + 3] == r"| a\|b \*c\* | 4 | 1.000 (0.510 to 1.000) | — |"
    unlabelled = dataclasses.replace(evaluation, recall=())
    assert "| Class |" not in to_markdown(make_card(evaluation=unlabelled))


def test_equal_cards_give_equal_bytes_whatever_the_order_of_their_keys():
    turned = make_card(config=dict(reversed(make_card().config.items())))
    assert to_json(turned) == to_json(make_card())
    assert to_markdown(turned) == to_markdown(make_card())


def test_the_markdown_says_what_a_reader_of_cards_looks_for():
    markdown = to_markdown(make_card())
    for heading in ("Model details", "Uses", "Limits", "How to get started", "Training data", "Training procedure",
                    "Evaluation", "Versions, code and lineage"):  # fmt: skip
        assert f"\n## {heading}\n" in markdown
    assert row(markdown, "Licence") == "| Licence | apache-2.0 |"
    assert row(markdown, "Owner") == "| Owner | not stated |"
    assert "| birds | 60 | 21 |" in markdown.splitlines()
    assert "Span 7, version 2" in markdown
    assert "- Not for night pictures.\n" in markdown
    assert row(markdown, "kNN top-1") == "| kNN top-1 | 0.540 (0.490 to 0.590) | 0.430 | 0.450 | — |"
    assert row(markdown, "all embeddings are finite").endswith("| holds |")
    assert row(markdown, "model") == "| model | Model 8 |"


def test_the_metadata_is_that_of_a_hugging_face_card_and_holds_measured_figures_alone():
    metadata = yaml.safe_load(to_markdown(make_card()).split("---\n")[1])
    assert metadata["license"] == "apache-2.0"
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "knn_top1", "name": "kNN top-1", "value": 0.54}]
    unstated = to_markdown(make_card(statement=CardConfig()))
    assert "license" not in yaml.safe_load(unstated.split("---\n")[1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (Figure(None), "—"),
        (Figure(0.5), "0.500"),
        (Figure(-1.25, -1.5, -1.0), "-1.250 (-1.500 to -1.000)"),
        (Figure(51.779), "51.8"),
        (Figure(0.5, None, 0.7), "0.500"),
    ],
)
def test_a_figure_is_shown_with_its_interval_and_a_missing_one_as_a_dash(value, text):
    assert figure(value) == text


def test_a_figure_that_is_no_number_is_a_dash():
    assert row(to_markdown(make_card()), "linear probe top-1") == "| linear probe top-1 | — | — | — | — |"


def test_names_cannot_break_out_of_their_cell_nor_become_html_or_links():
    bad = "a|b\n<img src=x onerror=alert(1)> [x](javascript:1) `code` *bold*"
    markdown = to_markdown(with_data(labels={bad: {"train": 1, "eval": 1}}))
    assert "<img" not in markdown
    line = next(line for line in markdown.splitlines() if line.startswith("| a\\|b"))
    assert line.endswith("\\[x\\](javascript:1) \\`code\\` \\*bold\\* | 1 | 1 |")


def test_labels_in_limits_and_notes_are_not_markup_but_the_publishers_words_may_be():
    bad = "[x](javascript:1) *bold* &lt;img&gt; <b>"
    told = r"\[x\](javascript:1) \*bold\* &amp;lt;img&amp;gt; &lt;b>"
    labels = {bad: {"train": 9, "eval": 1}}
    noted = dataclasses.replace(make_card().evaluation, notes=(f"no train image of {bad}: they count as not found",))
    card = dataclasses.replace(with_data(labels=labels), evaluation=noted)
    card = dataclasses.replace(card, statement=dataclasses.replace(card.statement, limits=("Not *ever* <at> night.",)))
    markdown = to_markdown(card)
    assert bad not in markdown
    assert f"- No train image of {told}: they count as not found.\n" in markdown
    assert f"- no train image of {told}: they count as not found\n" in markdown
    assert f"so recall of it says little ({told}).\n" in markdown
    assert "- Not *ever* &lt;at> night.\n" in markdown


def test_an_ampersand_stays_one_in_the_text_and_in_the_metadata():
    card = make_card(statement=CardConfig(dataset="Cats & dogs &lt; 3 kg"))
    markdown = to_markdown(card)
    assert "\nCats &amp; dogs &amp;lt; 3 kg\n" in markdown
    (entry,) = yaml.safe_load(markdown.split("---\n")[1])["model-index"]
    assert entry["results"][0]["dataset"]["name"] == "Cats & dogs &lt; 3 kg"


def test_why_a_model_is_not_blessed_comes_first_in_the_card_and_in_its_limits():
    verdict = Evaluation(False, ("kNN 0.3 is below the last blessed model's 0.4",), (), (), (), ())
    card = make_card(evaluation=verdict)
    assert "**Not blessed**: kNN 0.3 is below the last blessed model's 0.4." in to_markdown(card)
    assert card.limits[1] == "This model is not blessed: kNN 0.3 is below the last blessed model's 0.4."


def test_limits_follow_from_the_data():
    text = "\n".join(make_card().limits)
    assert "100 training images" in text
    assert "±19.6 percentage points" in text  # of 25 images
    assert "1 class has fewer than 20 held-out images, so recall of it says little (frogs)" in text
    assert "begin" not in text
    unlabelled = "\n".join(with_data(labels={}).limits)
    assert "no labels" in unlabelled
    assert "percentage points" not in unlabelled
    conflicts = "\n".join(with_data(counts={**COUNTS, "unlabelled": 4, "label_conflicts": 3}).limits)
    assert "4 images have no label" in conflicts
    assert "3 images stood under more than one label" in conflicts
    alike = with_data(counts={**COUNTS, "near_duplicates": 5, "near_duplicates_dropped": 0})
    assert "Near duplicates across the split: 5, by which" in "\n".join(alike.limits)
    dropped = with_data(counts={**COUNTS, "near_duplicates": 5, "near_duplicates_dropped": 5})
    assert "Near duplicates" not in "\n".join(dropped.limits)
    noted = dataclasses.replace(make_card().evaluation, notes=("no train image of newts: they count as not found",))
    assert "No train image of newts: they count as not found." in make_card(evaluation=noted).limits


def test_alarms_and_given_weights_are_limits():
    training = dataclasses.replace(make_card().training, alarms={"leak": "batch statistics betray the positive"})
    text = "\n".join(make_card(training=training, config={"encoder.weights": "w.npz"}).limits)
    assert "An alarm at the end of its training: batch statistics betray the positive." in text
    assert "Its training began with given weights" in text


def test_alarms_that_were_not_noted_are_not_said_to_be_none():
    unknown = dataclasses.replace(make_card().training, alarms=None)
    assert row(to_markdown(make_card(training=unknown)), "Alarms at the end").endswith("| — |")
    assert row(to_markdown(make_card()), "Alarms at the end").endswith("| none |")


def test_a_card_of_nearly_nothing_can_be_written():
    nothing = Data(None, None, None, None, {}, {})
    card = make_card(data=nothing, encoder={}, config={}, versions={}, code={}, statement=CardConfig())
    assert json.loads(to_json(card))["data"]["span"] is None
    assert "Span —" in to_markdown(card)


def test_metrics_stand_beside_those_of_the_untrained_network_and_the_raw_pixels():
    values = {
        "knn_top1": 0.5, "random_init_knn_top1": 0.3, "pixel_knn_top1": 0.4, "effective_rank": 9.0,
        "finite_passed": 1.0, "score": 0.5, "score_gain_p": 0.1, "rules_passed": 1.0, "bank_images": 10.0,
        "something_new": 0.1,
    }  # fmt: skip
    metrics = make_metrics({name: Figure(value) for name, value in values.items()}, {"knn_top1": Figure(0.45)})
    assert [metric.name for metric in metrics] == ["knn_top1", "effective_rank", "something_new"]
    knn = metrics[0]
    assert (knn.trained, knn.untrained, knn.pixels, knn.baseline) == tuple(map(Figure, (0.5, 0.3, 0.4, 0.45)))
    assert (metrics[1].untrained, metrics[1].baseline) == (None, None)
    assert metrics[2].title == "something new"
