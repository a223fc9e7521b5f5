"""A page of the pictures that a search found: one file, without scripts, that asks nothing of any network."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence

from components.image_example_gen import codec, sources
from components.image_example_gen.config import IngestConfig
from pipeline.embedding.index import Index
from pipeline.embedding.search import Found, Hit

_SIDE = 200  # pixels of a thumbnail's longer side
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --soft: #666; --card: #f3f3f3; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --text: #eee; --soft: #a5a5a5; --card: #242424; --line: #3a3a3a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 0 0 .7rem; overflow-wrap: anywhere; }
p, dl { color: var(--soft); margin: 0 0 1.5rem; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
.query { display: flex; gap: 1rem; align-items: center; margin-bottom: 1rem; }
.query figure { width: 12rem; flex: none; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .8rem; list-style: none;
  margin: 0; padding: 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden;
  height: 100%; }
.picture { height: 10rem; display: flex; align-items: center; justify-content: center; background: #fff; }
.picture img { max-width: 100%; max-height: 100%; }
.missing { background: var(--card); color: var(--soft); border-bottom: 1px dashed var(--line); padding: .5rem;
  text-align: center; }
figcaption { padding: .5rem .6rem; font-size: .85rem; overflow-wrap: anywhere; }
figcaption small { color: var(--soft); display: block; }
"""


def to_html(found: Sequence[Found], index: Index) -> str:
    """The page. A picture that is not where it was, or is another one now, is said to be missing in its place.

    Args:
        found: by `pipeline.embedding.search.search`.
        index: that was searched; its source is where the pictures are looked for.
    """
    images = _images(found, index)
    about = index.about
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>Nearest images in {html.escape(index.path)}</title><style>{_STYLE}</style></head>",
            "<body><h1>Nearest images</h1>",
            f"<p>{html.escape(index.path)}: {index.rows:,} images of {html.escape(about.images)}, embedded by "
            f"{html.escape(about.model)}; cosine similarity of {about.dimensions}-d embeddings.</p>",
            *(line for one in found for line in _section(one, images)),
            "</body></html>",
            "",
        ]
    )


def _images(found: Sequence[Found], index: Index) -> dict[str, str]:
    """Thumbnails by the hashes of the images."""
    given = {query.sha256: query.data for query, _ in found if query.data is not None}
    images = {sha: _thumbnail(data) for sha, data in given.items()}
    paths = {hit.path: hit.sha256 for _, hits in found for hit in hits}
    paths |= {query.name: query.sha256 for query, _ in found if query.data is None}
    wanted = [path for path, sha in paths.items() if sha not in images]
    for item in sources.read_named(index.about.images, wanted, IngestConfig()):
        sha = codec.sha256(item.data)
        if sha == paths[item.ref.path] and sha not in images:
            images[sha] = _thumbnail(item.data)
    return images


def _thumbnail(data: bytes) -> str:
    """An image that was embedded as a data URI."""
    limits = codec.Limits(IngestConfig.max_pixels, IngestConfig.min_side)
    picture = codec.upright(data, limits)
    picture.thumbnail((_SIDE, _SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _section(found: Found, images: Mapping[str, str]) -> Iterator[str]:
    query, hits = found
    name = html.escape(query.name)
    yield f'<section><div class="query"><figure>{_picture(images.get(query.sha256), name)}</figure>'
    yield f"<h2>{name}</h2></div><ol>"
    yield from (_card(hit, images) for hit in hits)
    yield "</ol></section>"


def _card(hit: Hit, images: Mapping[str, str]) -> str:
    path, label = html.escape(hit.path), html.escape(hit.label or "")
    caption = f"<b>{hit.rank}</b> · {hit.similarity:.4f}{f' · {label}' if label else ''}<small>{path}</small>"
    return f"<li><figure>{_picture(images.get(hit.sha256), path)}<figcaption>{caption}</figcaption></figure></li>"


def _picture(uri: str | None, name: str) -> str:
    if uri is None:
        return '<div class="picture missing">picture not found</div>'
    return f'<div class="picture"><img src="{uri}" alt="{name}"></div>'
