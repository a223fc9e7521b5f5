"""What a run did: a line for each component, result.json, and the summary. Reads the artifacts alone."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_data_validation as tfdv
import tensorflow_transform as tft
from tfx.components.evaluator.constants import ARTIFACT_PROPERTY_BLESSED_KEY
from tfx.proto import example_gen_pb2
from tfx.types import Artifact
from tfx.utils import io_utils

from components.evaluator import label_free
from components.evaluator.eval_config import (
    as_json,
    read_intervals,
    read_metrics,
    read_notes,
    read_rules,
    read_validation,
)
from components.evaluator.outcomes import HITS, PREFIXES
from components.image_example_gen import sources
from components.image_example_gen.driver import ImageInputProcessor
from components.model_card.card import JSON_FILE, PAGE_FILE
from components.serving_check.executor import read_report
from components.serving_check.requests import BATCHES
from components.transform.preprocessing import LABEL_VOCABULARY
from components.transform.statistics import read_anomalies, read_missing_labels
from pipeline.config import Config
from trainer_module.input import read_manifest
from trainer_module.run_fn import TRAINING_FILE

# Of the Evaluator, each beside that of the untrained network and of raw pixels.
_METRICS = tuple(f"{prefix}{name}" for name in (*HITS, *label_free.NAMES) for prefix in PREFIXES.values())
_TRAIN = ("steps", "images_per_second", "final_loss", "strategy", "replicas", "alignment")
_COUNTS = ("read", "ingested", "quarantined", "duplicates", "train", "eval")


@dataclasses.dataclass(frozen=True)
class Node:
    """What came of one node of the pipeline.

    Attributes:
        id: of the component.
        seconds: that it took in this run, driver and publishing included.
        executor_seconds: the part that its executor took.
        cached: whether the outputs are those of an earlier run.
        outputs: artifacts by key.
    """

    id: str
    seconds: float
    executor_seconds: float
    cached: bool
    outputs: Mapping[str, Sequence[Artifact]]

    def uri(self, key: str) -> str:
        """Of the only artifact of an output."""
        (artifact,) = self.outputs[key]
        return str(artifact.uri)


def describe(node: Node) -> str:
    """What a component did, in numbers; empty for a node without a line of its own."""
    describer = _DESCRIBERS.get(node.id)
    return describer(node) if describer else ""


def collect(nodes: Sequence[Node], seconds: float) -> dict[str, Any]:
    """The content of result.json."""
    by_id = {node.id: node for node in nodes}
    training = _training(by_id["Trainer"])
    metrics = read_metrics(by_id["Evaluator"].uri("evaluation"))
    estimates = read_intervals(by_id["Evaluator"].uri("evaluation"))
    served = read_report(by_id["ServingCheck"].uri("blessing"))
    blessed = _blessed(by_id["Evaluator"]) and served.blessed
    counts = ingested(by_id["ImageExampleGen"])
    return {
        "status": "succeeded" if blessed else "not_blessed",
        "blessed": blessed,
        "pushed_model": _pushed(by_id["Pusher"]),
        "model_card": _page(by_id["ModelCard"]),
        "images": {key: counts[key] for key in _COUNTS},
        "rules": [rule._asdict() for rule in read_rules(by_id["Evaluator"].uri("evaluation"))],
        "intervals": as_json({name: estimates[name] for name in _METRICS if name in estimates}),
        "metrics": {name: metrics.get(name) for name in _METRICS} | {"pretext_top1": training["pretext_top1"]},
        "train": {name: training[name] for name in _TRAIN},
        "serving": {"reasons": list(served.reasons)} | dict(served.figures),
        "seconds": {node.id: round(node.seconds, 2) for node in nodes} | {"total": round(seconds, 2)},
        "executor_seconds": {node.id: round(node.executor_seconds, 2) for node in nodes},
        "cached": [node.id for node in nodes if node.cached],
    }


def failed(nodes: Sequence[Node], current: str, error: BaseException, seconds: float) -> str:
    """result.json of a run that failed in a component."""
    return to_json(
        {
            "status": "failed",
            "blessed": False,
            "pushed_model": None,
            "model_card": None,
            "images": _counts_so_far(nodes),
            "metrics": dict.fromkeys((*_METRICS, "pretext_top1")),
            "train": dict.fromkeys(_TRAIN),
            "failed_component": current or None,
            "error": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            "seconds": {node.id: round(node.seconds, 2) for node in nodes} | {"total": round(seconds, 2)},
        }
    )


def _counts_so_far(nodes: Sequence[Node]) -> dict[str, int | None]:
    counts = next((ingested(node) for node in nodes if node.id == "ImageExampleGen"), {})
    return {key: counts.get(key) for key in _COUNTS}


def to_json(result: Mapping[str, Any]) -> str:
    """As text that people can read, too."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def summary(result: Mapping[str, Any], nodes: Sequence[Node], config: Config, images: str, home: Path) -> list[str]:
    """The summary that ends a run, line by line."""
    by_id = {node.id: node for node in nodes}
    counts, train = result["images"], result["train"]
    rows = [
        (
            "images",
            f"{counts['read']:,} read, {counts['quarantined']:,} quarantined, {counts['duplicates']:,} duplicates; "
            f"{counts['train']:,} to train, {counts['eval']:,} to evaluate",
        ),
        *(("look at", note) for note in _notes(by_id)),
        (
            "trained",
            f"{config.encoder.name} (width {config.encoder.width}), {train['steps']:,} steps of "
            f"{config.train.global_batch} images on {train['replicas']} replicas, loss {train['final_loss']:.2f}",
        ),
        *_quality(result["metrics"], result["intervals"], counts, config),
        *_serving(by_id["ServingCheck"]),
        ("blessed", _verdict(result, by_id["Evaluator"], by_id["ServingCheck"])),
        *_rules(by_id["Evaluator"]),
        ("encoder", _encoder(result, by_id)),
        ("pictures", _shown(result["model_card"])),
        ("took", _took(result["seconds"]["total"], result["cached"])),
        ("details", f"{_shown(home / 'result.json')}, {_shown(home / 'log.txt')}"),
    ]
    lines = ["", *(f"{label:<10}{text}" for label, text in rows)]
    if result["pushed_model"]:
        command = [
            "./moco",
            "embed",
            "--model",
            _shown(result["pushed_model"]),
            "--images",
            _shown(_as_read(images, by_id["ImageExampleGen"])),
            "--out",
            "embeddings.npz",
        ]
        lines += ["", "Embed images with it:", "  " + shlex.join(command)]
    return lines


