"""Search by meaning: milliseconds of a search after loading, over 100,000 pieces or more (bar: 30 ms for those).

In float32 and int8, exact and approximate (where faiss is installed), each with what making it took, its size and how
many of the true five it finds. Vectors are made in chunks: a million (`--pieces 1000000`) need little memory.
Beside it, with `--peers` and where they are installed, exact search by faiss and the graph of usearch, in memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmcli.config import IndexConfig, SearchConfig
from llmcli.files.vector_index import IndexWriter, Piece, StoredIndex
from llmcli.files.vector_lists import LISTS, has_faiss
from llmcli.operations.approximate import open_search, settle_search

BAR, BAR_PIECES = 30.0, 100_000
ROWS = 10_000  # made and written at once
CLUSTERS = 500  # of 100,000 vectors
HEAD = f"{'search':<28} {'median ms':>10} {'fastest':>8} {'slowest':>8} {'build s':>8} {'MB':>8} {'recall@5':>9}"


def centres_of(count: int, size: int) -> np.ndarray[Any, Any]:
    """Where clusters lie: as many vectors to each, whatever the number, as texts of a kind lie close together."""
    wanted = max(CLUSTERS, count * CLUSTERS // 100_000)
    return np.random.default_rng(0).standard_normal((wanted, size), dtype=np.float32)


def vectors_of(count: int, centres: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Vectors of length 1 around the centres, in chunks, the same ones every time."""
    for begin in range(0, count, ROWS):
        random = np.random.default_rng((1, begin))
        rows = min(ROWS, count - begin)
        noise = random.standard_normal((rows, centres.shape[1]), dtype=np.float32)
        found = centres[random.integers(0, len(centres), rows)] + 0.7 * noise
        yield found / np.linalg.norm(found, axis=1, keepdims=True)


def queries_of(count: int, centres: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Vectors that are none of the index's, a little further from the centres."""
    random = np.random.default_rng(2)
    noise = random.standard_normal((count, centres.shape[1]), dtype=np.float32)
    found = centres[random.integers(0, len(centres), count)] + 0.9 * noise
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def true_five(count: int, centres: np.ndarray[Any, Any], queries: np.ndarray[Any, Any]) -> list[set[int]]:
    """The rows of the five nearest vectors of each query."""
    scores, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for number, part in enumerate(vectors_of(count, centres)):
        scores = np.concatenate([scores, queries @ part.T], axis=1)
        here = np.broadcast_to(np.arange(number * ROWS, number * ROWS + len(part)), (len(queries), len(part)))
        places = np.concatenate([places, here], axis=1)
        best = np.argsort(-scores, axis=1)[:, :5]
        scores, places = np.take_along_axis(scores, best, 1), np.take_along_axis(places, best, 1)
    return [set(row.tolist()) for row in places]


def write_index(folder: Path, count: int, centres: np.ndarray[Any, Any], *, exact: bool) -> None:
    """An index with these vectors."""
    folder.mkdir()
    with IndexWriter(folder, centres.shape[1], exact=exact) as writer:
        for part in vectors_of(count, centres):
            lines = range(writer.pieces + 1, writer.pieces + len(part) + 1)
            writer.write([Piece("file.txt", line, line, "a piece of text " * 20) for line in lines], part)
        writer.finish({"vectors": "float32" if exact else "int8", "dimensions": centres.shape[1], "files": []})


def milliseconds(search: Callable[[np.ndarray[Any, Any]], Any], queries: np.ndarray[Any, Any]) -> list[float]:
    """The time of each query, the first three left out."""
    times = []
    for query in queries:
        begun = time.perf_counter()
        search(query)
        times.append(1000 * (time.perf_counter() - begun))
    return times[3:]


def peers(vectors: np.ndarray[Any, Any], threads: int | None) -> Iterator[tuple[str, Callable[[Any], Any], float]]:
    """Searches by other libraries that are installed here, and the seconds that making them took."""
    if importlib.util.find_spec("faiss"):
        import faiss

        if threads:
            faiss.omp_set_num_threads(threads)
        begun = time.perf_counter()
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        yield "faiss, exact", lambda query: flat.search(query[None], 5)[1][0], time.perf_counter() - begun
    if importlib.util.find_spec("usearch"):
        from usearch.index import Index

        begun = time.perf_counter()
        index = Index(ndim=vectors.shape[1], metric="ip")
        index.add(np.arange(len(vectors)), vectors, threads=threads or 0)
        yield "usearch, graph", lambda query: index.search(query, 5).keys, time.perf_counter() - begun


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 where 100,000 pieces or fewer take longer than the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=BAR_PIECES)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=53)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--peers", action="store_true", help="faiss and usearch too: all vectors in memory, and minutes"
    )
    options = parser.parse_args()
    centres = centres_of(options.pieces, options.dimensions)
    queries = queries_of(options.queries, centres)
    true = true_five(options.pieces, centres, queries)
    results = []
    print(HEAD)

    def tell(name: str, search: Callable[[Any], Any], build: float, size: int) -> None:
        times = milliseconds(search, queries)
        hits = [len(set(map(int, search(query))) & best) for query, best in zip(queries, true, strict=True)]
        share, median = sum(hits) / (5 * len(hits)), statistics.median(times)
        figures = (
            f"{median:>10.2f} {min(times):>8.2f} {max(times):>8.2f} {build:>8.1f} {size / 1e6:>8.1f} {share:>9.3f}"
        )
        print(f"{name:<28} {figures}", flush=True)
        facts = {"search": name, "milliseconds": median, "fastest": min(times), "slowest": max(times)}
        results.append({**facts, "seconds": build, "bytes": size, "recall": share})

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("float32", "int8"):
            folder = Path(scratch) / name
            begun = time.perf_counter()
            write_index(folder, options.pieces, centres, exact=name == "float32")
            build = time.perf_counter() - begun
            for kind in ("exact", "approximate") if has_faiss() else ("exact",):
                settled, _ = settle_search(folder, IndexConfig(search=kind, threads=options.threads))
                index = StoredIndex(folder)
                nearest, _ = open_search(index, SearchConfig(search=kind, threads=options.threads))

                def search(query: Any, index: StoredIndex = index, nearest: Any = nearest) -> Any:
                    places, _ = nearest.search(query, 5)
                    for place in places:
                        index.piece(int(place))
                    return places

                if kind == "exact":
                    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
                else:
                    build, size = settled["seconds"], (folder / LISTS).stat().st_size
                    print(f"{settled['lists']:,} lists, {settled['probes']} of them looked at; as measured when made: "
                          f"recall@5 {settled['recall_at_5']:.3f}")  # fmt: skip
                tell(f"llmcli {name}, {kind}", search, build, size)
            for path in folder.iterdir():
                path.unlink()
    if options.peers:
        vectors = np.concatenate(list(vectors_of(options.pieces, centres)))
        for name, other, build in peers(vectors, options.threads):
            tell(name, other, build, vectors.nbytes)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"most memory held, mapped files included: {most:,.0f} MB")
    own = [float(result["milliseconds"]) for result in results if str(result["search"]).startswith("llmcli")]
    ok = options.pieces > BAR_PIECES or max(own) <= BAR
    print(json.dumps({"benchmark": "similar", "runs": results, "worst": max(own), "bar": BAR, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
