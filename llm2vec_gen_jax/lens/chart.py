"""Scatter plots of the report: projection of vectors to two dimensions, SVG coordinates."""

import dataclasses

import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import postprocess

WIDTH, HEIGHT, MARGIN = 420, 340, 24  # in SVG units

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A scatter plot of queries and their responses. queries, responses: [(x, y)] in SVG units.

    cosine: mean cosine of the queries and their responses. first: number of queries whose response is the nearest of
    all responses.
    """

    queries: list[Point]
    responses: list[Point]
    cosine: float
    first: int

    @property
    def pairs(self) -> list[tuple[float, float, float, float]]:
        """[(x, y, x, y)]: the line from each query to its response."""
        return [(*query, *response) for query, response in zip(self.queries, self.responses)]

    @property
    def labels(self) -> list[tuple[float, float, int]]:
        """[(x, y, number)]: labels of the queries, without those that would overlap an earlier label."""
        placed: list[tuple[float, float, int]] = []
        for number, (x, y) in enumerate(self.queries, 1):
            if all(abs(x - other[0]) > 13 or abs(y - other[1]) > 11 for other in placed):
                placed.append((x, y, number))
        return [(round(x + 6, 1), round(y - 5, 1), number) for x, y, number in placed]


def panel(queries_NE: np.ndarray, responses_NE: np.ndarray, projection: str = "pca") -> Panel:
    """Returns the Panel of the vectors of queries and responses, which are L2-normalized first."""
    queries_NE, responses_NE = postprocess.l2_normalize(queries_NE), postprocess.l2_normalize(responses_NE)
    cosines_NN = queries_NE @ responses_NE.T
    points = _to_svg(project(np.concatenate([queries_NE, responses_NE]), projection))
    n = len(queries_NE)
    first = int((cosines_NN.argmax(axis=1) == np.arange(n)).sum())
    return Panel(points[:n], points[n:], float(np.diag(cosines_NN).mean()), first)


def project(points_PE: np.ndarray, projection: str = "pca") -> np.ndarray:
    """Returns points (P, 2): principal components (`pca`), or UMAP (McInnes et al. 2018) by cosine, with seed 0.

    Raises InputError for umap if it is not installed.
    """
    if projection == "umap":
        try:
            import umap
        except ImportError as error:
            raise InputError(f"projection=umap requires umap-learn: pip install umap-learn ({error})") from None
        near = min(15, len(points_PE) - 1)
        start = "spectral" if len(points_PE) > 8 else "random"  # fewer points have too few eigenvectors
        return umap.UMAP(n_neighbors=near, metric="cosine", random_state=0, init=start).fit_transform(points_PE)
    centered = points_PE - points_PE.mean(axis=0)
    left, sizes, axes = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])  # not determined by the SVD
    return (left * sizes * signs)[:, :2]


def _to_svg(points_P2: np.ndarray) -> list[Point]:
    """Returns [(x, y)] in SVG units: centered, with the same scale in both directions."""
    low, high = points_P2.min(axis=0), points_P2.max(axis=0)
    extent = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = (extent / np.maximum(high - low, 1e-9)).min()
    scaled = (points_P2 - (low + high) / 2) * scale * [1, -1] + np.array([WIDTH, HEIGHT]) / 2
    return [(round(float(x), 1), round(float(y), 1)) for x, y in scaled]