def _as_read(images: str, node: Node) -> str:
    """A source with the span and version that were read in place of {SPAN} and its like."""
    base, pattern = sources.split_pattern(images)
    (examples,) = node.outputs["examples"]
    span, version = (examples.get_int_custom_property(name) for name in ("span", "version"))
    processor = ImageInputProcessor(base, [example_gen_pb2.Input.Split(name="images", pattern=pattern)])
    read = processor.get_pattern_for_span_version(pattern, span, version)
    return images if read == pattern else sources.join_pattern(base, read)


def _shown(path: str | Path) -> str:
    """A path as one would type it here: relative to the present folder if it lies below."""
    if "://" in str(path):
        return str(path)
    absolute = os.path.abspath(os.path.expanduser(path))
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def _notes(by_id: Mapping[str, Node]) -> Iterator[str]:
    counts = ingested(by_id["ImageExampleGen"])
    if counts["quarantined"]:
        yield f"{counts['quarantined']:,} unusable: {_shown(by_id['ImageExampleGen'].uri('examples'))}/quarantine.jsonl"
    if counts.get("label_conflicts"):
        yield f"{counts['label_conflicts']:,} images stand under more than one label; the first path's is used"
    if counts.get("near_duplicates"):
        yield _near_duplicates(by_id["ImageExampleGen"], counts)
    yield from read_notes(by_id["Evaluator"].uri("evaluation"))
    yield from read_anomalies(by_id["ExampleValidator"].uri("anomalies"))
    yield from read_missing_labels(by_id["StatisticsGen"].uri("statistics"))


def _near_duplicates(node: Node, counts: Mapping[str, int]) -> str:
    found, dropped = counts["near_duplicates"], counts["near_duplicates_dropped"]
    look, stay = ("image looks", "and stays") if found == 1 else ("images look", "and stay")
    what = f"of which {dropped:,} were dropped" if dropped else f"{stay}; ingest.near_duplicates=drop leaves them out"
    listed = _shown(f"{node.uri('examples')}/near_duplicates.jsonl")
    return f"{found:,} eval {look} like one of the train split, {what}: {listed}"


