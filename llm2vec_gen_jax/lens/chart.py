"""A plane of points for a page: projections of vectors, and their places in an SVG."""

import dataclasses

import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import postprocess

WIDTH, HEIGHT, MARGIN = 420, 340, 24  # of the SVG, in its own units


@dataclasses.dataclass(frozen=True)
class Panel:
    """Queries and their responses on one plane. queries, responses: [(x, y)] in units of the SVG.

    cosine: mean over the queries, with their own response. first: of how many queries the own response is the
    nearest of all responses.
    """

    queries: list
    responses: list
    cosine: float
    first: int

    @property
    def pairs(self):
        """[(x, y, x, y)]: the line from each query to its response."""
        return [(*query, *response) for query, response in zip(self.queries, self.responses)]

    @property
    def labels(self):
        """[(x, y, number)] beside the queries, of those that would not lie on an earlier one."""
        placed = []
        for number, (x, y) in enumerate(self.queries, 1):
            if all(abs(x - other[0]) > 13 or abs(y - other[1]) > 11 for other in placed):
                placed.append((x, y, number))
        return [(round(x + 6, 1), round(y - 5, 1), number) for x, y, number in placed]


def panel(queries_NE, responses_NE, projection="pca"):
    """Returns the Panel of the vectors of queries and of their responses, both of unit length first."""
    queries_NE, responses_NE = postprocess.l2_normalize(queries_NE), postprocess.l2_normalize(responses_NE)
    cosines_NN = queries_NE @ responses_NE.T
    places = _places(project(np.concatenate([queries_NE, responses_NE]), projection))
    n = len(queries_NE)
    first = int((cosines_NN.argmax(axis=1) == np.arange(n)).sum())
    return Panel(places[:n], places[n:], float(np.diag(cosines_NN).mean()), first)


def project(points_PE, projection="pca"):
    """Returns points (P, 2): principal components (`pca`), or UMAP (McInnes et al. 2018) by cosine, of seed 0.

    Raises InputError where umap is asked for and not installed.
    """
    if projection == "umap":
        try:
            import umap
        except ImportError as error:
            raise InputError(f"projection=umap needs that package: pip install umap-learn ({error})") from None
        near = min(15, len(points_PE) - 1)
        start = "spectral" if len(points_PE) > 8 else "random"  # fewer points have not enough eigenvectors
        return umap.UMAP(n_neighbors=near, metric="cosine", random_state=0, init=start).fit_transform(points_PE)
    centred = points_PE - points_PE.mean(axis=0)
    left, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])  # an SVD leaves them open
    return (left * sizes * signs)[:, :2]


def _places(points_P2):
    """Returns [(x, y)] in the SVG, of one scale in both directions, in its middle."""
    low, high = points_P2.min(axis=0), points_P2.max(axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = (room / np.maximum(high - low, 1e-9)).min()
    placed = (points_P2 - (low + high) / 2) * scale * [1, -1] + np.array([WIDTH, HEIGHT]) / 2
    return [(round(float(x), 1), round(float(y), 1)) for x, y in placed]
