"""Search by meaning: milliseconds of a search over 100,000 pieces after loading, in float32 and int8 (bar: 30 ms).

Beside it, where they are installed, exact search by faiss and the graph index of usearch over the same vectors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmcli.files.vector_index import IndexWriter, Piece, StoredIndex
from llmcli.operations.nearest import Nearest

BAR = 30.0
ROWS = 10_000  # written at once


def vectors_of(count: int, size: int) -> np.ndarray[Any, Any]:
    """Vectors of length 1 in 500 clusters, as those of real texts lie closer together than random ones."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((500, size), dtype=np.float32)
    found = centres[random.integers(0, 500, count)] + 0.7 * random.standard_normal((count, size), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write_index(folder: Path, vectors: np.ndarray[Any, Any], *, exact: bool) -> None:
    """An index with these vectors."""
    folder.mkdir()
    with IndexWriter(folder, vectors.shape[1], exact=exact) as writer:
        for begin in range(0, len(vectors), ROWS):
            part = vectors[begin : begin + ROWS]
            pieces = [
                Piece("file.txt", begin + row + 1, begin + row + 1, "a piece of text " * 20) for row in range(len(part))
            ]
            writer.write(pieces, part)
        writer.finish({"vectors": "float32" if exact else "int8", "dimensions": vectors.shape[1], "files": []})


def milliseconds(search: Callable[[np.ndarray[Any, Any]], Any], queries: np.ndarray[Any, Any]) -> list[float]:
    """The time of each query, the first three left out."""
    times = []
    for query in queries:
        begun = time.perf_counter()
        search(query)
        times.append(1000 * (time.perf_counter() - begun))
    return times[3:]


def peers(vectors: np.ndarray[Any, Any], threads: int | None, graph: bool) -> dict[str, Callable[[Any], Any]]:
    """Searches by other libraries that are installed here; each gives the places of the nearest five."""
    found: dict[str, Callable[[Any], Any]] = {}
    if importlib.util.find_spec("faiss"):
        import faiss

        if threads:
            faiss.omp_set_num_threads(threads)
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        found["faiss, exact"] = lambda query: flat.search(query[None], 5)[1][0]
    if graph and importlib.util.find_spec("usearch"):
        from usearch.index import Index

        begun = time.perf_counter()
        index = Index(ndim=vectors.shape[1], metric="ip")
        index.add(np.arange(len(vectors)), vectors)
        print(f"usearch built its graph in {time.perf_counter() - begun:.0f} s")
        found["usearch, graph"] = lambda query: index.search(query, 5).keys
    return found


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 above the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=53)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--graph", action="store_true", help="usearch's graph index too, which takes minutes to build")
    options = parser.parse_args()
    vectors = vectors_of(options.pieces, options.dimensions)
    random = np.random.default_rng(1)
    queries = vectors[random.integers(0, len(vectors), options.queries)]
    queries = queries + 0.02 * random.standard_normal(queries.shape, dtype=np.float32)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    true = [np.argsort(-(vectors @ query))[:5] for query in queries]
    results = []
    print(
        f"{'search':<16} {'median ms':>10} {'fastest':>9} {'slowest':>9} {'load ms':>9} {'MB':>7} {'of the true 5':>14}"
    )

    def tell(name: str, search: Callable[[Any], Any], load: float, size: int) -> None:
        times = milliseconds(search, queries)
        hits = [
            len(set(map(int, search(query))) & set(best.tolist())) for query, best in zip(queries, true, strict=True)
        ]
        share = sum(hits) / (5 * len(hits))
        median = statistics.median(times)
        figures = (
            f"{median:>10.2f} {min(times):>9.2f} {max(times):>9.2f} {load:>9.1f} {size / 1e6:>7.1f} {share:>14.3f}"
        )
        print(f"{name:<16} {figures}")
        results.append(
            {
                "search": name,
                "milliseconds": median,
                "fastest": min(times),
                "slowest": max(times),
                "bytes": size,
                "recall": share,
            }
        )

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("float32", "int8"):
            folder = Path(scratch) / name
            write_index(folder, vectors, exact=name == "float32")
            begun = time.perf_counter()
            index = StoredIndex(folder)
            nearest = Nearest(index.codes, index.steps, index.vectors, threads=options.threads)
            load = 1000 * (time.perf_counter() - begun)

            def search(query: Any, index: StoredIndex = index, nearest: Nearest = nearest) -> Any:
                places, _ = nearest.search(query, 5)
                for place in places:
                    index.piece(int(place))
                return places

            tell(f"llmcli {name}", search, load, sum(path.stat().st_size for path in folder.glob("*.npy")))
    for name, other in peers(vectors, options.threads, options.graph).items():
        tell(name, other, 0.0, vectors.nbytes)
    worst = max(float(result["milliseconds"]) for result in results if str(result["search"]).startswith("llmcli"))
    print(json.dumps({"benchmark": "similar", "runs": results, "worst": worst, "bar": BAR, "ok": worst <= BAR}))
    sys.exit(0 if worst <= BAR else 1)


if __name__ == "__main__":
    main()