def _quality(
    metrics: Mapping[str, float | None],
    intervals: Mapping[str, Mapping[str, float | None]],
    images: Mapping[str, int],
    config: Config,
) -> Iterator[tuple[str, str]]:
    if metrics["knn_top1"] is None:
        yield (
            "quality",
            (
                f"no labels: two views share {_figure(metrics['neighbour_consistency'])} of their neighbours "
                f"({_figure(metrics['random_init_neighbour_consistency'])} untrained), "
                f"effective rank {_figure(metrics['effective_rank'], 1)}"
            ),
        )
        return
    neighbours = min(config.evaluate.knn_k, images["train"])
    t = config.evaluate.knn_temperature
    yield "kNN top-1", f"{_beside(metrics, intervals, 'knn_top1')}  (backbone, k = {neighbours}, T = {t:g})"
    if metrics["linear_top1"] is not None:
        yield "linear", f"{_beside(metrics, intervals, 'linear_top1')}  (a linear probe's top-1)"


def _beside(metrics: Mapping[str, float | None], intervals: Mapping[str, Mapping[str, float | None]], name: str) -> str:
    """A figure with its interval, and the same of the untrained encoder and of raw pixels."""
    untrained, pixels = (_figure(metrics[f"{kind}_{name}"]) for kind in ("random_init", "pixel"))
    return (
        f"{_figure(metrics[name])}{_interval(intervals.get(name))} trained, {untrained} untrained, {pixels} raw pixels"
    )


def _serving(check: Node) -> Iterator[tuple[str, str]]:
    report = read_report(check.uri("blessing"))
    if report.blessed and report.figures:
        alone, full = (_latency(report.figures, batch) for batch in (BATCHES[0], BATCHES[-1]))
        yield (
            "served",
            f"{alone:.1f} ms for one image, {full:.1f} ms an image in batches of {BATCHES[-1]}, "
            f"{report.figures['peak_mib']:,} MiB, by TensorFlow alone",
        )


def _verdict(result: Mapping[str, Any], evaluator: Node, check: Node) -> str:
    if result["blessed"]:
        return "yes"
    served = read_report(check.uri("blessing"))
    reasons = [*_reasons(evaluator), *(f"cannot be served: {reason}" for reason in served.reasons[:1])]
    return "no: " + "; ".join(reason.removeprefix("not blessed: ") for reason in reasons)


def _rules(evaluator: Node) -> Iterator[tuple[str, str]]:
    """Every rule and its outcome in words."""
    marks = {True: "holds", False: "broken", None: "n/a"}
    for number, rule in enumerate(read_rules(evaluator.uri("evaluation"))):
        yield "" if number else "rules", f"{marks[rule.holds]:<7} {rule.text}"


def _encoder(result: Mapping[str, Any], by_id: Mapping[str, Node]) -> str:
    if result["pushed_model"]:
        return _shown(result["pushed_model"])
    return f"not pushed; it lies in {_shown(by_id['Trainer'].uri('model'))}/Format-Serving"


def _took(seconds: float, cached: Sequence[str]) -> str:
    minutes, rest = divmod(round(seconds), 60)
    reused = f"; {len(cached)} of {len(_DESCRIBERS)} components were reused from an earlier run" if cached else ""
    return f"{minutes} min {rest} s{reused}"


