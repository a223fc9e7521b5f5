"""Finds the images whose embeddings are nearest to those of others: `./moco search`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from components.image_example_gen import codec
from components.image_example_gen.config import IngestConfig
from pipeline.embedding import table
from pipeline.embedding.encoder import Encoder, load_encoder, version_of
from pipeline.embedding.index import Index
from trainer_module.errors import UserError
from trainer_module.knn import decode, encode, largest, nearest, unit


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        rank: from 1.
        similarity: cosine.
        path: as in the index.
        label: as in the index; None where there is none.
        sha256: of its bytes when it was embedded.
    """

    rank: int
    similarity: float
    path: str
    label: str | None
    sha256: str


@dataclasses.dataclass(frozen=True)
class Query:
    """What is looked for.

    Attributes:
        name: as it was typed: an image's path on this machine or in the index.
        vector: float32 [D], of unit length.
        data: the image; None for one of the index.
        sha256: of the image.
    """

    name: str
    vector: np.ndarray
    data: bytes | None
    sha256: str


class Found(NamedTuple):
    """The nearest images of a query, the nearest first."""

    query: Query
    hits: list[Hit]


def search(index: Index, queries: Sequence[str], k: int, model: str | None = None) -> list[Found]:
    """Finds the nearest images by cosine similarity, exactly; of equally similar ones the first in the index.

    Args:
        index: where to look; it is read in parts.
        queries: images on this machine, or paths of images in the index.
        k: how many, at least 1.
        model: the encoder that made the index; where it lay then if left out.

    Raises:
        UserError: an image cannot be used, the model is missing or another one, or k is larger than the index.
    """
    if k < 1:
        raise UserError(f"-k {k} must be at least 1; e.g. -k 10")
    made = _queries(index, queries, model)
    similarities, rows = _nearest(index, np.stack([query.vector for query in made]), k)
    described = _described(index, rows)
    return [
        Found(query, [Hit(rank, float(one), *described[int(row)]) for rank, (one, row) in enumerate(pairs, 1)])
        for query, pairs in zip(made, map(zip, similarities, rows), strict=True)
    ]


def text(found: Sequence[Found]) -> list[str]:
    """As lines: rank, similarity, path, label."""
    lines: list[str] = []
    for query, hits in found:
        lines += [query.name] if len(found) > 1 else []
        width = max(len(hit.path) for hit in hits)
        lines += [
            f"{rank:>4}  {one:7.4f}  {path:<{width}}  {label or ''}".rstrip() for rank, one, path, label, _ in hits
        ]
    return lines


def to_json(found: Sequence[Found], index: Index) -> str:
    """As JSON."""
    results = [{"query": query.name, "hits": [hit._asdict() for hit in hits]} for query, hits in found]
    document = {"index": index.path, "model": index.about.model, "images": index.about.images, "results": results}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


# What is looked for.


def _queries(index: Index, names: Sequence[str], model: str | None) -> list[Query]:
    files = [name for name in names if os.path.isfile(name)]
    images = {name: _read(name) for name in files}
    # Known before the model is loaded.
    in_index = _rows_of(index, [name for name in names if name not in images])
    made: dict[str, Query] = dict(in_index)
    if files or model is not None:
        encoder = _encoder(index, model)
        for name, (data, encoded) in images.items():
            (outcome,) = encoder([encoded])
            if isinstance(outcome, str):
                raise UserError(f"--query {name}: cannot be embedded ({outcome})")
            if not np.isfinite(outcome).all():
                raise UserError(f"--query {name}: its embedding is not finite; the model is broken")
            made[name] = Query(name, unit(outcome[None])[0], data, codec.sha256(data))
    return [made[name] for name in names]


def _read(name: str) -> tuple[bytes, bytes]:
    """An image's bytes as they are and as the model takes them."""
    try:
        with open(name, "rb") as file:
            data = file.read()
        return data, codec.canonical(data, codec.Limits(IngestConfig.max_pixels, IngestConfig.min_side)).encoded
    except codec.BadImage as error:
        raise UserError(f"--query {name}: is not usable as an image ({error})") from error
    except OSError as error:
        raise UserError(f"--query {name}: cannot be read ({error.strerror})") from error


def _rows_of(index: Index, names: Sequence[str]) -> dict[str, Query]:
    """Queries of images that are in the index; where a path is there twice, the first one."""
    found: dict[str, Query] = {}
    wanted = set(names)
    for part in index.tables(["path", "sha256", "embedding", "error"]) if wanted else ():
        paths = part["path"].to_pylist()
        for row in [number for number, path in enumerate(paths) if path in wanted]:
            name = paths[row]
            if error := part["error"][row].as_py():
                raise UserError(f"--query {name}: has no embedding in {index.path} ({error})")
            vector = table.vectors(part.slice(row, 1), index.about.dimensions)
            found[name] = Query(name, unit(vector)[0], None, part["sha256"][row].as_py())
            wanted.remove(name)
        if not wanted:
            break
    for name in wanted:
        raise UserError(f"--query {name}: there is no such file, and {index.path} has no image of that path")
    return found


def _encoder(index: Index, model: str | None) -> Encoder:
    """The encoder that made the index.

    Raises:
        UserError: it cannot be loaded, or is another one.
    """
    about = index.about
    try:
        encoder = load_encoder(version_of(about.model if model is None else model))
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{error}; it made {index.path}: name a copy of it with --model") from error
    if encoder.sha256 != about.model_sha256:
        named = about.model if model is None else model
        raise UserError(
            f"--model {named}: is not the model that made {index.path}, which was {about.model}, and embeddings of two "
            "models cannot be compared; name that one, or embed the images again"
        )
    return encoder


# What is near.


def _nearest(index: Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities float32 [Q, k] and rows int64 [Q, k], the nearest first."""
    best = np.zeros((len(queries), 0), np.uint64)
    start = usable = 0
    for part in index.tables(["embedding"]):
        bank = unit(table.vectors(part, index.about.dimensions))
        there = np.flatnonzero(np.isfinite(bank).all(axis=1))
        similarities, places = decode(nearest(bank[there], queries, k))
        if len(there):
            best = largest(np.concatenate([best, encode(similarities, start + there[places])], axis=1), k)
        start += len(bank)
        usable += len(there)
    if k > usable:
        few = f"e.g. -k {usable}" if usable else "embed other images"
        raise UserError(f"-k {k}: {index.path} has only {usable} images with an embedding; {few}")
    return decode(best)


def _described(index: Index, rows: np.ndarray) -> dict[int, tuple[str, str | None, str]]:
    """Path, label and hash of rows."""
    wanted = np.unique(rows)
    described: dict[int, tuple[str, str | None, str]] = {}
    start = 0
    for part in index.tables(["path", "label", "sha256"]):
        for row in wanted[(wanted >= start) & (wanted < start + part.num_rows)]:
            path, label, sha = (part[name][int(row) - start].as_py() for name in ("path", "label", "sha256"))
            described[int(row)] = (path, label, sha)
        start += part.num_rows
    return described