def _figure(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _interval(estimate: Mapping[str, float | None] | None) -> str:
    """The 95 % interval of a figure, if it has one."""
    if not estimate or estimate["low"] is None:
        return ""
    return f" ({_figure(estimate['low'])} to {_figure(estimate['high'])})"


def _describe_ingest(node: Node) -> str:
    counts = ingested(node)
    return (
        f"{counts['read']:,} read: {counts['train']:,} train, {counts['eval']:,} eval, "
        f"{counts['quarantined']:,} quarantined, {counts['duplicates']:,} duplicates"
    )


def _describe_statistics(node: Node) -> str:
    features = tfdv.load_stats_binary(f"{node.uri('statistics')}/Split-train/FeatureStats.pb").datasets[0].features
    return f"statistics of {len(features)} features"


def _describe_schema(node: Node) -> str:
    schema = io_utils.SchemaReader().read(f"{node.uri('schema')}/schema.pbtxt")
    labels = sum(len(domain.value) for domain in schema.string_domain if domain.name == "image/label")
    return f"{len(schema.feature)} features, {f'{labels} labels' if labels else 'no labels'}"


def _describe_validator(node: Node) -> str:
    anomalies = read_anomalies(node.uri("anomalies"))
    return f"{len(anomalies)} anomalies: {anomalies[0]}" if anomalies else "no anomalies"


def _describe_transform(node: Node) -> str:
    output = tft.TFTransformOutput(node.uri("transform_graph"))
    if "label" not in output.transformed_feature_spec():
        return "channel mean and variance; no labels"
    return f"channel mean and variance; {output.vocabulary_size_by_name(LABEL_VOCABULARY)} labels in the vocabulary"


def _describe_augmenter(node: Node) -> str:
    manifest = read_manifest(node.uri("views"))
    megabytes = sum(file.bytes for file in manifest.files) / 1e6
    made = f"{manifest.images * len(manifest.views):,} pairs of views of {manifest.size} px"
    return f"{made} for {manifest.images:,} images, {megabytes:,.0f} MB"


def _describe_trainer(node: Node) -> str:
    training = _training(node)
    continued = f", continued at {training['resumed_from']:,}" if training["resumed_from"] and not node.cached else ""
    return (
        f"{training['steps']:,} steps{continued}, loss {training['final_loss']:.2f}"
        f", {training['images_per_second']:,.0f} images/s, {training['replicas']} replicas"
    )


def _describe_evaluator(node: Node) -> str:
    metrics = read_metrics(node.uri("evaluation"))
    knn, untrained, pixels = (_figure(metrics.get(f"{kind}knn_top1")) for kind in ("", "random_init_", "pixel_"))
    verdict = "blessed" if _blessed(node) else "not blessed"
    if metrics.get("knn_top1") is None:
        return f"effective rank {_figure(metrics.get('effective_rank'), 1)}: {verdict}"
    return f"kNN {knn} (untrained {untrained}, pixels {pixels}): {verdict}"


def _describe_card(node: Node) -> str:
    card = json.loads(Path(node.uri("model_card"), JSON_FILE).read_text(encoding="utf-8"))
    measured = sum(metric["trained"]["value"] is not None for metric in card["evaluation"]["metrics"])
    kilobytes = Path(_page(node)).stat().st_size / 1e3
    return f"card with {measured} metrics, {card['pictures']['queries']} queries, {kilobytes:,.0f} kB"


def _describe_serving_check(node: Node) -> str:
    report = read_report(node.uri("blessing"))
    if not report.blessed:
        further = f" (and {len(report.reasons) - 1} more)" if len(report.reasons) > 1 else ""
        return f"not blessed: {report.reasons[0]}{further}"
    figures = report.figures
    if not figures:
        return "blessed by InfraValidator"
    return (
        f"{figures['signatures']} signatures, {figures['images']:,} images, {_latency(figures, BATCHES[-1]):.1f} ms an "
        f"image at {BATCHES[-1]}, {figures['peak_mib']:,} MiB: blessed"
    )


def _latency(figures: Mapping[str, Any], batch: int) -> float:
    """Median of encoded images, in milliseconds of one."""
    return figures["latency_ms"]["serving_default"][str(batch)]["median"]


def _describe_pusher(node: Node) -> str:
    pushed = _pushed(node)
    return f"version {Path(pushed).name} pushed" if pushed else "nothing pushed"


_DESCRIBERS: Mapping[str, Callable[[Node], str]] = {
    "ImageExampleGen": _describe_ingest,
    "StatisticsGen": _describe_statistics,
    "SchemaGen": _describe_schema,
    "ExampleValidator": _describe_validator,
    "Transform": _describe_transform,
    "ViewAugmenter": _describe_augmenter,
    "Trainer": _describe_trainer,
    "Evaluator": _describe_evaluator,
    "ServingCheck": _describe_serving_check,
    "ModelCard": _describe_card,
    "Pusher": _describe_pusher,
}


def ingested(node: Node) -> dict[str, Any]:
    """The counts that ImageExampleGen left."""
    return json.loads(Path(node.uri("examples"), "ingest.json").read_text(encoding="utf-8"))


def _training(node: Node) -> dict[str, Any]:
    return json.loads(Path(node.uri("model_run"), TRAINING_FILE).read_text(encoding="utf-8"))


def _blessed(evaluator: Node) -> bool:
    (blessing,) = evaluator.outputs["blessing"]
    return blessing.get_int_custom_property(ARTIFACT_PROPERTY_BLESSED_KEY) == 1


def _reasons(evaluator: Node) -> list[str]:
    return read_validation(evaluator.uri("evaluation"))


def _page(model_card: Node) -> str:
    return f"{model_card.uri('model_card')}/{PAGE_FILE}"


def _pushed(pusher: Node) -> str | None:
    (artifact,) = pusher.outputs["pushed_model"]
    return artifact.get_string_custom_property("pushed_destination") or None
